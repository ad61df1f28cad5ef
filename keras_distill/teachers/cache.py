"""A teacher's knowledge, computed once and kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_distill.data import current_epoch
from keras_distill.heads import Head
from keras_distill.losses.response import SoftTarget
from keras_distill.teachers.base import Teacher, as_teacher
from keras_distill.teachers.store.building import Builder, asked_at, checked_arguments
from keras_distill.teachers.store.codec import Codec
from keras_distill.teachers.store.manifest import (
    check_fingerprint,
    join_parts,
    open_manifest,
    record_dtype,
)
from keras_distill.teachers.store.rows import (
    as_tuple,
    check_dataset,
    check_rows,
    chunk_of,
    content_keys,
    inputs_of,
    row_key,
)
from keras_distill.teachers.store.shards import KEY, Index, Shards, locked
from keras_distill.teachers.store.views import OTHER_AUGMENT, stream, view_of


class Cache(Teacher):
    """What a teacher says of every row of a data set, read from disk.

    `build` runs the teacher once over the data; `attach` puts what is stored beside
    the inputs, inside the `tf.data` pipeline; and `Distiller(student, cache)` trains
    at the student's own speed. Outputs and features come back in the teacher's own
    structure, so that all losses and links work as with the teacher itself.

    ```python
    cache = kd.teachers.Cache.build(teacher, rows, "cache")
    train = cache.attach(rows).shuffle(1000).batch(64)
    kd.Distiller(student, cache).compile("adam", loss).fit(train)
    ```

    A cache is made with `Cache.build` or `Cache.open`. Its data are mapped into memory,
    so that any number of processes read one copy, and none of them loads it whole.

    Attributes:
        path: The directory.
        temperatures: Those that it serves; empty for any.
        views: How many augmented views of each row it holds.

    References:
        Faghri et al., Reinforce Data, Multiply Impact: Improved Model Accuracy and
        Robustness with Dataset Reinforcement, ICCV 2023 (arXiv 2303.08983), for views.
        Beyer et al., Knowledge Distillation: A Good Teacher is Patient and Consistent,
        CVPR 2022 (arXiv 2106.05237), for why teacher and student should see the same
        view.
    """

    def __init__(
        self, path: str | os.PathLike[str], manifest: dict[str, Any], augment: Any
    ) -> None:
        arguments = manifest["arguments"]
        self.path = os.fspath(path)
        self.views = arguments["views"]
        self.temperatures = tuple(arguments["temperatures"])
        self.one_temperature = manifest["one_temperature"]
        self._manifest = manifest
        self._augment = augment
        self._position = arguments["key"] == "position"
        self._codec = codec = Codec.from_config(manifest["codec"])
        self.names = codec.names
        self.outputs = keras.tree.map_structure(
            lambda place: _symbol(codec.outputs[place].shape), codec.structure
        )
        directory = Path(path)
        record = record_dtype(manifest["record"])
        self._shards = Shards(directory, manifest["shards"], record, self.views)
        self._parts = np.cumsum([0, *manifest["parts"]])
        self._index = None
        if not self._position:
            self._index = Index(directory, manifest["index"])
        # In the data it tells the knowledge of one cache from another's.
        self._id = manifest["id"]

    # -- making ---------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        teacher: Any,
        dataset: tf.data.Dataset,
        path: str | os.PathLike[str],
        *,
        taps: Sequence[Any] = (),
        top_k: int | None = None,
        temperatures: Sequence[float] = (),
        dtype: str = "float16",
        views: int = 1,
        augment: Callable[[Any, Any], Any] | None = None,
        batch_size: int = 128,
        key: str = "content",
        shard: tuple[int, int] | None = None,
    ) -> Cache:
        """Runs the teacher over the data, and stores what it says.

        The data stream through: memory does not grow with their number. A run that was
        killed goes on where it was when it is started again with the same arguments
        and the same data in the same order; a finished cache is opened. Of several
        processes that build the same cache one works and the others wait.

        Args:
            teacher: A model, a list of models or a `kd.teachers.Teacher`.
            dataset: Single rows, not batches: `x`, `(x,)`, `(x, y)`, `(x, y, weight)`.
            path: A directory of its own; made if it does not exist.
            taps: Layers of the teacher whose outputs are stored too, for links: names,
                paths or layer objects.
            top_k: Store the k largest logits, and one ghost class for the rest.
                Only `SoftTarget` can use such a cache. None stores all.
            temperatures: At which it will be used; needed with `top_k`, and exactly one
                for a teacher that is an arithmetic ensemble.
            dtype: `"float16"` or `"float32"`.
            views: How many augmented views of each row to store.
            augment: Function `(x, seed) -> x` of one row, with an int32 seed of shape
                `(2,)`, that has no other source of randomness (`tf.image.stateless_*`).
            batch_size: Rows (views) that the teacher gets at once.
            key: `"content"`: a row is recognised by a hash of its `x`, in any order.
                `"position"`: by its place, for very large sets: there is no index to
                search, and data in another order are refused.
            shard: `(i, n)`: only every n-th row beginning with the i-th, as in
                `dataset.shard(n, i)`, for n machines. `Cache.join` makes one of them.

        Returns:
            The cache, opened.

        Raises:
            ValueError: If an argument is out of range or without effect, the data are
                empty or batched, the teacher's outputs are not finite in this dtype, or
                there is another cache at `path`.
            OSError: If the disk is full. What was written before is kept.
        """
        teacher = as_teacher(teacher)
        if isinstance(teacher, Cache):
            raise ValueError("`teacher` is a cache already. Build from a live one.")
        arguments = checked_arguments(
            teacher,
            taps,
            top_k,
            temperatures,
            dtype,
            views,
            augment,
            batch_size,
            key,
            shard,
        )
        check_dataset(dataset)
        if shard is not None:
            dataset = dataset.shard(shard[1], shard[0])
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            builder = Builder(teacher, dataset, directory, arguments, augment)
            builder.run()
        cache = cls.open(path, augment=augment)
        cache._check_first(dataset)
        return cache

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        augment: Callable[[Any, Any], Any] | None = None,
    ) -> Cache:
        """Opens a finished cache, and checks that its files are whole.

        Args:
            path: The directory.
            augment: The function with which it was built, if it was: functions are not
                stored. `attach` checks that it gives the same views.

        Raises:
            ValueError: If there is no cache, it is unfinished or damaged, or `augment`
                is missing or has no effect.
        """
        return cls(path, open_manifest(Path(path), augment is not None), augment)

    @classmethod
    def join(
        cls, paths: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]
    ) -> Cache:
        """Makes one cache of those that were built with `shard=(i, n)`.

        Args:
            paths: The n parts, in any order. Their files are linked where that is
                possible, else copied; the parts can be deleted afterwards.
            path: A directory of its own.

        Returns:
            The cache. One with views has to be opened with
            `Cache.open(path, augment=...)` before it can be attached.

        Raises:
            ValueError: If parts are missing, unfinished or damaged, twice there, or not
                of the same teacher and arguments.
        """
        return cls(path, join_parts([Path(part) for part in paths], Path(path)), None)

    # -- using ----------------------------------------------------------------------

    def attach(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """Puts the teacher's knowledge beside the inputs.

        Call it on single rows, before `batch`; before `shuffle` too where the
        cache's key is `"position"`. With `key="content"` the rows may come in any
        order, and only some of them.

        Args:
            dataset: Elements `x`, `(x,)`, `(x, y)`, `(x, y, weight)`.

        Returns:
            A data set of `({"inputs": x, "kd_teacher": {...}}, ...)` in the same order.
            With views, `x` is the augmented one: each row shows another view in each
            epoch of `fit`, all of them in turn.

        Raises:
            ValueError: If the rows are not of the cache's kind, or `augment` does not
                replay the stored views. A row that is not in the cache is a
                `tf.errors.OpError` when it is read.
        """
        check_dataset(dataset)
        check_rows(dataset, self._manifest["inputs"])
        self._check_augment()
        if self._augment is not None:
            self._check_replay(dataset)
        size = dataset.cardinality()
        chunk = chunk_of(dataset)
        numbered = dataset.enumerate().batch(chunk)
        found = numbered.map(
            self._with_knowledge,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        ).unbatch()
        if self._augment is not None:
            found = found.map(
                self._replayed, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
            )
        if size == tf.data.UNKNOWN_CARDINALITY:
            return found
        return found.apply(tf.data.experimental.assert_cardinality(size))

    def verify(
        self, teacher: Any, dataset: tf.data.Dataset, rows: int = 256
    ) -> dict[str, float]:
        """Runs the teacher again on some rows, and compares.

        Args:
            teacher: The teacher that the cache was built with.
            dataset: The data that it was built from (of a part: `dataset.shard(n, i)`).
            rows: How many rows, spread evenly.

        Returns:
            `rows`, and `max_difference`, the largest difference found, relative to
            `1 + |value|`. The teacher on another machine agrees within float16.

        Raises:
            ValueError: If the teacher is another one, or the values differ by more than
                0.004.
        """
        teacher = as_teacher(teacher)
        check_fingerprint(self._manifest["fingerprint"], teacher, self.path)
        check_dataset(dataset)
        self._check_augment()
        if rows < 1:
            raise ValueError(f"`rows` must be at least 1. Received: {rows}")
        every = max(len(self._shards) // rows, 1)
        some = dataset.enumerate().filter(lambda i, *_: i % every == 0).take(rows)
        seen, largest = 0, 0.0
        heads, _ = Codec.heads_of(teacher)
        positions = np.arange(rows, dtype="int64") * every
        plain = some.map(lambda i, element: (inputs_of(*as_tuple(element)),))
        batch_size = self._manifest["arguments"]["batch_size"] // self.views
        for keys, _, _, x in stream(
            plain, self._augment, self.views, max(batch_size, 1)
        ):
            count = len(keys)
            known, features = teacher(x, self._tap_paths, asked_at(self.temperatures))
            places = positions[seen : seen + count]
            for view in range(self.views):
                leaves = self._read(keys.numpy(), places, np.full(count, view))
                pick = slice(view, None, self.views)
                differences = self._differences(leaves, known, features, heads, pick)
                largest = max(largest, *differences)
            seen += count
        if not seen:
            raise ValueError("`dataset` is empty.")
        if not largest <= 0.004:
            raise ValueError(
                f"The teacher's values differ from the cache {self.path!r} by "
                f"{largest:.3g} (relative to 1 + |value|) on {seen} rows."
            )
        return {"rows": seen, "max_difference": largest}

    # -- the contract of a teacher --------------------------------------------------

    def __call__(
        self, x: Any, taps: Sequence[str], temperature: Any
    ) -> tuple[Any, dict[str, Any]]:
        found = x.get("kd_teacher") if isinstance(x, dict) else None
        if found is None:
            raise ValueError(
                "The teacher is a cache, and the data do not hold its knowledge: fit "
                "on `cache.attach(dataset).batch(...)`, with single rows in `dataset`."
            )
        if self._id not in found:
            raise ValueError(
                "The data were attached by another cache than the distiller's teacher, "
                f"{self!r}."
            )
        leaves = found[self._id]
        codec = self._codec
        outputs = keras.tree.map_structure(
            lambda place: codec.outputs[place].decode(leaves[f"output{place}"]),
            codec.structure,
        )
        return outputs, {
            stored.label: stored.decode(leaves[stored.name])
            for stored in codec.taps
            if stored.label in taps
        }

    def fingerprint(self) -> str:
        """The fingerprint of the teacher that is remembered."""
        return self._manifest["fingerprint"]

    def resolve(self, layer: Any) -> Any:
        if isinstance(layer, (list, tuple)):
            return [self.resolve(item) for item in layer]
        names = self._manifest["tap_names"]
        name = layer if isinstance(layer, str) else layer.name
        if name not in names:
            raise ValueError(
                f"`teacher_layer`: the cache does not hold {name!r}. It was built with "
                f"taps={list(names)}."
            )
        return names[name]

    def tap_specs(self, taps: Sequence[str]) -> dict[str, Any]:
        stored = {tap.label: tap for tap in self._codec.taps}
        return {tap: _symbol(stored[tap].shape) for tap in taps}

    def heads(self) -> list[Head]:
        if self._codec.multi_label is not None:
            raise ValueError(self._codec.multi_label)
        return [stored.head for stored in self._codec.outputs]

    def check_loss(self, loss: Any) -> None:
        super().check_loss(loss)
        if self._manifest["arguments"]["top_k"] is None:
            return
        if not isinstance(loss, SoftTarget) or loss.standardize:
            raise ValueError(
                f"{self!r} holds {self._manifest['arguments']['top_k']} logits per "
                "row: only SoftTarget (without `standardize`) can use them. Received: "
                f"{loss!r}"
            )

    def check_temperature(self, temperature: float) -> None:
        fits = [abs(temperature - t) <= 1e-6 * t for t in self.temperatures]
        if fits and not any(fits):
            raise ValueError(
                f"`temperature` must be one of {list(self.temperatures)}, for which "
                f"the cache was built. Received: {temperature}"
            )

    def __len__(self) -> int:
        return len(self._shards)

    def __repr__(self) -> str:
        return f"teachers.Cache({self.path!r}, {len(self)} rows)"

    # -- looking up -----------------------------------------------------------------

    @property
    def _tap_paths(self) -> list[str]:
        return [stored.label for stored in self._codec.taps]

    def _rows(self, keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Row numbers, for hashes or for places in the data."""
        if self._index is None:
            if positions.max() >= len(self):
                raise ValueError(
                    f"Row {positions.max()} is not in the cache {self.path!r}, which "
                    f"holds {len(self)}."
                )
            # Part i of n holds the rows i, i + n, i + 2 n, ...
            parts = len(self._parts) - 1
            return self._parts[positions % parts] + positions // parts
        rows, known = self._index.rows(keys.view(KEY))
        if not known.all():
            raise ValueError(
                f"{np.sum(~known)} of {len(keys)} rows are not in the cache "
                f"{self.path!r}, the first of them at place "
                f"{positions[np.argmin(known)]}. `x` must be as it was when the cache "
                "was built: same values, dtypes and keys, not augmented, not batched."
            )
        return rows

    def _read(
        self, keys: np.ndarray, positions: np.ndarray, views: np.ndarray
    ) -> dict[str, np.ndarray]:
        rows = self._rows(keys, positions)
        found, records = self._shards.read(rows, views)
        if self._position and not np.array_equal(found, keys.view(KEY)):
            first = positions[np.argmax(found != keys.view(KEY))]
            raise ValueError(
                f"Row {first} is not the one at that place in the cache {self.path!r}: "
                "with key='position' the data must come in the order in which the "
                "cache was built. Shuffle after `attach`."
            )
        leaves = {s.name: s.read(records) for s in self._codec.stored}
        if self._augment is not None:
            leaves["seed"] = np.ascontiguousarray(records["seed"])
        return leaves

    @tf.autograph.experimental.do_not_convert
    def _with_knowledge(self, positions: Any, element: Any) -> Any:
        x, *rest = as_tuple(element)
        specs = {s.name: s.leaf for s in self._codec.stored}
        if self._augment is not None:
            specs["seed"] = (2,), "int32"
        names = list(specs)

        def look_up(keys: np.ndarray, positions: np.ndarray, epoch: int) -> list[Any]:
            leaves = self._read(keys, positions, view_of(keys, epoch, self.views))
            return [leaves[name] for name in names]

        # Without views the data must not depend on the epoch.
        epoch = current_epoch() if self.views > 1 else tf.constant(0, tf.int64)
        values = tf.numpy_function(
            look_up,
            [content_keys(x), positions, epoch],
            [tf.as_dtype(specs[name][1]) for name in names],
            stateful=False,
        )
        leaves = {}
        for name, value in zip(names, values, strict=True):
            leaves[name] = tf.ensure_shape(value, (None, *specs[name][0]))
        return ({"inputs": x, "kd_teacher": {self._id: leaves}}, *rest)

    def _replayed(self, x: Any, *rest: Any) -> Any:
        leaves = dict(x["kd_teacher"][self._id])
        inputs = self._augment(x["inputs"], leaves.pop("seed"))
        return ({"inputs": inputs, "kd_teacher": {self._id: leaves}}, *rest)

    def _check_first(self, dataset: tf.data.Dataset) -> None:
        """Raises ValueError if the cache was built from other data."""
        rows = dataset.take(1).map(lambda *element: row_key(inputs_of(*element)))
        for key in rows:
            zero = np.zeros(1, "int64")
            self._read(key.numpy()[None], zero, zero)

    def _check_augment(self) -> None:
        """Raises ValueError for views that were joined, and not opened."""
        if self._manifest["arguments"]["augmented"] and self._augment is None:
            raise ValueError(
                "This cache holds augmented views. Open it with "
                "Cache.open(path, augment=...)."
            )

    def _check_replay(self, dataset: tf.data.Dataset) -> None:
        """Replays one stored view, and compares its hash."""

        def first(position: Any, element: Any) -> Any:
            x = inputs_of(*as_tuple(element))
            return row_key(x), position, x

        one = dataset.enumerate().take(1).map(first)
        found = next(iter(one), None)
        if found is None:
            return
        key, position = (value.numpy()[None] for value in found[:2])
        rows = self._rows(key, position)
        _, records = self._shards.read(rows, np.zeros(1, "int64"))
        seed = tf.constant(records["seed"][0])
        replayed = one.map(lambda key, position, x: row_key(self._augment(x, seed)))
        if next(iter(replayed)).numpy() != records["view"][0]:
            raise ValueError(OTHER_AUGMENT)

    def _differences(
        self, leaves: Any, known: Any, features: Any, heads: Any, pick: slice
    ) -> Iterator[float]:
        """Largest differences between stored and fresh values, per output and tap."""
        flat = keras.tree.flatten(known)
        pairs: list[Any] = []
        for place, stored in enumerate(self._codec.outputs):
            leaf = tf.constant(leaves[stored.name])
            if stored.top_k is None:
                fresh = stored.encode(flat[place], None)[0][pick]
                pairs.append((leaf, fresh))
                continue
            logits = heads[place].logits(flat[place])[pick]
            for temperature in stored.temperatures or (1.0,):
                both = stored.head.against(leaf, logits, temperature)
                pairs.append([tf.nn.log_softmax(z / temperature) for z in both])
        for stored in self._codec.taps:
            fresh = features[stored.label][pick]
            pairs.append((tf.constant(leaves[stored.name]), fresh))
        for stored_values, fresh in pairs:
            a, b = (np.asarray(v, "float64") for v in (stored_values, fresh))
            yield float(np.max(np.abs(a - b) / (1 + np.abs(b)), initial=0.0))


def _symbol(shape: Sequence[int]) -> keras.KerasTensor:
    return keras.KerasTensor((None, *shape), "float32")
