"""Inside a step: what one of several replicas knows of the others."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_distill.weighting import Share


def replica_count() -> int:
    """Number of replicas that train together."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def first_replica(variable: Any) -> Any:
    """The variable of the first replica; itself without a strategy."""
    return tf.distribute.get_strategy().experimental_local_results(variable)[0]


def all_reduce(value: Any) -> Any:
    """Sums tensors over the replicas (called on one of them)."""
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, value)


def share_of(x: Any) -> Share:
    """How many of the global batch's rows are on this replica."""
    leaf = next(leaf for leaf in keras.tree.flatten(x) if leaf is not None)
    rows = tf.cast(tf.shape(leaf)[0], tf.float32)
    count = replica_count()
    if count == 1:
        return Share(rows, rows, 1, tf.identity, tf.identity, tf.identity)
    index = tf.distribute.get_replica_context().replica_id_in_sync_group
    counts = all_reduce(tf.one_hot(index, count) * rows)
    before = tf.reduce_sum(tf.where(tf.range(count) < index, counts, 0.0))
    total = tf.reduce_sum(counts)
    place = tuple(tf.cast(n, tf.int32) for n in (before, rows, total - before - rows))
    return Share(
        rows,
        total,
        count,
        all_reduce,
        lambda data: gather(data, place),
        lambda data: own_rows(data, place),
    )


def alone() -> Share:
    """The share of a run outside of any step: one row on one device."""
    return Share(tf.ones(()), tf.ones(()), 1, tf.identity, tf.identity, tf.identity)


def gather(data: Any, place: tuple[Any, Any, Any]) -> Any:
    """Gives every replica the rows of all replicas, in the same order everywhere.

    Gradients come back for a replica's own rows alone, times N / n: each of the
    replicas computes the same loss of all N rows and takes the part of its own n.

    Args:
        data: Structure of tensors with this replica's rows first; None stays None.
        place: How many rows (padding is none) are before, on and after this replica.
    """
    before, here, after = place
    total = before + here + after

    def everyone(tensor: Any) -> Any:
        if tensor is None:
            return None
        if tensor.dtype == tf.bool:
            return tf.cast(everyone(tf.cast(tensor, tf.int32)), tf.bool)

        @tf.custom_gradient
        def summed(own: Any) -> Any:
            paddings = [[before, after]] + [[0, 0]] * (len(own.shape) - 1)

            def back(gradient: Any) -> Any:
                own_part = tf.cast(tf.maximum(here, 1) / total, gradient.dtype)
                part = gradient[before : before + here] / own_part
                missing = tf.shape(own)[0] - here
                return tf.pad(part, [[0, missing], *paddings[1:]])

            return all_reduce(tf.pad(own[:here], paddings)), back

        return summed(tensor)

    return keras.tree.map_structure(everyone, data)


def own_rows(data: Any, place: tuple[Any, Any, Any]) -> Any:
    """A replica's rows of the global batch, where `gather` would put them.

    Args:
        data: Tensor with a row for each of all replicas' rows.
        place: As in `gather`. A replica without rows gets one of zeros.
    """
    before, here, _ = place
    missing = tf.cast(tf.equal(here, 0), tf.int32)
    padding = [[0, missing]] + [[0, 0]] * (len(data.shape) - 1)
    return tf.pad(data[before : before + here], padding)


def assign_rows(variable: Any, index: Any, rows: Any) -> None:
    """Overwrites some rows of a variable in place, on this replica."""
    variable.value.scatter_update(tf.IndexedSlices(rows, index))


def pad_empty(data: Any, share: Share) -> Any:
    """Gives a replica without rows one row of zeros, whose weight will be 0.

    Without it the backward pass of convolutions crashes, and batch statistics become
    NaN.
    """
    if share.replicas == 1:
        return data
    missing = tf.cast(tf.equal(share.rows, 0), tf.int32)

    def pad(tensor: Any) -> Any:
        if tensor is None:
            return None
        paddings = [[0, missing]] + [[0, 0]] * (len(tensor.shape) - 1)
        return tf.pad(tensor, paddings)

    return keras.tree.map_structure(pad, data)
