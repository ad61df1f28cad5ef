"""Attaching: stored knowledge beside the inputs, inside the `tf.data` pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_distill.data import current_epoch
from keras_distill.teachers.store.lookup import Lookup
from keras_distill.teachers.store.rows import (
    as_tuple,
    chunk_of,
    content_keys,
    inputs_of,
    row_key,
)
from keras_distill.teachers.store.views import OTHER_AUGMENT, view_of


def attached(
    lookup: Lookup, dataset: tf.data.Dataset, augment: Any, name: str
) -> tf.data.Dataset:
    """The rows with `{"inputs": x, "kd_teacher": {name: leaves}}` for `x`.

    Args:
        lookup: Into the cache.
        dataset: Single rows.
        augment: The function that shows a view again, if the cache has views.
        name: Tells the knowledge of one cache from another's.
    """
    parallel = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": True}
    numbered = dataset.enumerate().batch(chunk_of(dataset))
    found = numbered.map(_with_knowledge(lookup, name), **parallel).unbatch()
    if augment is not None:
        found = found.map(_replayed(augment, name), **parallel)
    size = dataset.cardinality()
    if size == tf.data.UNKNOWN_CARDINALITY:
        return found
    return found.apply(tf.data.experimental.assert_cardinality(size))


def check_first(lookup: Lookup, dataset: tf.data.Dataset) -> None:
    """Raises ValueError if the cache was built from other data."""
    rows = dataset.take(1).map(lambda *element: row_key(inputs_of(*element)))
    for key in rows:
        zero = np.zeros(1, "int64")
        lookup.read(key.numpy()[None], zero, zero)


def check_replay(lookup: Lookup, dataset: tf.data.Dataset, augment: Any) -> None:
    """Replays one stored view, and raises ValueError if it has another hash."""

    def first(position: Any, element: Any) -> Any:
        x = inputs_of(*as_tuple(element))
        return row_key(x), position, x

    one = dataset.enumerate().take(1).map(first)
    found = next(iter(one), None)
    if found is None:
        return
    key, position = (value.numpy()[None] for value in found[:2])
    seed, view = lookup.first_view(key, position)
    replayed = one.map(lambda key, position, x: row_key(augment(x, tf.constant(seed))))
    if next(iter(replayed)).numpy() != view:
        raise ValueError(OTHER_AUGMENT)


def _with_knowledge(lookup: Lookup, name: str) -> Any:
    """A function of `Dataset.map` that reads what the cache says of a chunk."""
    leaves = lookup.leaves

    def read(keys: np.ndarray, positions: np.ndarray, epoch: int) -> list[Any]:
        found = lookup.read(keys, positions, view_of(keys, epoch, lookup.views))
        return [found[leaf] for leaf in leaves]

    @tf.autograph.experimental.do_not_convert
    def join(positions: Any, element: Any) -> Any:
        x, *rest = as_tuple(element)
        # Without views the data must not depend on the epoch.
        epoch = current_epoch() if lookup.views > 1 else tf.constant(0, tf.int64)
        values = tf.numpy_function(
            read,
            [content_keys(x), positions, epoch],
            [tf.as_dtype(dtype) for _, dtype in leaves.values()],
            stateful=False,
        )
        known = {
            leaf: tf.ensure_shape(value, (None, *shape))
            for (leaf, (shape, _)), value in zip(leaves.items(), values, strict=True)
        }
        return ({"inputs": x, "kd_teacher": {name: known}}, *rest)

    return join


def _replayed(augment: Any, name: str) -> Any:
    """A function of `Dataset.map` that shows the view of which the cache knows."""

    def replay(x: Any, *rest: Any) -> Any:
        leaves = dict(x["kd_teacher"][name])
        inputs = augment(x["inputs"], leaves.pop("seed"))
        return ({"inputs": inputs, "kd_teacher": {name: leaves}}, *rest)

    return replay
