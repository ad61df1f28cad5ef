"""Verifying: the teacher runs again on some rows, and is compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_distill.teachers.base import Teacher
from keras_distill.teachers.store.building import asked_at
from keras_distill.teachers.store.codec import Codec
from keras_distill.teachers.store.lookup import Lookup
from keras_distill.teachers.store.rows import as_tuple, inputs_of
from keras_distill.teachers.store.views import stream


def largest_difference(
    lookup: Lookup,
    teacher: Teacher,
    dataset: tf.data.Dataset,
    rows: int,
    augment: Any,
    arguments: dict[str, Any],
) -> tuple[int, float]:
    """How many rows were compared, and the largest difference found.

    Args:
        lookup: Into the cache.
        teacher: Asked again.
        dataset: What the cache was built from.
        rows: How many rows of it, spread evenly.
        augment: The function that shows a view again, if the cache has views.
        arguments: With which the cache was built.
    """
    every = max(len(lookup.shards) // rows, 1)
    some = dataset.enumerate().filter(lambda i, *_: i % every == 0).take(rows)
    plain = some.map(lambda i, element: (inputs_of(*as_tuple(element)),))
    positions = np.arange(rows, dtype="int64") * every
    views = lookup.views
    batch_size = max(arguments["batch_size"] // views, 1)
    temperature = asked_at(arguments["temperatures"])
    taps = [stored.label for stored in lookup.codec.taps]
    heads, _ = Codec.heads_of(teacher)
    seen, largest = 0, 0.0
    for keys, _, _, x in stream(plain, augment, views, batch_size):
        count = len(keys)
        known, features = teacher(x, taps, temperature)
        places = positions[seen : seen + count]
        for view in range(views):
            leaves = lookup.read(keys.numpy(), places, np.full(count, view))
            pick = slice(view, None, views)
            found = _differences(lookup.codec, leaves, known, features, heads, pick)
            largest = float(np.max([largest, *found]))  # keeps NaN
        seen += count
    return seen, largest


def _differences(
    codec: Codec, leaves: Any, known: Any, features: Any, heads: Any, pick: slice
) -> Iterator[float]:
    """Largest differences between stored and fresh values, per output and tap."""
    flat = keras.tree.flatten(known)
    pairs: list[Any] = []
    for place, stored in enumerate(codec.outputs):
        leaf = tf.constant(leaves[stored.name])
        if stored.top_k is None:
            fresh = stored.encode(flat[place], None)[0][pick]
            pairs.append((leaf, fresh))
            continue
        logits = heads[place].logits(flat[place])[pick]
        for temperature in stored.temperatures:
            both = stored.head.against(leaf, logits, temperature)
            pairs.append([tf.nn.log_softmax(z / temperature) for z in both])
    for stored in codec.taps:
        fresh = features[stored.label][pick]
        pairs.append((tf.constant(leaves[stored.name]), fresh))
    for stored_values, fresh in pairs:
        a, b = (np.asarray(v, "float64") for v in (stored_values, fresh))
        yield float(np.max(np.abs(a - b) / (1 + np.abs(b)), initial=0.0))
