"""What is drawn of the validation data after each epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_distill.inputs import plain_inputs, rows_of, select_inputs
from keras_distill.monitoring.figures import attention_figure
from keras_distill.monitoring.views import class_accuracies, compares_logits, views_of
from keras_distill.taps import paths_of

LogitsOf = Callable[[Any], list[dict[str, Any]]]


class Rows:
    """The first rows of the validation data, in batches of `(x, y)`.

    Args:
        data: `(x, y)` arrays or a batched `tf.data.Dataset`.
        count: How many rows.
        batch_size: For arrays.
    """

    def __init__(self, data: Any, count: int, batch_size: int) -> None:
        if not isinstance(data, tf.data.Dataset):
            data = rows_of(data).batch(batch_size)
        self._data = data
        self._count = count

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        left = self._count
        for element in self._data:
            parts = element if isinstance(element, tuple) else (element,)
            part = keras.tree.map_structure(lambda leaf, n=left: leaf[:n], parts[:2])
            yield part[0], part[1] if len(part) > 1 else None
            left -= int(tf.shape(keras.tree.flatten(part)[0])[0])
            if left <= 0:
                return

    def first(self) -> tuple[Any, Any]:
        """The first batch.

        Raises:
            ValueError: If there is none.
        """
        for batch in self:
            return batch
        raise ValueError("`validation_data` has no rows.")


class LogitCharts:
    """Of each output: entropy, agreement, calibration, gains by class.

    Args:
        model: The distiller.
        teacher: The teacher that is shown, or None.
        rows: Of the validation data.
        bins: Of the calibration error.
        baseline: A student that gains are over, or None for those over the first epoch.

    Raises:
        ValueError: If there is a baseline, and the rows have no labels.
    """

    def __init__(
        self,
        model: Any,
        teacher: Any,
        rows: Rows,
        bins: int,
        baseline: keras.Model | None,
    ) -> None:
        self._model, self._rows, self._bins = model, rows, bins
        self._teacher = teacher if compares_logits(model) else None
        self._views = views_of(model, self._teacher)
        self._logits_of = in_graph(model, self._of_networks)
        # What does not fit fails now, and not after the first epoch.
        x, y = rows.first()
        self._logits_of(x)
        model._read(y, None, False)
        if baseline is not None:
            self._measure(baseline)

    def write(self) -> None:
        """Writes the charts to the current writer."""
        found = self._collect(self._logits_of)
        for view, values in zip(self._views, found, strict=True):
            view.write(values, self._bins)

    def _of_networks(self, x: Any) -> list[dict[str, Any]]:
        outputs = self._model.run_student(x, False)
        found = [view.of_student(outputs) for view in self._views]
        if self._teacher is not None:
            known, _ = ask(self._model, self._teacher, x, [])
            for view, values in zip(self._views, found, strict=True):
                values |= view.of_teacher(known)
        return found

    def _measure(self, baseline: keras.Model) -> None:
        def seen(x: Any) -> Any:
            return select_inputs(plain_inputs(x), self._model.student_inputs)

        found = self._collect(
            lambda x: [view.of_student(baseline(seen(x))) for view in self._views]
        )
        for view, values in zip(self._views, found, strict=True):
            if "labels" not in values:
                raise ValueError("`baseline` needs labels in `validation_data`.")
            view.first = class_accuracies(values["student"], values["labels"])

    def _collect(self, logits_of: LogitsOf) -> list[dict[str, np.ndarray]]:
        """For each view: the positions that count, over all rows."""
        collected: list[list[dict[str, np.ndarray]]] = [[] for _ in self._views]
        for x, y in self._rows:
            labels = self._model._read(y, None, False)[0]
            for view, found, parts in zip(
                self._views, logits_of(x), collected, strict=True
            ):
                label = labels[view.index]
                if label is not None and label.classes is not None:
                    classes = tf.cast(label.classes, tf.int64)
                    if label.valid is not None:
                        classes = tf.where(label.valid, classes, -1)
                    found = found | {"labels": classes}
                parts.append(_positions(found))
        return [
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            for parts in collected
        ]


class GateCharts:
    """Histograms of the gates of `kd.OneEnsemble`."""

    def __init__(self, model: Any, rows: Rows) -> None:
        self._gates_of = in_graph(model, model.gate_weights)
        self._rows = rows

    def write(self) -> None:
        """Writes the charts to the current writer."""
        weights = np.concatenate([np.asarray(self._gates_of(x)) for x, _ in self._rows])
        for index, values in enumerate(weights.T):
            tf.summary.histogram(f"gates/branch_{index}", values)


class AttentionChart:
    """Attention maps of student and teacher, side by side.

    Args:
        model: The distiller.
        teacher: The teacher that is shown.
        rows: Of the validation data.
        layers: A layer of the student, and one of the teacher.
        images: For how many rows.

    Raises:
        ValueError: If there are no such layers, or their outputs are no grids.
    """

    def __init__(
        self, model: Any, teacher: Any, rows: Rows, layers: tuple[Any, Any], images: int
    ) -> None:
        self._model, self._teacher = model, teacher
        self._paths = (
            paths_of(model.student, layers[0], "attention"),
            teacher.resolve(layers[1]),
        )
        x, _ = rows.first()
        self._x = keras.tree.map_structure(lambda leaf: leaf[:images], x)
        for features in self._features():
            if len(features.shape) != 4:
                raise ValueError(
                    "`attention` needs layers with outputs (B, H, W, C). Received: "
                    f"{layers}, one of which gives {tuple(features.shape)}"
                )

    def write(self) -> None:
        """Writes the chart to the current writer."""
        student, teacher = (np.asarray(f, "float32") for f in self._features())
        x = self._x
        seen = tf.is_tensor(x) and len(x.shape) == 4 and x.shape[-1] in (1, 3)
        image = attention_figure(np.asarray(x) if seen else None, student, teacher)
        tf.summary.image("attention", image)

    def _features(self) -> tuple[Any, Any]:
        own, other = self._paths
        student = self._model.run_student(self._x, False, [own])[1][own]
        teacher = ask(self._model, self._teacher, self._x, [other])[1][other]
        return student, teacher


def ask(model: Any, teacher: Any, x: Any, taps: Any) -> tuple[Any, dict[str, Any]]:
    """What a teacher says of a batch: at T = 1, or at the only one that it knows."""
    temperature = model._teacher_temperature if teacher.one_temperature else 1.0
    return teacher(x, taps, temperature)


def in_graph(model: Any, function: Any, **options: Any) -> Any:
    """A function as the distiller was compiled to run: as a graph, or eagerly."""
    return function if model.run_eagerly else tf.function(function, **options)


def _positions(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """Positions that count, in one row each."""
    arrays = {name: np.asarray(value) for name, value in found.items()}
    valid = arrays.pop("valid").astype(bool)
    return {name: value[valid] for name, value in arrays.items()}
