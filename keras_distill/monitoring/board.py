"""The callback that writes for TensorBoard."""

from __future__ import annotations

import copy
import os
import re
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_distill.base import BaseDistiller
from keras_distill.distribute.workers import is_chief, several_workers
from keras_distill.losses.base import number
from keras_distill.monitoring.clock import StepClock, TeacherClock
from keras_distill.monitoring.figures import attention_figure
from keras_distill.monitoring.layout import write_layout
from keras_distill.monitoring.views import (
    View,
    class_accuracies,
    compares_logits,
    views_of,
)
from keras_distill.taps import paths_of
from keras_distill.teachers.cache import Cache
from keras_distill.teachers.ensemble import as_teacher

_BRANCH = re.compile(r"(branch|exit|net)_\d+_accuracy|ensemble_accuracy")


class DistillationBoard(keras.callbacks.Callback):
    """Writes what a distiller is learning for TensorBoard, after every epoch.

    Always: temperature, alpha, beta, the weights of the terms, the learning rate, steps
    per second; the gradient's shares with `compile(log_gradient_share=...)`; mean gates
    and accuracies of the branches of `kd.OneEnsemble`.

    With validation data: entropy of student and teacher (at T = 1), agreement, the
    Kullback-Leibler divergence from the teacher (at T = 1), the expected calibration
    error and a reliability diagram, and per class what accuracy has been gained. The
    teacher's charts need a distiller whose soft loss compares logits. Also histograms
    of the gates, and the share of a step's time that the teacher takes: its own time
    for as many rows, measured alone (not with several workers).

    All are on one page under "custom scalars", and the run is one under "hparams". Use
    it beside `keras.callbacks.TensorBoard`, which writes the logs themselves.

    Args:
        log_dir: Folder for the logs; with keras-tuner each trial gets one inside. None
            takes that of the `keras.callbacks.TensorBoard` among the callbacks.
        validation_data: `(x, y)` arrays or a batched `tf.data.Dataset`.
        rows: How many rows of it are looked at.
        batch_size: For arrays.
        bins: Of the calibration error.
        teacher: The teacher, if it is not the distiller's: for one that is a cache.
        baseline: A student that was trained without a teacher; the gain by class is
            over it. None for the gain over the first epoch.
        attention: A pair of layers, of student and teacher, whose features
            `(B, H, W, C)` are shown as attention maps side by side.
        images: For how many rows of `validation_data` they are shown.
        hparams: Further values for the page of hyperparameters.

    Raises:
        ValueError: If an argument needs `validation_data` and there are none, or
            `log_dir` cannot be written; when training begins, if there is no folder or
            it cannot be written, the validation data have no rows, or the teacher
            cannot be run.

    Example:

    ```python
    board = kd.monitoring.DistillationBoard("logs", validation_data=(x, y))
    distiller.fit(x, y, epochs=2, callbacks=[board])
    ```
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        validation_data: Any = None,
        *,
        rows: int = 2000,
        batch_size: int = 128,
        bins: int = 15,
        teacher: Any = None,
        baseline: keras.Model | None = None,
        attention: tuple[str, str] | None = None,
        images: int = 4,
        hparams: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("rows", rows), ("bins", bins), ("images", images)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {value}")
        if validation_data is None:
            needing = {"teacher": teacher, "baseline": baseline, "attention": attention}
            for name, value in needing.items():
                if value is not None:
                    raise ValueError(f"`{name}` has no effect without validation_data.")
        if log_dir is not None:
            _check_folder(log_dir)
        self.log_dir = log_dir
        self.validation_data = validation_data
        self.rows = rows
        self.batch_size = batch_size
        self.bins = bins
        self.teacher = None if teacher is None else as_teacher(teacher)
        self.baseline = baseline
        self.attention = attention
        self.images = images
        self.hparams = hparams or {}
        self._companions: list[Any] = []
        self._writer: Any = None
        self._views: list[View] = []
        self._used_teacher: Any = None
        self._logits_of: Any = None
        self._shown: Any = None  # inputs for the attention maps
        self._paths: tuple[str, str] = ("", "")
        self._gates_of: Any = None
        self._clock = StepClock()
        self._teacher_clock: TeacherClock | None = None
        self._rows_trained: float | None = None  # in this epoch

    def __deepcopy__(self, memo: dict[int, Any]) -> DistillationBoard:
        # keras-tuner copies callbacks for each trial; data sets cannot be copied, and
        # models need not.
        return copy.copy(self)

    def with_companions(self, callbacks: list[Any]) -> None:
        """Tells the other callbacks, one of which may know the folder."""
        self._companions = callbacks

    # -- the callback ---------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        if not isinstance(self.model, BaseDistiller):
            raise TypeError(
                f"DistillationBoard needs a distiller. Received: {self.model!r}"
            )
        if not is_chief(self.model.distribute_strategy):
            return
        folder = os.path.join(self._folder(), "distillation")
        try:
            tf.io.gfile.makedirs(folder)
            self._writer = tf.summary.create_file_writer(folder)
        except tf.errors.OpError as error:
            raise ValueError(f"{folder!r} cannot be written: {error}") from error
        self._views = []
        self._gates_of = self._teacher_clock = None
        self._used_teacher = self._find_teacher()
        if self.validation_data is not None:
            self._prepare()
        with self._writer.as_default(step=0):
            write_layout()
            self._write_hparams()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._rows_trained = None
        self._clock.begin()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._clock.tick(batch)

    def on_test_begin(self, logs: Any = None) -> None:
        self._note_rows()  # validation counts anew

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._writer is None:
            return
        self._note_rows()
        with self._writer.as_default(step=epoch):
            for name, value in self._settings().items():
                tf.summary.scalar(name, value)
            for name, value in (logs or {}).items():
                _write_log(name, value)
            if self._clock.steps:
                tf.summary.scalar("steps_per_second", 1 / self._clock.seconds)
                if self._teacher_clock is not None:
                    tf.summary.scalar("teacher_time_share", self._teacher_share())
            if self._gates_of is not None:
                self._write_gates()
            if self._views:
                found = self._collect(self._logits_of)
                for view, values in zip(self._views, found, strict=True):
                    view.write(values, self.bins)
            if self.attention is not None:
                self._write_attention()
        self._writer.flush()

    def on_train_end(self, logs: Any = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # -- where and with whom --------------------------------------------------------

    def _folder(self) -> str:
        if self.log_dir is not None:
            parts = [trial.trial_id for trial in self._trials()]
            return os.path.join(os.fspath(self.log_dir), *parts)
        for callback in self._companions:
            if type(callback).__name__ == "TensorBoard":
                return str(callback.log_dir)
        raise ValueError(
            "DistillationBoard has no folder: give `log_dir`, or add "
            "keras.callbacks.TensorBoard to the callbacks."
        )

    def _trials(self) -> list[Any]:
        """The trial of keras-tuner that this run is, if it is one."""
        return [c.trial for c in self._companions if hasattr(c, "trial")]

    def _find_teacher(self) -> Any:
        """The teacher that is shown, or None."""
        model = self.model
        if self.validation_data is None or not hasattr(model, "teacher"):
            if self.teacher is not None or self.attention is not None:
                raise ValueError(
                    f"`teacher` and `attention` need a distiller with a teacher. "
                    f"Received: {type(model).__name__}"
                )
            return None
        teacher = self.teacher or model.teacher
        if isinstance(teacher, Cache):
            raise ValueError(
                "The distiller's teacher is a cache, which knows nothing of the "
                "validation data: give DistillationBoard(teacher=...) the live one."
            )
        return teacher

    def _asked_at(self) -> Any:
        model, teacher = self.model, self._used_teacher
        return model._teacher_temperature if teacher.one_temperature else 1.0

    # -- the validation data --------------------------------------------------------

    def _prepare(self) -> None:
        model = self.model
        x, y = next(iter(self._batches()), (None, None))
        if x is None:
            raise ValueError("`validation_data` has no rows.")
        shown = self._used_teacher if compares_logits(model) else None
        self._views = views_of(model, shown)

        def logits_of(x: Any) -> Any:
            outputs = model.run_student(x, False)
            found = [view.of_student(outputs) for view in self._views]
            if shown is not None:
                known = shown(x, [], self._asked_at())[0]
                for view, values in zip(self._views, found, strict=True):
                    values |= view.of_teacher(known)
            return found

        self._logits_of = self._graph(logits_of)
        # What does not fit fails now, and not after the first epoch.
        self._logits_of(x)
        self.model._read(y, None, False)
        if hasattr(model, "gate_weights"):
            self._gates_of = self._graph(model.gate_weights)
        if self._teacher_runs() and not several_workers(model.distribute_strategy):
            run = self._graph(self._teacher_pass, jit_compile=bool(model.jit_compile))
            self._teacher_clock = TeacherClock(run, x)
        if self.baseline is not None:
            self._measure(self.baseline)
        if self.attention is not None:
            self._prepare_attention(*self.attention)

    def _graph(self, function: Any, **options: Any) -> Any:
        return function if self.model.run_eagerly else tf.function(function, **options)

    def _batches(self) -> Any:
        """Batches of `(x, y)` with at most `rows` rows."""
        data = self.validation_data
        if not isinstance(data, tf.data.Dataset):
            data = tf.data.Dataset.from_tensor_slices(data).batch(self.batch_size)
        left = self.rows
        for element in data:
            parts = element if isinstance(element, tuple) else (element,)
            part = keras.tree.map_structure(lambda leaf, n=left: leaf[:n], parts[:2])
            yield part[0], part[1] if len(part) > 1 else None
            left -= int(tf.shape(keras.tree.flatten(part)[0])[0])
            if left <= 0:
                return

    def _collect(self, logits_of: Any) -> list[dict[str, np.ndarray]]:
        """For each view: the positions that count, over all rows."""
        collected: list[list[dict[str, np.ndarray]]] = [[] for _ in self._views]
        for x, y in self._batches():
            labels = self.model._read(y, None, False)[0]
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

    def _measure(self, baseline: keras.Model) -> None:
        found = self._collect(
            lambda x: [v.of_student(baseline(x)) for v in self._views]
        )
        for view, values in zip(self._views, found, strict=True):
            if "labels" not in values:
                raise ValueError("`baseline` needs labels in `validation_data`.")
            view.first = class_accuracies(values["student"], values["labels"])

    def _prepare_attention(self, student: Any, teacher: Any) -> None:
        self._paths = (
            paths_of(self.model.student, student, "attention"),
            self._used_teacher.resolve(teacher),
        )
        x = next(iter(self._batches()))[0]
        count = self.images
        self._shown = keras.tree.map_structure(lambda leaf: leaf[:count], x)
        for features in self._attended():
            if len(features.shape) != 4:
                raise ValueError(
                    "`attention` needs layers with outputs (B, H, W, C). Received: "
                    f"{self.attention}, one of which gives {tuple(features.shape)}"
                )

    def _attended(self) -> tuple[Any, Any]:
        own, other = self._paths
        x = self._shown
        student = self.model.run_student(x, False, [own])[1][own]
        teacher = self._used_teacher(x, [other], self._asked_at())[1][other]
        return student, teacher

    # -- time -----------------------------------------------------------------------

    def _teacher_runs(self) -> bool:
        """Whether the teacher that is shown is the one that training runs."""
        teacher = self._used_teacher
        return teacher is not None and teacher is self.model.teacher

    def _teacher_pass(self, x: Any) -> Any:
        return self._used_teacher(x, self.model._teacher_taps, self._asked_at())

    def _note_rows(self) -> None:
        if self._teacher_clock is not None and self._rows_trained is None:
            self._rows_trained = number(self.model._loss_tracker.count)

    def _teacher_share(self) -> float:
        """The teacher's part of the time of a step, between 0 and 1."""
        model = self.model
        terms = model.teacher_terms
        if not terms or not bool(model.term_active(terms[0])):
            return 0.0
        replicas = model.distribute_strategy.num_replicas_in_sync
        rows = round((self._rows_trained or 0) / self._clock.steps / replicas)
        assert self._teacher_clock is not None
        seconds = self._teacher_clock.seconds(max(rows, 1))
        return min(seconds / self._clock.seconds, 1.0)

    # -- writing --------------------------------------------------------------------

    def _settings(self) -> dict[str, float]:
        """Everything that schedules may change."""
        model = self.model
        names = {"hard": "alpha", "soft": "beta"}
        settings = {
            names.get(term, f"weight/{term}"): number(weight)
            for term, weight in model.term_weights.items()
        }
        temperature = getattr(model, "temperature", None)
        if temperature is not None:
            settings["temperature"] = number(temperature)
        settings["learning_rate"] = number(model.optimizer.learning_rate)
        return settings

    def _write_hparams(self) -> None:
        from tensorboard.plugins.hparams import api

        # keras-tuner writes a trial's own.
        if any(isinstance(c, api.KerasCallback) for c in self._companions):
            return
        values = self._settings() | {"optimizer": type(self.model.optimizer).__name__}
        for trial in self._trials():
            values |= trial.hyperparameters.values
        api.hparams(values | self.hparams)

    def _write_gates(self) -> None:
        weights = np.concatenate(
            [np.asarray(self._gates_of(x)) for x, _ in self._batches()]
        )
        for index, values in enumerate(weights.T):
            tf.summary.histogram(f"gates/branch_{index}", values)

    def _write_attention(self) -> None:
        student, teacher = (np.asarray(f, "float32") for f in self._attended())
        x = self._shown
        seen = tf.is_tensor(x) and len(x.shape) == 4 and x.shape[-1] in (1, 3)
        image = attention_figure(np.asarray(x) if seen else None, student, teacher)
        tf.summary.image("attention", image)


def _check_folder(path: str | os.PathLike[str]) -> None:
    """Raises ValueError where a folder cannot be made, and leaves no trace.

    keras-tuner would take an error in training for a failed trial, and try the next.
    """
    found = os.path.abspath(path)
    while not os.path.exists(found):
        found = os.path.dirname(found)
    if not os.path.isdir(found) or not os.access(found, os.W_OK | os.X_OK):
        raise ValueError(
            f"`log_dir` cannot be written: {found!r} is not a folder, or it may not be "
            f"written to. Received: {os.fspath(path)!r}"
        )


def _positions(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """Positions that count, in one row each."""
    arrays = {name: np.asarray(value) for name, value in found.items()}
    valid = arrays.pop("valid").astype(bool)
    return {name: value[valid] for name, value in arrays.items()}


def _write_log(name: str, value: Any) -> None:
    """Logs that belong together get one chart; results are there for HParams."""
    if name.startswith("val_"):
        tf.summary.scalar(f"result/{name}", value)
    elif name.endswith("_gradient_share"):
        term = name.removesuffix("_gradient_share")
        tf.summary.scalar(f"gradient_share/{term}", value)
    elif name.startswith("gate_"):
        tf.summary.scalar(f"gate/{name}", value)
    elif _BRANCH.fullmatch(name):
        tf.summary.scalar(f"branch/{name}", value)
