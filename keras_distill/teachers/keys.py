"""Keys: how a row is recognised, and what follows from that."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


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


def view_seeds(key: Any, views: int) -> tf.Tensor:
    """Seeds of a row's views, int32 of shape `(views, 2)`, a function of its key."""
    halves = tf.bitcast(tf.reshape(key, (1,)), tf.int32)[0]
    return tf.random.stateless_uniform((views, 2), halves, None, None, tf.int32)


def view_of(key: Any, epoch: Any, views: int) -> Any:
    """Which view a row shows in an epoch: each of them once in `views` epochs."""
    return (key % views + epoch) % views
