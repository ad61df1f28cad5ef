"""What was gained: size, speed, accuracy and fidelity of models, side by side."""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_distill.files import whole, whole_folder

_HEADERS = (
    "model",
    "parameters",
    "file",
    "CPU per image",
    "accuracy",
    "agreement",
    "gap closed",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a comparison: a model, or the same model from several seeds.

    Attributes:
        name: The key in `models`.
        parameters: Number of weights, of one model.
        file_bytes: Size of its `.keras` file, without an optimizer.
        latency: Seconds for one image on the CPU, a batch of one, median.
        accuracy: Share of rows whose class is the label, mean over the seeds.
        accuracy_spread: Standard deviation over the seeds; None with one seed.
        agreement: Share of rows on which it chooses the teacher's class, mean over the
            seeds; None for the teacher.
        gap_closed: `(accuracy - student) / (teacher - student)`: 0 is the student
            trained alone, 1 the teacher. None for these two, and where the teacher
            is not better than the student.
    """

    name: str
    parameters: int
    file_bytes: int
    latency: float
    accuracy: float
    accuracy_spread: float | None
    agreement: float | None
    gap_closed: float | None

    def cells(self) -> tuple[str, ...]:
        """The line as text, one string per column."""
        spread = self.accuracy_spread
        return (
            self.name,
            f"{self.parameters:,}",
            _size(self.file_bytes),
            f"{self.latency * 1e3:.2f} ms",
            _percent(self.accuracy)
            + ("" if spread is None else f" ± {100 * spread:.1f}"),
            _percent(self.agreement),
            _percent(self.gap_closed, digits=0),
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`: `rows`, and two ways to print them.

    Attributes:
        rows: One `Row` per model, in the order given.
    """

    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> Row:
        return {row.name: row for row in self.rows}[name]

    def __str__(self) -> str:
        table = [_HEADERS, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(lines)

    def markdown(self) -> str:
        """The table in Markdown."""
        rule = ["---", *["---:"] * (len(_HEADERS) - 1)]
        table = [_HEADERS, rule, *(row.cells() for row in self.rows)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in table)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain dicts, ready for JSON."""
        return [dataclasses.asdict(row) for row in self.rows]


def compare(
    models: Mapping[str, Any],
    data: tuple[Any, Any],
    *,
    teacher: str | None = None,
    student: str | None = None,
    batch_size: int = 256,
    repeats: int = 50,
    verbose: bool = True,
) -> Comparison:
    """Compares classifiers on the same data.

    What is timed and weighed is what would be shipped: the model's `.keras` file,
    loaded on the CPU. The models take turns, so that a machine that is busy for a
    while slows all of them.

    Args:
        models: Name to model, or to a list of models, one per seed. Models have one
            output, class scores `(..., C)`: logits or probabilities. Of a distiller
            give `distiller.student`.
        data: `(x, y)` as arrays. Labels are integers `(...)` or one-hot `(..., C)`;
            rows whose integer label is below 0, or whose one-hot label is all zeros, do
            not count for the accuracy. Where there is a label for each position of a
            row, such positions are taken for padding, and count for nothing.
        teacher: Name of the teacher. Default: the first.
        student: Name of the student that was trained without a teacher. Default: the
            second.
        batch_size: For the predictions.
        repeats: How often each model is timed.
        verbose: Whether the table is printed.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: If there is no model, a name is unknown, teacher and student are the
            same, the number of teachers is neither 1 nor that of the other models, or
            an output does not hold scores for at least two classes.

    Example:

    >>> import keras, numpy as np
    >>> from keras_distill import report
    >>> def net(width):
    ...     return keras.Sequential([
    ...         keras.Input((4,)),
    ...         keras.layers.Dense(width),
    ...         keras.layers.Dense(3),
    ...     ])
    >>> data = np.random.rand(8, 4).astype("float32"), np.arange(8) % 3
    >>> models = {"teacher": net(64), "student": net(2)}
    >>> table = report.compare(models, data, repeats=2, verbose=False)
    >>> table["teacher"].parameters, table["student"].parameters
    (515, 19)
    """
    lists = {name: _as_list(name, given) for name, given in models.items()}
    teacher, student = _roles(list(lists), teacher, student)
    x, y = data
    # The `.keras` file is written and timed once per name: seeds share a structure.
    measured = _measure([copies[0] for copies in lists.values()], x, repeats)
    classes = {
        name: [_classes(name, model, x, batch_size) for model in copies]
        for name, copies in lists.items()
    }
    labels = _labels(y, classes[teacher][0].ndim)
    scores = {
        name: [float((labels == chosen)[labels >= 0].mean()) for chosen in copies]
        for name, copies in classes.items()
    }
    counts = labels >= 0 if labels.ndim > 1 else slice(None)
    classes = {name: [c[counts] for c in copies] for name, copies in classes.items()}
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    rows = []
    for (name, copies), (size, latency) in zip(lists.items(), measured, strict=True):
        rows.append(
            Row(
                name=name,
                parameters=copies[0].count_params(),
                file_bytes=size,
                latency=latency,
                accuracy=means[name],
                accuracy_spread=(
                    statistics.stdev(scores[name]) if len(copies) > 1 else None
                ),
                agreement=(
                    None
                    if name == teacher
                    else _agreement(name, classes[name], classes[teacher])
                ),
                gap_closed=_gap_closed(name, means, teacher, student),
            )
        )
    result = Comparison(tuple(rows))
    if verbose:
        print(result)
    return result


def export(model: Any, directory: str, name: str = "student") -> dict[str, str]:
    """Writes a model for shipping, as `.keras` and as TensorFlow SavedModel.

    Args:
        model: A built `keras.Model`; of a distiller give `distiller.student`.
        directory: Folder that gets `<name>.keras` and the folder `<name>`.
        name: As it says.

    Returns:
        The path of the file as `"keras"`, that of the folder as `"saved_model"`: the
        latter is what TensorFlow Serving and `tf.lite.TFLiteConverter` read. Both
        load without `keras_distill` unless the model holds a layer of this package.

    Raises:
        ValueError: If something that is no SavedModel is where the folder is to be.

    Example:

    >>> import keras, tempfile
    >>> from keras_distill import report
    >>> net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(report.export(net, folder))
    ['keras', 'saved_model']
    """
    os.makedirs(directory, exist_ok=True)
    folder = os.path.join(directory, name)
    file = f"{folder}.keras"
    known = os.path.join(folder, "saved_model.pb")
    if os.path.exists(folder) and not os.path.exists(known):
        raise ValueError(
            f"{folder!r} exists and is no SavedModel, so it is not replaced. Give "
            "another `directory` or `name`."
        )
    with whole(file) as temporary:
        model.save(temporary)
    with whole_folder(folder) as temporary:
        model.export(temporary, verbose=False)
    return {"keras": file, "saved_model": folder}


def _as_list(name: str, given: Any) -> list[Any]:
    copies = list(given) if isinstance(given, Sequence) else [given]
    if not copies:
        raise ValueError(f"`models[{name!r}]` is an empty list.")
    return copies


def _roles(
    names: list[str], teacher: str | None, student: str | None
) -> tuple[str, str | None]:
    if not names:
        raise ValueError("`models` is empty: there is nothing to compare.")
    for argument, name in (("teacher", teacher), ("student", student)):
        if name is not None and name not in names:
            raise ValueError(
                f"`{argument}` must be one of {', '.join(names)}. Received: {name!r}"
            )
    teacher = teacher or names[0]
    if teacher == student:
        raise ValueError(
            f"`teacher` and `student` must differ. Received: {teacher!r} for both"
        )
    others = [name for name in names if name != teacher]
    return teacher, student or (others[0] if others else None)


def _measure(models: Sequence[Any], x: Any, repeats: int) -> list[tuple[int, float]]:
    """Size of each model's file, and median seconds for one image."""
    sizes, loaded = [], []
    with tempfile.TemporaryDirectory() as folder, keras.device("cpu:0"):
        for i, model in enumerate(models):
            path = os.path.join(folder, f"{i}.keras")
            model.save(path)
            loaded.append(keras.saving.load_model(path, compile=False))
            loaded[-1].save(path)  # now without an optimizer
            sizes.append(os.path.getsize(path))
        image = keras.tree.map_structure(lambda leaf: np.asarray(leaf[:1]), x)
        for model in loaded:
            model.predict_on_batch(image)  # traces
        times: list[list[float]] = [[] for _ in loaded]
        for _ in range(repeats):
            for model, seconds in zip(loaded, times, strict=True):
                start = time.perf_counter()
                model.predict_on_batch(image)
                seconds.append(time.perf_counter() - start)
    return [
        (size, statistics.median(seconds))
        for size, seconds in zip(sizes, times, strict=True)
    ]


def _classes(name: str, model: Any, x: Any, batch_size: int) -> np.ndarray:
    outputs = model.predict(x, batch_size=batch_size, verbose=0)
    shape = getattr(outputs, "shape", None)
    if shape is None or len(shape) < 2 or shape[-1] < 2:
        raise ValueError(
            f"`models[{name!r}]` must have one output with scores for at least two "
            f"classes. Received: {shape or type(outputs).__name__}"
        )
    return outputs.argmax(-1)


def _labels(y: Any, rank: int) -> np.ndarray:
    """Integers of this rank, below 0 where there is no label."""
    labels = np.asarray(y)
    if labels.ndim > rank:
        one_hot = labels.shape[-1] != 1
        missing = one_hot & ~labels.any(-1)  # a row of zeros
        labels = labels.argmax(-1) if one_hot else labels[..., 0]
        labels = np.where(missing, -1, labels)
    return labels


def _agreement(
    name: str, chosen: Sequence[np.ndarray], teachers: Sequence[np.ndarray]
) -> float:
    if len(teachers) not in (1, len(chosen)):
        raise ValueError(
            "The number of teachers must be 1 or that of the other models. Received: "
            f"{len(teachers)} teachers, {len(chosen)} models for {name!r}"
        )
    if len(teachers) == 1:
        teachers = list(teachers) * len(chosen)
    return float(
        np.mean([np.mean(a == b) for a, b in zip(chosen, teachers, strict=True)])
    )


def _gap_closed(
    name: str, means: Mapping[str, float], teacher: str, student: str | None
) -> float | None:
    if student is None or name in (teacher, student):
        return None
    gap = means[teacher] - means[student]
    return (means[name] - means[student]) / gap if gap > 0 else None


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
