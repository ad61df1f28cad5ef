"""Data whose order is a function of seed and epoch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import tensorflow as tf


@functools.cache
def _variable() -> tf.Variable:
    """The epoch of this process, which data sets read while they run.

    One variable serves all data sets: it outlives them, and whatever is made of them
    (`.prefetch`, `attach`) still reads it.
    """
    made = []

    def make() -> None:
        with tf.init_scope(), tf.device("CPU:0"):
            made.append(tf.Variable(0, trainable=False, dtype=tf.int64))

    # Another thread is outside of the caller's strategy scope: no mirrored variable.
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def set_epoch(epoch: int) -> None:
    """Tells the data sets of this process which epoch begins; every `fit` does.

    Args:
        epoch: Counted from 0. Iterators that are made from now on read it.
    """
    _variable().assign(epoch)


def current_epoch() -> Any:
    """The epoch as an int64 scalar; inside a data set's function it stays live."""
    return _variable().read_value()


def reads_epoch(dataset: Any) -> bool:
    """Whether a data set, or one that it is made from, reads the epoch."""
    if not isinstance(dataset, tf.data.Dataset):
        return False
    handle = _variable().handle
    functions = [wrapper.function for wrapper in dataset._functions()]
    return any(
        captured is handle
        for function in functions
        for captured in function.captured_inputs
    ) or any(reads_epoch(source) for source in dataset._inputs())


def per_epoch(
    make_dataset: Callable[[Any], tf.data.Dataset], seed: int = 0
) -> tf.data.Dataset:
    """A data set that is made anew in every epoch, from nothing but seed and epoch.

    `Dataset.shuffle` goes on counting from epoch to epoch, so that a run which is
    resumed cannot repeat its order. Here epoch e has the same rows in the same order in
    every run, on one device, on replicas and on several workers.

    Args:
        make_dataset: Function that gets `[seed, epoch]`, an int64 tensor of shape
            `(2,)`, and returns a `tf.data.Dataset`, of the same size in every epoch.
            The tensor fits `tf.random.experimental.index_shuffle`, the
            `tf.random.stateless_*` functions and `Dataset.shuffle`.
        seed: Any integer.

    Returns:
        A `tf.data.Dataset`. Every distiller's `fit` sets the epoch; elsewhere
        `kd.data.set_epoch` does. With it `fit` refuses `steps_per_epoch`: Keras would
        go on with the iterator of the epoch before.

    Raises:
        TypeError: If `make_dataset` does not return a data set.
        ValueError: If what it returns never ends.

    Example:

    >>> import tensorflow as tf
    >>> def make(seed):
    ...     rows = tf.data.Dataset.range(4)
    ...     return rows.map(lambda i: tf.random.experimental.index_shuffle(i, seed, 3))
    >>> dataset = per_epoch(make)
    >>> set_epoch(0)
    >>> first = list(dataset.as_numpy_iterator())
    >>> set_epoch(1)
    >>> second = list(dataset.as_numpy_iterator())
    >>> set_epoch(0)
    >>> first != second and first == list(dataset.as_numpy_iterator())
    True
    """
    example = make_dataset(tf.constant([seed, 0], tf.int64))
    if not isinstance(example, tf.data.Dataset):
        raise TypeError(
            "`make_dataset` must return a tf.data.Dataset. Received: "
            f"{type(example).__name__}"
        )
    size = example.cardinality()
    if size == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "`make_dataset` must return a data set that ends: an epoch is one pass "
            "over it. Received one that repeats for ever."
        )

    def epoch(_: Any) -> tf.data.Dataset:
        # Of this function's graph alone: the process's own seed must not matter, and
        # with 0 for that one `Dataset.shuffle` takes no tensor.
        tf.random.set_seed(1)
        return make_dataset(tf.stack([tf.constant(seed, tf.int64), current_epoch()]))

    dataset = tf.data.Dataset.range(1).flat_map(epoch)
    if size == tf.data.UNKNOWN_CARDINALITY:
        return dataset
    return dataset.apply(tf.data.experimental.assert_cardinality(size))
