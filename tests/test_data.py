"""Data whose order is a function of seed and epoch."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd


@pytest.fixture(autouse=True)
def _first_epoch():
    yield
    kd.data.set_epoch(0)


def shuffled(seed):
    rows = tf.data.Dataset.range(20)
    return rows.map(lambda i: tf.random.experimental.index_shuffle(i, seed, 19))


def read(dataset):
    return [int(value) for value in dataset]


def test_the_order_is_a_function_of_seed_and_epoch():
    dataset, again = kd.data.per_epoch(shuffled), kd.data.per_epoch(shuffled)
    orders = []
    for epoch in (0, 1, 5):
        kd.data.set_epoch(epoch)
        assert read(dataset) == read(dataset) == read(again)
        assert read(dataset) == read(shuffled(tf.constant([0, epoch], tf.int64)))
        orders.append(read(dataset))
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert read(kd.data.per_epoch(shuffled, seed=1)) not in orders


def test_the_size_is_known():
    assert kd.data.per_epoch(shuffled).cardinality() == 20
    assert kd.data.per_epoch(shuffled).batch(8).cardinality() == 3


def test_fit_tells_the_epoch_through_whatever_follows():
    seen = []
    x, y = tiny.data(20)

    def make(seed):
        rows = shuffled(seed)
        return rows.map(
            lambda i: (tf.gather(x, i), tf.gather(y, i), tf.cast(i, "float32"))
        )

    def note(batch):
        seen[-1] += [int(i) for i in batch]
        return np.ones(len(batch), "float32")

    def watched(x, y, i):
        weight = tf.numpy_function(note, [i], tf.float32)
        return x, y, tf.ensure_shape(weight, (None,))

    # The epoch is passed on through batches, maps and prefetching.
    data = kd.data.per_epoch(make).batch(8).map(watched).prefetch(2)
    distiller = tiny.compiled(tiny.distiller())
    starts = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: seen.append([]))
    distiller.fit(data, epochs=3, verbose=0, callbacks=[starts])
    expected = [read(shuffled(tf.constant([0, e], tf.int64))) for e in range(3)]
    assert seen == expected
    seen.clear()
    distiller.fit(data, initial_epoch=1, epochs=3, verbose=0, callbacks=[starts])
    assert seen == expected[1:]


def test_data_that_read_the_epoch_are_recognised():
    dataset = kd.data.per_epoch(shuffled)
    plain = tf.data.Dataset.range(3)
    assert kd.data.reads_epoch(dataset.batch(2).prefetch(1))
    assert kd.data.reads_epoch(tf.data.Dataset.zip(plain, dataset))
    assert not kd.data.reads_epoch(plain.shuffle(2).batch(2))
    assert not kd.data.reads_epoch([1, 2])


def test_fit_refuses_steps_per_epoch():
    x, y = tiny.data(20)

    def make(seed):
        return shuffled(seed).map(lambda i: (tf.gather(x, i), tf.gather(y, i)))

    distiller = tiny.compiled(tiny.distiller())
    data = kd.data.per_epoch(make).batch(4)
    with pytest.raises(ValueError, match="steps_per_epoch"):
        distiller.fit(data, steps_per_epoch=2, verbose=0)
    distiller.fit(data.take(2), verbose=0)


def test_what_is_not_a_data_set_that_ends_is_refused():
    with pytest.raises(TypeError, match=r"make_dataset.*Received: list"):
        kd.data.per_epoch(lambda seed: [1])
    with pytest.raises(ValueError, match="make_dataset"):
        kd.data.per_epoch(lambda seed: tf.data.Dataset.range(2).repeat())


def test_a_size_that_changes_is_noticed():
    dataset = kd.data.per_epoch(lambda seed: tf.data.Dataset.range(3 + seed[1]))
    if dataset.cardinality() == tf.data.UNKNOWN_CARDINALITY:
        pytest.fail("the size of epoch 0 is known")
    kd.data.set_epoch(1)
    with pytest.raises(tf.errors.FailedPreconditionError):
        read(dataset)
