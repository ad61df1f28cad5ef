"""Views: augmented rows that can be shown again."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_distill.teachers.store.rows import content_keys, row_key

OTHER_AUGMENT = (
    "`augment` does not replay the views that the cache holds: it is another function, "
    "or uses randomness other than its seed."
)


def view_seeds(key: Any, views: int) -> tf.Tensor:
    """Seeds of a row's views, int32 of shape `(views, 2)`, a function of its key."""
    halves = tf.bitcast(tf.reshape(key, (1,)), tf.int32)[0]
    return tf.random.stateless_uniform((views, 2), halves, None, None, tf.int32)


def view_of(key: Any, epoch: Any, views: int) -> Any:
    """Which view a row shows in an epoch: each of them once in `views` epochs."""
    return (key % views + epoch) % views


def stream(
    rows: tf.data.Dataset, augment: Any, views: int, batch_size: int
) -> tf.data.Dataset:
    """Batches `(keys, seeds, hashes of the views, x)` for the teacher.

    With views, `x` has `views` rows for each key, one after the other.
    """
    if augment is None:
        return rows.batch(batch_size).map(lambda x: _plain(content_keys(x), x))

    def replay(x: Any) -> tf.data.Dataset:
        # As `attach` does it, with the function of a map, so that views are bit-equal.
        key = row_key(x)
        seeds = view_seeds(key, views)
        each = tf.data.Dataset.from_tensor_slices(seeds)
        stacked = each.map(lambda seed: augment(x, seed)).batch(views)
        return stacked.map(lambda view: (key, seeds, content_keys(view), view))

    def flat(keys: Any, seeds: Any, hashes: Any, x: Any) -> Any:
        def joined(leaf: Any) -> Any:
            return tf.reshape(leaf, tf.concat([[-1], tf.shape(leaf)[2:]], 0))

        return keys, seeds, hashes, tf.nest.map_structure(joined, x)

    return rows.flat_map(replay).batch(batch_size).map(flat)


def _plain(keys: Any, x: Any) -> Any:
    return keys, tf.zeros((0, 2), tf.int32), tf.zeros((0,), tf.int64), x
