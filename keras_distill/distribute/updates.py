"""Inside a step: gradients of all replicas, clipped and applied as one device's."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_distill.distribute.replicas import all_reduce, replica_count


def sum_gradients(gradients: list[Any]) -> list[Any]:
    """All-reduces gradients once; None stays None."""
    if replica_count() == 1:
        return gradients
    dense = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
    summed = iter(all_reduce([g for g in dense if g is not None]))
    return [None if g is None else next(summed) for g in dense]


def clip_gradients(optimizer: Any, gradients: list[Any]) -> list[Any]:
    """Clips all-reduced gradients as the optimizer would clip one device's.

    Under a strategy Keras clips every replica's part before the sum, which is another
    step than on one device.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    some = [g for g in gradients if g is not None]
    if replica_count() == 1 or not some:
        return gradients
    if optimizer.clipnorm:
        some = [tf.clip_by_norm(g, optimizer.clipnorm) for g in some]
    elif optimizer.global_clipnorm:
        some = tf.clip_by_global_norm(some, optimizer.global_clipnorm)[0]
    elif optimizer.clipvalue:
        value = optimizer.clipvalue
        some = [tf.clip_by_value(g, -value, value) for g in some]
    clipped = iter(some)
    return [None if g is None else next(clipped) for g in gradients]


def apply_gradients(
    optimizer: Any, gradients: list[Any], variables: list[Any], ok: Any
) -> None:
    """Applies all-reduced gradients; not at all where `ok` is false.

    Keras's optimizer sums over the replicas itself, so it gets its R-th part.
    """
    pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
    if not pairs:
        return
    count = replica_count()
    parts = [g / count if count > 1 else g for g, _ in pairs]
    targets = [v for _, v in pairs]
    if ok is None:
        optimizer.apply(parts, targets)
        return

    def on_replica() -> Any:
        optimizer.apply(parts, targets)
        return tf.no_op()

    if count == 1:
        tf.cond(ok, on_replica, tf.no_op)
        return

    # A cond with a collective inside is only allowed outside of the replicas.
    def across(strategy: Any, ok: Any, parts: Any) -> None:
        first = strategy.experimental_local_results(ok)[0]

        def update() -> Any:
            strategy.extended.call_for_each_replica(
                optimizer.apply, args=(parts, targets)
            )
            return tf.no_op()

        tf.cond(first, update, tf.no_op)

    tf.distribute.get_replica_context().merge_call(across, args=(ok, parts))
