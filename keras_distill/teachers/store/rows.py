"""Rows: how a data set holds them, and how one is recognised."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

# Rows are looked up together: as many as fit, up to a limit.
CHUNK_ROWS, CHUNK_BYTES = 128, 8 << 20


def inputs_of(*element: Any) -> Any:
    """The `x` of a data set's element `x`, `(x,)`, `(x, y)` or `(x, y, weight)`."""
    return element[0]


def content_keys(x: Any) -> tf.Tensor:
    """A 64-bit hash of the bytes of each row, over all leaves of `x`.

    Args:
        x: Any structure of tensors whose first axis is the batch.

    Returns:
        int64 of shape `(B,)`. The hash (Farmhash) is the same on all machines.
    """
    leaves = [tf.fingerprint(_flat(leaf)) for leaf in tf.nest.flatten(x)]
    joined = tf.concat(leaves, 1)
    return tf.bitcast(tf.fingerprint(joined), tf.int64)


def _flat(leaf: tf.Tensor) -> tf.Tensor:
    return tf.reshape(leaf, (tf.shape(leaf)[0], -1))


def row_key(x: Any) -> tf.Tensor:
    """The hash of a single row, an int64 scalar."""
    return content_keys(tf.nest.map_structure(lambda leaf: leaf[None], x))[0]


def as_tuple(element: Any) -> tuple[Any, ...]:
    """An element as the tuple that it may stand for."""
    return element if isinstance(element, tuple) else (element,)


def chunk_of(dataset: tf.data.Dataset) -> int:
    """How many rows can be looked up together."""
    specs = tf.nest.flatten(dataset.element_spec)
    shapes = [getattr(spec, "shape", tf.TensorShape([])) for spec in specs]
    if not all(shape.is_fully_defined() for shape in shapes):
        return 1
    sizes = [
        s.shape.num_elements() * s.dtype.size for s in specs if hasattr(s, "dtype")
    ]
    return max(min(CHUNK_ROWS, CHUNK_BYTES // max(sum(sizes), 1)), 1)


def check_dataset(dataset: Any) -> None:
    """Raises TypeError unless this is a data set."""
    if not isinstance(dataset, tf.data.Dataset):
        raise TypeError(
            "`dataset` must be a tf.data.Dataset of single rows. For arrays: "
            "tf.data.Dataset.from_tensor_slices((x, y)). Received: "
            f"{type(dataset).__name__}"
        )


def row_spec(structure: Any) -> list[list[Any]]:
    """Names, shapes and dtypes of the leaves, as JSON."""
    return [
        ["/".join(map(str, path)), spec.shape.as_list(), spec.dtype.name]
        for path, spec in keras.tree.flatten_with_path(structure)
    ]


def check_rows(dataset: tf.data.Dataset, expected: list[list[Any]]) -> None:
    """Raises ValueError unless the rows are of the kind that a cache holds."""
    x = inputs_of(*as_tuple(dataset.element_spec))
    if isinstance(x, dict) and "kd_teacher" in x:
        raise ValueError("`dataset` holds a teacher's knowledge already.")
    found = row_spec(x)
    if len(found) != len(expected) or not all(map(_fits, found, expected)):
        raise ValueError(
            f"`dataset` must hold single rows like those of the cache: {expected}. "
            f"Received: {found}. Attach before `batch` and before augmentation."
        )


def _fits(here: list[Any], there: list[Any]) -> bool:
    (name, shape, dtype), (other_name, other_shape, other_dtype) = here, there
    return (
        (name, dtype) == (other_name, other_dtype)
        and len(shape) == len(other_shape)
        and all(
            a == b or None in (a, b) for a, b in zip(shape, other_shape, strict=True)
        )
    )
