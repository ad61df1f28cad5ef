"""Which rows a teacher should teach: keep or drop, by confidence or by graph cut."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import numpy as np
import tensorflow as tf

from keras_distill.inputs import plain_inputs
from keras_distill.tables import text_table
from keras_distill.teachers.base import Teacher
from keras_distill.teachers.cut import keep_or_drop
from keras_distill.teachers.ensemble import as_teacher
from keras_distill.teachers.reading import (
    NO_LABEL,
    Reading,
    dataset_of,
    in_batches,
    is_batched,
    reader,
)
from keras_distill.teachers.store.rows import as_tuple, content_keys, inputs_of

METHODS = ("graph", "confidence", "agreement")
NEIGHBOURS = 8
SMOOTHNESS = 0.5
PICTURES = 40


def select_transfer_set(
    teacher: Any,
    data: Any,
    *,
    method: str = "graph",
    embedding: Any = None,
    threshold: float | None = None,
) -> Selection:
    r"""Decides for each row whether the teacher should teach it.

    What a teacher says of a row that it does not understand may do more harm than good.
    Each method gives each row a cost, and keeps rows that cost little:

    * `"confidence"`: the cost is `1 - max p`; kept are rows to whose likeliest class
      the teacher gives at least the probability `threshold` (default 0.9).
    * `"agreement"`: the cost is `1 - p[label]`; kept are rows whose label is the
      teacher's likeliest class, or with a `threshold` those to whose label it gives at
      least that probability. Every row needs a label.
    * `"graph"`: kept is the set `s` (1 to keep, 0 to drop) with the lowest energy

      ```
      E(s) = Σ_i [s_i c_i + (1 - s_i) threshold] + Σ_ij w_ij |s_i - s_j|
      ```

      The cost `c_i` is the distance of row i's embedding to the centre of its class, in
      units of the class's median distance, plus the share of its 8 nearest rows that
      are of another class. The sum over pairs runs over nearest rows of the same
      class, at distance `d`, with `w = 0.5 / 8 · exp(-d² / mean d²)`: neighbours
      should agree. A row's class is its label, or the teacher's likeliest class where
      it has none; embeddings are taken around their mean, with length 1. The
      minimum is exact: a minimum cut. A typical row costs 1; what it costs to drop one
      is `threshold` (default 2).

    The energy has the form of the paper's (distance to the centre of the class, pairs,
    a graph cut); the paper's own terms are for faces of many persons.

    Args:
        teacher: Any teacher with one output of class scores `(B, C)`.
        data: `x` or `(x, y)` as arrays, or a `tf.data.Dataset` of `x`, `(x,)`,
            `(x, y)` or `(x, y, weight)`, single rows or batches, in any order but not
            augmented. Labels are integers, below 0 for none, or one-hot rows.
        method: `"graph"`, `"confidence"` or `"agreement"`.
        embedding: For `"graph"`, the teacher's layer to read: a path or a layer
            (features on a grid are averaged over it). By default the logits serve.
        threshold: See above.

    Returns:
        A `Selection`: `.keep`, `.filter(dataset)`, `.report(path)`.

    Raises:
        ValueError: If an argument is wrong or has no effect, labels are missing where
            they are needed, `data` is empty, or no row is kept.

    Example:

    >>> import keras, numpy as np
    >>> teacher = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> teacher.set_weights([np.eye(2), np.zeros(2)])
    >>> x = np.array([[5.0, 0.0], [0.1, 0.0], [0.0, 5.0]], "float32")
    >>> chosen = select_transfer_set(teacher, x, method="confidence", threshold=0.8)
    >>> chosen.keep.tolist()
    [True, False, True]

    References:
        Ge, Zhao, Li, Li, Low-resolution Face Recognition in the Wild via Selective
        Knowledge Distillation, TIP 2019 (arXiv 1811.09998).
    """
    teacher = as_teacher(teacher)
    threshold = _checked(method, embedding, threshold)
    dataset = dataset_of(data)
    path = None if embedding is None else _one_path(teacher, embedding)
    reading = reader(teacher, dataset, path)(1.0)
    if reading.logits.ndim != 2:
        raise ValueError(
            "`teacher` must give one row of class scores per row of data. Received "
            f"outputs of shape {('N', *reading.logits.shape[1:])}."
        )
    probabilities = _softmax(reading.logits)
    if method == "graph":
        cost, keep = _by_graph(reading, threshold)
    elif method == "confidence":
        highest = probabilities.max(-1)
        cost, keep = 1 - highest, highest >= threshold
    else:
        cost, keep = _by_agreement(reading.labels, probabilities, threshold)
    # Rows with the same inputs cannot be told apart later: one verdict for all.
    _, same = np.unique(reading.keys, return_inverse=True)
    keep = (np.bincount(same, keep) > 0)[same]
    if not keep.any():
        raise ValueError(
            f"The transfer set has no rows left: method={method!r} with threshold="
            f"{threshold} drops all {len(keep)} rows, whose costs go from "
            f"{cost.min():.3g} to {cost.max():.3g}."
        )
    return Selection(
        keep=keep,
        cost=cost,
        labels=reading.labels,
        predicted=probabilities.argmax(-1),
        confidence=probabilities.max(-1),
        method=method,
        _keys=reading.keys,
        _data=dataset,
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Which rows of a data set were kept. One entry per row, in the order read.

    Attributes:
        keep: bool `(N,)`.
        cost: What it costs to keep the row, float `(N,)`: see `select_transfer_set`.
        labels: Integers `(N,)`, -1 for none.
        predicted: The teacher's likeliest class, integers `(N,)`.
        confidence: Its probability, float `(N,)`.
        method: How it was decided.
    """

    keep: np.ndarray
    cost: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    method: str
    _keys: np.ndarray
    _data: tf.data.Dataset

    def filter(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The rows of a data set that were kept.

        Rows are recognised by their inputs, so that they may come in any order, only
        some of them, or repeatedly; filter before augmentation.

        Args:
            dataset: Single rows, or batches. Batches lose their dropped rows, and are
                left out when nothing remains: `.rebatch(size)` fills them up again.

        Returns:
            A `tf.data.Dataset` with elements of the same kind. A row that was not
            among the data of the selection is a `tf.errors.OpError` when it is read.
        """
        return self._part(dataset, self.keep)

    def _part(self, dataset: tf.data.Dataset, wanted: np.ndarray) -> tf.data.Dataset:
        if not isinstance(dataset, tf.data.Dataset):
            raise TypeError(
                f"`dataset` must be a tf.data.Dataset. Received: {type(dataset)}"
            )
        keys, first = np.unique(self._keys, return_index=True)
        known, verdicts_of = tf.constant(keys), tf.constant(wanted[first])
        in_tuples = isinstance(dataset.element_spec, tuple)

        def element_of(arguments: tuple[Any, ...]) -> Any:
            return arguments if in_tuples else arguments[0]

        def verdicts(element: Any) -> Any:
            found = content_keys(plain_inputs(inputs_of(*as_tuple(element))))
            place = tf.minimum(tf.searchsorted(known, found), len(keys) - 1)
            check = tf.debugging.assert_equal(
                tf.gather(known, place),
                found,
                "A row was not among the data of `select_transfer_set`: `x` must be as "
                "it was there (same values, dtypes and keys, not augmented).",
            )
            with tf.control_dependencies([check]):
                return tf.gather(verdicts_of, place)

        if not is_batched(dataset):

            def is_wanted(*arguments: Any) -> Any:
                one = tf.nest.map_structure(lambda leaf: leaf[None], arguments)
                return verdicts(element_of(one))[0]

            return dataset.filter(is_wanted)

        def rest(*arguments: Any) -> Any:
            mask = verdicts(element_of(arguments))
            return tf.nest.map_structure(
                lambda leaf: tf.boolean_mask(leaf, mask), element_of(arguments)
            )

        def is_there(*element: Any) -> Any:
            return tf.shape(tf.nest.flatten(element)[0])[0] > 0

        return dataset.map(rest, tf.data.AUTOTUNE).filter(is_there)

    def report(self, path: str | os.PathLike[str] | None = None) -> str:
        """How many rows of each class were dropped, with pictures.

        Args:
            path: Of an image with the costs of all rows, and where the inputs are
                images `(H, W)`, `(H, W, 1)` or `(H, W, 3)`, the 40 dropped ones that
                cost most. Its ending says the format.

        Returns:
            A table in text: per class (the label, or the teacher's likeliest) the
            number of rows, of dropped ones, and how often the teacher chooses the label
            among kept and among dropped rows.

        Raises:
            ImportError: If `path` is given and matplotlib is not installed.
        """
        if path is not None:
            self._draw(path)
        groups = [(str(c), self._classes == c) for c in np.unique(self._classes)]
        rows = []
        for name, group in [*groups, ("all", np.ones(len(self.keep), bool))]:
            kept, dropped = group & self.keep, group & ~self.keep
            rows.append(
                [
                    name,
                    str(group.sum()),
                    f"{dropped.sum()} ({100 * dropped.sum() / group.sum():.1f} %)",
                    self._as_label(kept),
                    self._as_label(dropped),
                ]
            )
        header = ["class", "rows", "dropped", "as label, kept", "as label, dropped"]
        return text_table(header, rows)

    def __repr__(self) -> str:
        return (
            f"Selection({self.method!r}, {self.keep.sum()} of {len(self.keep)} rows "
            "kept)"
        )

    @property
    def _classes(self) -> np.ndarray:
        return np.where(self.labels == NO_LABEL, self.predicted, self.labels)

    def _as_label(self, rows: np.ndarray) -> str:
        """How often the teacher chooses the label, among rows that have one."""
        known = rows & (self.labels != NO_LABEL)
        if not known.any():
            return "-"
        return f"{100 * np.mean((self.predicted == self.labels)[known]):.1f} %"

    def _draw(self, path: str | os.PathLike[str]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        dropped = np.flatnonzero(~self.keep)
        worst = dropped[np.argsort(-self.cost[dropped], kind="stable")][:PICTURES]
        pictures = self._pictures(worst)
        lines = math.ceil(len(pictures) / 10)
        figure = Figure(figsize=(10, 3 + 1.3 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1 + lines, 10, height_ratios=[2.2] + [1] * lines)
        axes = figure.add_subplot(grid[0, :])
        parts = [self.cost[self.keep], self.cost[~self.keep]]
        names = [f"kept ({len(parts[0])})", f"dropped ({len(parts[1])})"]
        bins = np.histogram_bin_edges(self.cost, 50).tolist()
        for values, name, color in zip(parts, names, ["C0", "C3"], strict=True):
            axes.hist(values, bins, alpha=0.6, label=name, color=color)
        axes.set(yscale="log", xlabel="cost of keeping the row", ylabel="rows")
        axes.set_title(f"Transfer set by {self.method}")
        axes.legend()
        for place, (row, picture) in enumerate(pictures.items()):
            axes = figure.add_subplot(grid[1 + place // 10, place % 10])
            axes.imshow(picture, cmap="gray")
            axes.set_axis_off()
            label = self.labels[row]
            label = "no label" if label == NO_LABEL else f"label {label}"
            said = f"{self.predicted[row]} ({self.confidence[row]:.2f})"
            axes.set_title(f"{label}\nteacher {said}", fontsize=7)
        figure.savefig(path, dpi=100)

    def _pictures(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Some rows' inputs, scaled to [0, 1]; empty if they are not images."""
        x = plain_inputs(inputs_of(*as_tuple(self._data.element_spec)))
        shape: tuple[int | None, ...] = ()
        if isinstance(x, tf.TensorSpec):
            shape = tuple(x.shape)[1 if is_batched(self._data) else 0 :]
        if len(shape) == 3 and shape[-1] in (1, 3):
            shape = shape[:2]
        if len(shape) != 2 or not len(rows):
            return {}
        wanted = np.isin(self._keys, self._keys[rows])
        found: dict[int, np.ndarray] = {}
        for element in in_batches(self._part(self._data, wanted)):
            x = plain_inputs(inputs_of(*as_tuple(element)))
            found |= zip(content_keys(x).numpy().tolist(), x.numpy(), strict=True)
        pictures = {row: found[int(self._keys[row])] for row in rows}
        return {row: _to_unit(picture) for row, picture in pictures.items()}


def _to_unit(picture: np.ndarray) -> np.ndarray:
    picture = picture.astype("float32")
    low, high = picture.min(), picture.max()
    picture = (picture - low) / max(high - low, 1e-12)
    return picture[..., 0] if picture.shape[-1:] == (1,) else picture


def _checked(method: str, embedding: Any, threshold: float | None) -> float | None:
    """The threshold, with the method's default."""
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}. Received: {method!r}")
    if embedding is not None and method != "graph":
        raise ValueError(
            f"`embedding` has no effect with method={method!r}: only 'graph' uses it."
        )
    if threshold is None:
        return {"graph": 2.0, "confidence": 0.9}.get(method)
    if method == "graph":
        if not 0 < threshold < math.inf:
            raise ValueError(
                f"`threshold` must be finite and above 0. Received: {threshold}"
            )
    elif not 0 < threshold <= 1:
        raise ValueError(
            f"`threshold` is a probability, above 0 and at most 1. Received: "
            f"{threshold}"
        )
    return float(threshold)


def _one_path(teacher: Teacher, embedding: Any) -> str:
    path = teacher.resolve(embedding)
    if not isinstance(path, str):
        raise ValueError(f"`embedding` must be one layer. Received: {embedding!r}")
    return path


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype("float64") - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _by_agreement(
    labels: np.ndarray, probabilities: np.ndarray, threshold: float | None
) -> tuple[np.ndarray, np.ndarray]:
    classes = probabilities.shape[-1]
    if (labels == NO_LABEL).any():
        raise ValueError(
            f"method='agreement' needs a label for every row: {np.sum(labels < 0)} of "
            f"{len(labels)} rows have none. Use 'confidence' or 'graph'."
        )
    if labels.max() >= classes:
        raise ValueError(
            f"Labels go up to {labels.max()}, but the teacher has {classes} classes."
        )
    own = np.take_along_axis(probabilities, labels[:, None], -1)[:, 0]
    if threshold is None:
        return 1 - own, probabilities.argmax(-1) == labels
    return 1 - own, own >= threshold


def _by_graph(
    reading: Reading, threshold: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Costs, and the set of least energy."""
    assert threshold is not None
    likeliest = reading.logits.argmax(-1)
    classes = np.where(reading.labels == NO_LABEL, likeliest, reading.labels)
    rows = _directions(reading.features)
    distance = np.empty(len(rows))
    for number in np.unique(classes):
        own = classes == number
        apart = np.linalg.norm(rows[own] - rows[own].mean(0), axis=-1)
        distance[own] = apart / max(np.median(apart), 1e-6)
    neighbours = min(NEIGHBOURS, len(rows) - 1)
    if not neighbours:
        return distance, distance < threshold
    apart, near = _nearest(rows, neighbours)
    other = classes[near] != classes[:, None]
    cost = distance + other.mean(-1)
    first, place = np.nonzero(~other)
    squares = np.square(apart[first, place])
    weights = np.exp(-squares / max(np.square(apart).mean(), 1e-12))
    edges = np.stack([first, near[first, place]], -1)
    keep = keep_or_drop(cost - threshold, edges, SMOOTHNESS / neighbours * weights)
    return cost, keep


def _directions(features: np.ndarray) -> np.ndarray:
    """Embeddings of length 1, around their common mean."""
    rows = features.astype("float64") - features.mean(0, dtype="float64")
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _nearest(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and places of the nearest other rows."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=count).fit(rows.astype("float32")).kneighbors()
