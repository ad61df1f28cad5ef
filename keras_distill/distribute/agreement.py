"""What all workers must have in common when they begin."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_distill.distribute.replicas import all_reduce, replica_count
from keras_distill.distribute.workers import is_chief, several_workers

# The last release of Keras whose own `fit` was seen to fail with several workers
# (keras#20585), and ours to work in its place.
LAST_KERAS = (3, 15)


def check_keras() -> None:
    """Warns of a release that may do with several workers what nobody has tried."""
    found = tuple(int(part) for part in keras.__version__.split(".")[:2])
    if found > LAST_KERAS:
        tried = ".".join(map(str, LAST_KERAS))
        warnings.warn(
            f"Training with several workers replaces parts of Keras's `fit` and was "
            f"tried with Keras up to {tried}. This is {keras.__version__}.",
            stacklevel=2,
        )


def begin_together(
    strategy: tf.distribute.Strategy,
    variables: list[Any],
    described: Callable[[], dict[str, str]],
) -> None:
    """Gives all workers the chief's seed, if they begin with the same model.

    Without a common one every worker shuffles in its own order, and of its own order
    reads only its own share: rows are read twice, and others never.

    Args:
        strategy: With the workers.
        variables: Whose values must agree.
        described: What else must: a text by its name, of the same names everywhere.

    Raises:
        ValueError: On every worker, if something differs.
    """
    if not several_workers(strategy):
        return
    check_keras()
    seed = int(np.random.default_rng().integers(2**31)) if is_chief(strategy) else 0
    texts = {
        "versions of Keras or TensorFlow": f"{keras.__version__} {tf.__version__}",
        **described(),
        "variables": str([(tuple(v.shape), v.dtype) for v in variables]),
    }
    digests = [_digest([text.encode()]) for text in texts.values()]
    seeds, *found = _from_all(strategy, [seed, *digests]).T
    for what, digest in zip(texts, found, strict=True):
        _check_same(what, digest)
    values = _digest([np.asarray(v.numpy()).tobytes() for v in variables])
    _check_same("values of the variables", _from_all(strategy, [values])[:, 0])
    tf.random.set_seed(int(seeds.max()))


def _digest(parts: list[bytes]) -> int:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest()[:7], "little")


def _from_all(strategy: tf.distribute.Strategy, numbers: list[int]) -> Any:
    """The numbers that every replica's worker has: `(replicas, numbers)`."""
    found = strategy.run(_in_own_row, (tf.constant(numbers, tf.int64),))
    return strategy.experimental_local_results(found)[0].numpy()


@tf.function
def _in_own_row(numbers: Any) -> Any:
    here = tf.distribute.get_replica_context().replica_id_in_sync_group
    return all_reduce(
        tf.one_hot(here, replica_count(), dtype=tf.int64)[:, None] * numbers
    )


def _check_same(what: str, digests: Any) -> None:
    others = [i for i, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ValueError(
            f"The workers begin with different {what}: replicas {others} differ from "
            "replica 0. Start all workers with the same packages, script, seed and "
            "files."
        )
