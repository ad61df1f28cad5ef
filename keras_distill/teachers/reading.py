"""What a teacher says of a whole data set, in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_distill.heads import Head
from keras_distill.inputs import plain_inputs, rows_of
from keras_distill.teachers.base import Teacher
from keras_distill.teachers.store.rows import as_tuple, content_keys
from keras_distill.weighting import full

BATCH = 128
NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class Reading:
    """One entry per row of the data.

    Attributes:
        logits: Float32 `(N, ..., C)`.
        valid: Booleans `(N, ...)`, false at positions that the outputs' mask hides.
        features: Float32 `(N, D)`, the mean over valid positions of what was read at
            the embedding; without one the logits, around their mean in each row.
        labels: Integers `(N,)`, -1 where there is none or none was asked for.
        keys: int64 `(N,)`, a hash of the inputs.
    """

    logits: np.ndarray
    valid: np.ndarray
    features: np.ndarray
    labels: np.ndarray
    keys: np.ndarray


def dataset_of(data: Any) -> tf.data.Dataset:
    """Arrays `x` or `(x, y)` as a data set of batches; a data set as it is.

    Raises:
        ValueError: If there is no row.
    """
    ready = isinstance(data, tf.data.Dataset)
    dataset = data if ready else rows_of(data).batch(BATCH)
    if dataset.cardinality() == 0:
        raise ValueError("`data` has no rows.")
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError("`data` must end. Received a data set that repeats for ever.")
    return dataset


def is_batched(dataset: tf.data.Dataset) -> bool:
    """Whether elements are batches: all their tensors have the same first axis."""
    shapes = [spec.shape for spec in _tensors(dataset.element_spec)]
    if not all(shape.rank for shape in shapes):
        return False
    first = {shape[0] for shape in shapes}
    return first == {None} or (len(first) == 1 and len(shapes) > 1)


def in_batches(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The data in batches, whether or not they came so."""
    return dataset if is_batched(dataset) else dataset.batch(BATCH)


def _tensors(spec: Any) -> list[Any]:
    return [leaf for leaf in tf.nest.flatten(spec) if hasattr(leaf, "shape")]


def class_head(teacher: Teacher) -> Head:
    """The head of a teacher with one output of class scores.

    Raises:
        ValueError: If it has several outputs.
    """
    heads = teacher.heads()
    if len(heads) != 1:
        raise ValueError(
            "`teacher` must have one output of class scores. Received one with the "
            f"outputs {[head.name for head in heads]}."
        )
    return heads[0]


def reader(
    teacher: Teacher,
    dataset: tf.data.Dataset,
    embedding: str | None = None,
    *,
    labels: bool = True,
) -> Callable[[float], Reading]:
    """A function that runs the teacher once over the data.

    Args:
        teacher: With one output.
        dataset: Rows or batches.
        embedding: Path of the features to read.
        labels: Whether labels are read, which must be one per row then.

    Returns:
        A function of the temperature at which the outputs will be used. It raises
        ValueError if there is no row, or outputs or features are not finite.
    """
    head = class_head(teacher)
    taps = [] if embedding is None else [embedding]

    @tf.function(reduce_retracing=True, autograph=False)
    def run(x: Any, temperature: Any) -> tuple[Any, ...]:
        outputs, found = teacher(x, taps, temperature)
        output = keras.tree.flatten(outputs)[0]
        logits = ops.cast(head.logits(output), "float32")
        features = logits - ops.mean(logits, -1, keepdims=True)
        if taps:
            features = _mean_over_positions(found[taps[0]])
        keys = content_keys(plain_inputs(x))
        return logits, _valid(output) > 0, features, keys

    def read(temperature: float) -> Reading:
        teacher.check_temperature(temperature)
        parts: list[tuple[np.ndarray, ...]] = []
        for element in in_batches(dataset):
            x, *rest = as_tuple(element)
            values = run(x, tf.constant(temperature, "float32"))
            *found, keys = (np.asarray(value) for value in values)
            own = _labels(rest if labels else [], len(keys))
            parts.append((*found, own, keys))
        if not parts:
            raise ValueError("`data` has no rows.")
        reading = Reading(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        for name in ("logits", "features"):
            if not np.isfinite(getattr(reading, name)).all():
                raise ValueError(f"The teacher's {name} are not finite on some rows.")
        return reading

    return read


def _valid(tensor: Any) -> Any:
    """Float32 of the tensor's shape without the last axis: 1, and 0 under its mask."""
    ones = ops.ones_like(tensor[..., 0], dtype="float32")
    mask = getattr(tensor, "_keras_mask", None)
    return ones if mask is None else full(ops.cast(mask, "float32"), ones)


def _mean_over_positions(features: Any) -> Any:
    axes = tuple(range(1, len(features.shape) - 1))
    weights = _valid(features)[..., None]
    total = ops.sum(ops.cast(features, "float32") * weights, axes)
    return ops.divide_no_nan(total, ops.sum(weights, axes))


def _labels(rest: list[Any], rows: int) -> np.ndarray:
    """Class numbers from integer or one-hot labels, -1 for none."""
    if not rest or rest[0] is None:
        return np.full(rows, NO_LABEL)
    if not hasattr(rest[0], "shape"):
        raise ValueError("Labels must be one tensor: integers, or one-hot rows.")
    y = np.asarray(rest[0])
    if y.ndim == 2 and y.shape[1] > 1:
        return np.where(y.any(-1), y.argmax(-1), NO_LABEL)
    if y.ndim > 2 or (y.ndim == 2 and y.shape[1] != 1):
        raise ValueError(f"Labels must be one per row. Received shape: {y.shape}")
    return np.maximum(y.reshape(-1).astype("int64"), NO_LABEL)
