"""What training under `tf.distribute` needs, and nothing else does."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_distill.weighting import Share

# The last release of Keras whose own `fit` was seen to fail with several workers
# (keras#20585), and ours to work in its place.
LAST_KERAS = (3, 15)
# Where Keras's callbacks keep the place that they write to.
_WRITERS = {
    keras.callbacks.ModelCheckpoint: "filepath",
    keras.callbacks.TensorBoard: "log_dir",
    keras.callbacks.CSVLogger: "filename",
}


def replicas() -> int:
    """Number of replicas that train together."""
    return tf.distribute.get_strategy().num_replicas_in_sync


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


def first(variable: Any) -> Any:
    """The variable of the first replica; itself without a strategy."""
    return tf.distribute.get_strategy().experimental_local_results(variable)[0]


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
            rows = [[here, replicas() - 1 - here]]
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
    return all_reduce(tf.one_hot(here, replicas(), dtype=tf.int64)[:, None] * numbers)


def _check_same(what: str, digests: Any) -> None:
    others = [i for i, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ValueError(
            f"The workers begin with different {what}: replicas {others} differ from "
            "replica 0. Start all workers with the same packages, script, seed and "
            "files."
        )


def all_reduce(value: Any) -> Any:
    """Sums tensors over the replicas (called on one of them)."""
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, value)


def share_of(x: Any) -> Share:
    """How many of the global batch's rows are on this replica."""
    leaf = next(leaf for leaf in keras.tree.flatten(x) if leaf is not None)
    rows = tf.cast(tf.shape(leaf)[0], tf.float32)
    count = replicas()
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


def sum_gradients(gradients: list[Any]) -> list[Any]:
    """All-reduces gradients once; None stays None."""
    if replicas() == 1:
        return gradients
    dense = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
    summed = iter(all_reduce([g for g in dense if g is not None]))
    return [None if g is None else next(summed) for g in dense]


def clip(optimizer: Any, gradients: list[Any]) -> list[Any]:
    """Clips all-reduced gradients as the optimizer would clip one device's.

    Under a strategy Keras clips every replica's part before the sum, which is another
    step than on one device.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    some = [g for g in gradients if g is not None]
    if replicas() == 1 or not some:
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


def apply(optimizer: Any, gradients: list[Any], variables: list[Any], ok: Any) -> None:
    """Applies all-reduced gradients; not at all where `ok` is false.

    Keras's optimizer sums over the replicas itself, so it gets its R-th part.
    """
    pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
    if not pairs:
        return
    count = replicas()
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


def element_spec(iterator: Any) -> Any:
    """The structure of one batch on one replica, without reading any."""

    def local(spec: Any) -> Any:
        values = getattr(spec, "_value_specs", None)
        return values[0] if values else spec

    return tf.nest.map_structure(local, iterator._distributed_dataset.element_spec)
