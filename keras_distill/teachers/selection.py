"""Which rows a teacher should teach: keep or drop, by confidence or by graph cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from keras_distill.teachers.base import Teacher
from keras_distill.teachers.cut import keep_or_drop
from keras_distill.teachers.ensemble import as_teacher
from keras_distill.teachers.reading import NO_LABEL, Reading, dataset_of, reader
from keras_distill.teachers.transfer import Selection

METHODS = ("graph", "confidence", "agreement")
NEIGHBOURS = 8
SMOOTHNESS = 0.5


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
