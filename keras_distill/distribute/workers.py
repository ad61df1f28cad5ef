"""Several processes that train together: who writes, and who reads what."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

# Where Keras's callbacks keep the place that they write to.
_WRITERS = {
    keras.callbacks.ModelCheckpoint: "filepath",
    keras.callbacks.TensorBoard: "log_dir",
    keras.callbacks.CSVLogger: "filename",
}


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes files (always, if it is alone)."""
    resolver = strategy.cluster_resolver
    if resolver is None or not resolver.cluster_spec().as_dict():
        return True
    kind, index = resolver.task_type, resolver.task_id
    has_chief = "chief" in resolver.cluster_spec().as_dict()
    return kind == "chief" or (not has_chief and kind == "worker" and index == 0)


def several_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether the replicas are in several processes."""
    resolver = strategy.cluster_resolver
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return False
    return resolver is not None and len(resolver.cluster_spec().as_dict()) > 0


def as_logs(results: dict[str, Any]) -> dict[str, Any]:
    """Logs in the shape that Keras can reduce over workers (keras#20585)."""
    if not several_workers(tf.distribute.get_strategy()):
        return results
    return {name: tf.reshape(value, (1,)) for name, value in results.items()}


def sharded_by_rows(data: Any, strategy: tf.distribute.Strategy) -> Any:
    """A data set of which every worker reads its own rows.

    TensorFlow would share out files, which gives workers another order and another
    number of steps.
    """
    if not isinstance(data, tf.data.Dataset) or not several_workers(strategy):
        return data
    if _shuffles_without_seed(data):
        raise ValueError(
            "With several workers a data set that shuffles needs a seed: each worker "
            "would shuffle in an order of its own, and rows would be seen twice or "
            "never. Give `.shuffle(..., seed=...)`, or call "
            "keras.utils.set_random_seed on every worker before the data set is made."
        )
    options = tf.data.Options()
    policy = tf.data.experimental.AutoShardPolicy.DATA
    options.experimental_distribute.auto_shard_policy = policy
    return data.with_options(options)


def _shuffles_without_seed(data: tf.data.Dataset) -> bool:
    seeds = [getattr(data, name, None) for name in ("_seed", "_seed2")]
    if None not in seeds and not any(int(tf.get_static_value(s)) for s in seeds):
        return True
    return any(_shuffles_without_seed(source) for source in data._inputs())


@contextlib.contextmanager
def written_by_chief(
    strategy: tf.distribute.Strategy, callbacks: Any
) -> Iterator[None]:
    """Lets Keras's callbacks of the other workers write where nobody looks.

    They cannot be left out: what the chief saves may be a sum over all workers, in
    which all must take part.
    """
    if is_chief(strategy):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        before = []
        for callback in getattr(callbacks, "callbacks", callbacks):
            for kind, name in _WRITERS.items():
                if isinstance(callback, kind):
                    place = os.fspath(getattr(callback, name))
                    before.append((callback, name, place))
                    own = os.path.join(folder, os.path.basename(place.rstrip("/")))
                    setattr(callback, name, own)
        try:
            yield
        finally:
            for callback, name, place in before:
                setattr(callback, name, place)
