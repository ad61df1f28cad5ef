"""What is refused before a step is traced."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def check_strategy(strategy: tf.distribute.Strategy) -> None:
    """Raises ValueError for a strategy whose steps are not as here."""
    supported = (
        tf.distribute.OneDeviceStrategy,
        tf.distribute.MirroredStrategy,
        tf.distribute.MultiWorkerMirroredStrategy,
    )
    if tf.distribute.has_strategy() and not isinstance(strategy, supported):
        names = ", ".join(f"tf.distribute.{one.__name__}" for one in supported)
        raise ValueError(
            f"{type(strategy).__name__} is not supported. Supported are: {names}"
        )


def check_batch_size(
    batch_size: int | None, data: Any, strategy: tf.distribute.Strategy
) -> None:
    """Raises ValueError for a global batch that leaves replicas without rows.

    Args:
        batch_size: As `fit` got it.
        data: As `fit` got it: the batches of a data set are looked at too.
        strategy: With the replicas.
    """
    count = strategy.num_replicas_in_sync
    name = "batch_size"
    if batch_size is None and isinstance(data, tf.data.Dataset):
        batch_size, name = _rows_of_batches(data), "Dataset.batch"
    if batch_size is not None and batch_size < count:
        raise ValueError(
            f"`{name}` is the global one, of all replicas together, and must give "
            f"each of the {count} a row. Received: {batch_size}"
        )


def _rows_of_batches(data: tf.data.Dataset) -> int | None:
    """How many rows `.batch` put together last; None where that cannot be seen."""
    size = getattr(data, "_batch_size", None)
    if size is not None:
        size = tf.get_static_value(size)
        return None if size is None else int(size)
    others = ("Flat", "Interleave", "Unbatch", "Rebatch")
    sources = data._inputs()
    if len(sources) != 1 or any(other in type(data).__name__ for other in others):
        return None
    return _rows_of_batches(sources[0])


def check_scope(student: Any) -> None:
    """Raises ValueError unless student and distiller are made in the same scope."""
    strategy = tf.distribute.get_strategy()
    check_strategy(strategy)
    for variable in student.variables:
        value = variable.value
        owner = getattr(value, "distribute_strategy", None)
        multiple = strategy.num_replicas_in_sync > 1
        if (multiple and owner is not strategy) or (
            not multiple and owner is not None and owner.num_replicas_in_sync > 1
        ):
            raise ValueError(
                "Student and distiller must be made in the same strategy scope:\n\n"
                "with strategy.scope():\n"
                "    student = build_student()\n"
                "    distiller = kd.Distiller(student, teacher)\n"
                "    distiller.compile(...)\n"
                "distiller.fit(...)"
            )
