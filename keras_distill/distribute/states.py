"""What each replica holds of variables, read and restored."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_distill.distribute.replicas import all_reduce, replica_count


def values_of_replicas(
    strategy: tf.distribute.Strategy, variables: list[Any]
) -> list[np.ndarray]:
    """What each replica holds of variables: arrays `(replicas, ...)`, on all workers.

    A plain read shows the first replica's: statistics of BatchNormalization that is
    not synchronized differ, and so do the parts of a metric.
    """

    def gathered() -> Any:
        here = tf.distribute.get_replica_context().replica_id_in_sync_group

        def in_own_row(variable: Any) -> Any:
            value = tf.convert_to_tensor(variable.value)[None]
            if value.dtype.is_integer:  # collectives know no unsigned ones
                value = tf.cast(value, tf.int64)
            rows = [[here, replica_count() - 1 - here]]
            return tf.pad(value, rows + [[0, 0]] * (len(value.shape) - 1))

        return all_reduce([in_own_row(variable) for variable in variables])

    found = strategy.run(gathered)
    return [strategy.experimental_local_results(rows)[0].numpy() for rows in found]


def assign_to_replicas(
    strategy: tf.distribute.Strategy, variables: list[Any], values: list[np.ndarray]
) -> None:
    """Gives each replica its row of the values: see `values_of_replicas`."""

    def assign() -> None:
        here = tf.distribute.get_replica_context().replica_id_in_sync_group
        for variable, rows in zip(variables, values, strict=True):
            variable.assign(tf.gather(rows, here))

    strategy.run(assign)
