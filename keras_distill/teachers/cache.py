"""A teacher's knowledge, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_distill.data import current_epoch
from keras_distill.heads import Head
from keras_distill.losses.base import check_positive, number
from keras_distill.losses.response import SoftTarget
from keras_distill.teachers.base import Teacher, as_teacher
from keras_distill.teachers.codec import Codec
from keras_distill.teachers.keys import (
    content_keys,
    inputs_of,
    row_key,
    view_of,
    view_seeds,
)
from keras_distill.teachers.shards import (
    KEY,
    Index,
    Shards,
    check_file,
    locked,
    rows_per_shard,
    shard_entry,
    shard_name,
    whole_shard,
    write_index,
    write_json,
    write_shard,
)

FORMAT = 1
MANIFEST = "manifest.json"
# Rows are looked up together: as many as fit, up to a limit.
CHUNK_ROWS, CHUNK_BYTES = 128, 8 << 20
OTHER_AUGMENT = (
    "`augment` does not replay the views that the cache holds: it is another function, "
    "or uses randomness other than its seed."
)


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
        record = _record(manifest["record"])
        self._shards = Shards(directory, manifest["shards"], record, self.views)
        self._parts = np.cumsum([0, *manifest["parts"]])
        self._index = None
        if not self._position:
            self._index = Index(directory, manifest["index"])
        # In the data it tells the knowledge of one cache from another's.
        self._id = manifest["id"]

    # -- making -----------------------------------------------------------------------

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
        arguments = _checked(
            teacher, taps, top_k, temperatures, dtype, views, augment, batch_size, key, shard
        )
        _check_dataset("dataset", dataset)
        if shard is not None:
            dataset = dataset.shard(shard[1], shard[0])
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            builder = _Builder(teacher, dataset, directory, arguments, augment)
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
        directory = Path(path)
        manifest = _read_manifest(directory)
        if manifest is None:
            raise ValueError(f"There is no cache at {str(path)!r}.")
        if not manifest["complete"]:
            raise ValueError(
                f"The cache {str(path)!r} is unfinished. `Cache.build` with the same "
                "arguments goes on where it stopped."
            )
        if manifest["arguments"]["augmented"] != (augment is not None):
            raise ValueError(
                "`augment` must be the function with which the cache was built. "
                "Received: None"
                if augment is None
                else "`augment` has no effect: the cache was built without one."
            )
        for entry in [*manifest["shards"], *(manifest["index"] or {}).values()]:
            check_file(directory, entry)
        return cls(path, manifest, augment)

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
        if not paths:
            raise ValueError("`paths` must name the parts of a cache. Received none.")
        manifests = [_part(Path(one)) for one in paths]
        shards = [m["arguments"]["shard"] for m in manifests]
        common = [
            {**m, "arguments": {**m["arguments"], "shard": None}} for m in manifests
        ]
        same = ("arguments", "fingerprint", "codec", "record", "inputs")
        for other, name in zip(common[1:], paths[1:], strict=True):
            for what in same:
                if other[what] != common[0][what]:
                    raise ValueError(
                        f"The parts differ in {what}: {os.fspath(paths[0])!r} has "
                        f"{common[0][what]}, {os.fspath(name)!r} has {other[what]}."
                    )
        number_of_parts = shards[0][1]
        if sorted(shards) != [[i, number_of_parts] for i in range(number_of_parts)]:
            raise ValueError(
                f"`paths` must be all {number_of_parts} parts, each once. Received the "
                f"parts {sorted(shards)}."
            )
        order = sorted(range(len(shards)), key=lambda i: shards[i])
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            manifest = {**common[0], "complete": False, "shards": [], "parts": []}
            manifest["id"] = _identity(manifest)
            there = _read_manifest(directory)
            if there is None:
                _check_own(directory)
                write_json(directory / MANIFEST, manifest)
            elif there["id"] != manifest["id"]:
                raise ValueError(f"There is another cache at {str(path)!r}.")
            entries = []
            for part in order:
                for entry in manifests[part]["shards"]:
                    name = shard_name(len(entries))
                    _link(Path(paths[part]) / entry["file"], directory / name)
                    entries.append({**entry, "file": name})
            parts = [manifests[part]["parts"][0] for part in order]
            _finish(directory, manifest, entries, parts)
        return cls(path, _read_manifest(directory) or {}, None)

    # -- using ------------------------------------------------------------------------

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
        _check_dataset("dataset", dataset)
        self._check_rows(dataset)
        if self._manifest["arguments"]["augmented"]:
            self._check_replay(dataset)
        size = dataset.cardinality()
        chunk = _chunk(dataset)
        numbered = dataset.enumerate().batch(chunk)
        found = numbered.map(
            self._with_knowledge, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
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
        _check_fingerprint(self._manifest["fingerprint"], teacher, self.path)
        _check_dataset("dataset", dataset)
        if rows < 1:
            raise ValueError(f"`rows` must be at least 1. Received: {rows}")
        every = max(len(self._shards) // rows, 1)
        some = dataset.enumerate().filter(lambda i, *_: i % every == 0).take(rows)
        seen, largest = 0, 0.0
        heads, _ = Codec.heads_of(teacher)
        positions = np.arange(rows, dtype="int64") * every
        plain = some.map(lambda i, element: (inputs_of(*_as_tuple(element)),))
        batch_size = self._manifest["arguments"]["batch_size"] // self.views
        for keys, _, _, x in _stream(
            plain, self._augment, self.views, max(batch_size, 1)
        ):
            count = len(keys)
            known, features = teacher(x, self._tap_paths, _asked_at(self.temperatures))
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

    # -- the contract of a teacher ------------------------------------------------------

    def __call__(
        self, x: Any, taps: Sequence[str], temperature: Any
    ) -> tuple[Any, dict[str, Any]]:
        found = x.get("kd_teacher") if isinstance(x, dict) else None
        if found is None:
            raise ValueError(
                "The teacher is a cache, and the data do not hold its knowledge: fit on "
                "`cache.attach(dataset).batch(...)`, with single rows in `dataset`."
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
                f"{self!r} holds {self._manifest['arguments']['top_k']} logits per row: "
                "only SoftTarget (without `standardize`) can use them. Received: "
                f"{loss!r}"
            )

    def check_temperature(self, temperature: float) -> None:
        fits = [abs(temperature - t) <= 1e-6 * t for t in self.temperatures]
        if fits and not any(fits):
            raise ValueError(
                f"`temperature` must be one of {list(self.temperatures)}, for which the "
                f"cache was built. Received: {temperature}"
            )

    def __len__(self) -> int:
        return len(self._shards)

    def __repr__(self) -> str:
        return f"teachers.Cache({self.path!r}, {len(self)} rows)"

    # -- looking up -------------------------------------------------------------------

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
                "with key='position' the data must come in the order in which the cache "
                "was built. Shuffle after `attach`."
            )
        leaves = {s.name: s.read(records) for s in self._codec.stored}
        if self._augment is not None:
            leaves["seed"] = np.ascontiguousarray(records["seed"])
        return leaves

    def _with_knowledge(self, positions: Any, element: Any) -> Any:
        x, *rest = _as_tuple(element)
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

    def _check_rows(self, dataset: tf.data.Dataset) -> None:
        spec = inputs_of(*_as_tuple(dataset.element_spec))
        if isinstance(spec, dict) and "kd_teacher" in spec:
            raise ValueError("`dataset` holds a teacher's knowledge already.")
        here, there = _spec(spec), self._manifest["inputs"]
        if len(here) != len(there) or not all(
            _fits(a, b) for a, b in zip(here, there, strict=True)
        ):
            raise ValueError(
                f"`dataset` must hold single rows as the cache was built from: {there}. "
                f"Received rows with {here}. Attach before `batch` and before "
                "augmentation."
            )

    def _check_first(self, dataset: tf.data.Dataset) -> None:
        """Raises ValueError if the cache was built from other data."""
        rows = dataset.take(1).map(lambda *element: row_key(inputs_of(*element)))
        for key in rows:
            zero = np.zeros(1, "int64")
            self._read(key.numpy()[None], zero, zero)

    def _check_replay(self, dataset: tf.data.Dataset) -> None:
        """Replays one stored view, and compares its hash."""
        if self._augment is None:
            raise ValueError(
                "This cache holds augmented views. Open it with "
                "Cache.open(path, augment=...)."
            )

        def first(position: Any, element: Any) -> Any:
            x = inputs_of(*_as_tuple(element))
            return row_key(x), position, x

        one = dataset.enumerate().take(1).map(first)
        for key, position, _ in one:
            rows = self._rows(key.numpy()[None], position.numpy()[None])
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
        pairs = []
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


class _Builder:
    """One run of `Cache.build`, under the lock of its directory."""

    def __init__(
        self,
        teacher: Teacher,
        dataset: tf.data.Dataset,
        directory: Path,
        arguments: dict[str, Any],
        augment: Any,
    ) -> None:
        self.teacher = teacher
        self.dataset = dataset
        self.directory = directory
        self.arguments = arguments
        self.augment = augment
        self.views = arguments["views"]
        self.paths = [teacher.resolve(tap) for tap in arguments.pop("tap_layers")]
        self.temperature = _asked_at(arguments["temperatures"])
        self.rows = dataset.map(lambda *element: (inputs_of(*element),))

    def run(self) -> None:
        for left in self.directory.glob("*.tmp"):
            left.unlink()
        manifest = _read_manifest(self.directory)
        if manifest is None:
            manifest = self._new_manifest()
            write_json(self.directory / MANIFEST, manifest)
        else:
            self._check_same(manifest)
        if not manifest["complete"]:
            self._fill(manifest)

    def _new_manifest(self) -> dict[str, Any]:
        _check_own(self.directory)
        stream = _stream(self.rows, self.augment, self.views, 1)
        first = next(iter(stream), None)
        if first is None:
            raise ValueError("`dataset` is empty: there is no row to store.")
        arguments = self.arguments
        codec = Codec.of(
            self.teacher,
            self.paths,
            self.teacher(first[-1], self.paths, self.temperature),
            arguments["dtype"],
            arguments["top_k"],
            tuple(arguments["temperatures"]),
        )
        extra = [("seed", "int32", (2,)), ("view", "int64", ())]
        fields = codec.fields + extra * bool(self.augment)
        record = [[name, np.dtype(dtype).str, list(shape)] for name, dtype, shape in fields]
        row_bytes = KEY.itemsize + self.views * _record(record).itemsize
        manifest = {
            "format": FORMAT,
            "complete": False,
            "arguments": arguments,
            "fingerprint": self.teacher.fingerprint(),
            "one_temperature": self.teacher.one_temperature,
            "inputs": _spec(self.rows.element_spec[0]),
            "codec": json.loads(json.dumps(codec.get_config())),
            "tap_names": _tap_names(arguments["taps"], self.paths),
            "record": record,
            "rows_per_shard": rows_per_shard(row_bytes, self._rows_per_batch),
            "shards": [],
            "parts": [],
            "index": None,
        }
        return manifest | {"id": _identity(manifest)}

    @property
    def _rows_per_batch(self) -> int:
        return max(self.arguments["batch_size"] // self.views, 1)

    def _check_same(self, manifest: dict[str, Any]) -> None:
        path = str(self.directory)
        for name, value in self.arguments.items():
            if manifest["arguments"].get(name) != value:
                raise ValueError(
                    f"There is a cache at {path!r} that was built with "
                    f"{name}={manifest['arguments'].get(name)}. Received: {value}. Use "
                    "the same arguments, or another path."
                )
        _check_fingerprint(manifest["fingerprint"], self.teacher, path)
        here = _spec(self.rows.element_spec[0])
        if manifest["inputs"] != here:
            raise ValueError(
                f"There is a cache at {path!r} of rows with {manifest['inputs']}. "
                f"Received rows with {here}."
            )

    def _fill(self, manifest: dict[str, Any]) -> None:
        """Computes what is missing, shard by shard."""
        record = _record(manifest["record"])
        row_bytes = KEY.itemsize + self.views * record.itemsize
        per_shard = manifest["rows_per_shard"]
        entries = self._done(row_bytes, per_shard)
        codec = Codec.from_config(manifest["codec"])
        done = per_shard * len(entries)
        compute = self._compute(codec, record)
        self._check_order(entries, record)
        bar = _Progress(self.rows.cardinality().numpy())
        keys: list[np.ndarray] = []
        records: list[np.ndarray] = []

        def flush() -> None:
            path = self.directory / shard_name(len(entries))
            write_shard(path, np.concatenate(keys), np.concatenate(records))
            entries.append(shard_entry(path, row_bytes))
            keys.clear()
            records.clear()

        rest = self.rows.skip(done)
        count = done
        for batch in _stream(rest, self.augment, self.views, self._rows_per_batch):
            keys.append(batch[0].numpy().view(KEY))
            records.append(compute(*batch))
            count += len(batch[0])
            bar.update(count)
            if (count - done) % per_shard == 0:
                flush()
        if keys:
            flush()
        bar.close(count)
        parts = [sum(entry["rows"] for entry in entries)]
        _finish(self.directory, manifest, entries, parts)

    def _done(self, row_bytes: int, per_shard: int) -> list[dict[str, Any]]:
        """The whole shards of a run before, without gaps."""
        entries: list[dict[str, Any]] = []
        while (path := self.directory / shard_name(len(entries))).exists():
            entry = whole_shard(path, row_bytes)
            # A last, smaller one is made again: the data may have had an error there.
            if entry is None or entry["rows"] != per_shard:
                break
            entries.append(entry)
        return entries

    def _check_order(self, entries: list[dict[str, Any]], record: Any) -> None:
        """Reads past the rows that are done; they must be the same again."""
        shards = Shards(self.directory, entries, record, self.views)
        if not len(shards):
            return
        seen = 0
        batches = self.rows.take(len(shards)).batch(self._rows_per_batch)
        for keys in batches.map(content_keys):
            shard = int(np.searchsorted(shards.starts, seen, side="right")) - 1
            local = seen - shards.starts[shard]
            stored = shards.keys(shard)[local : local + len(keys)]
            if not np.array_equal(stored, keys.numpy().view(KEY)):
                break
            seen += len(keys)
        if seen != len(shards):
            raise ValueError(
                f"The cache {str(self.directory)!r} is unfinished, and the data set is "
                f"not the one, or not in the order, with which it was begun (row {seen} "
                "or the next ones differ). Give the same data without shuffling, or "
                "delete the cache."
            )
        if self.augment is not None:
            one = _stream(self.rows.take(1), self.augment, self.views, 1)
            _, records = shards.read(np.zeros(1, int), np.zeros(1, int))
            if next(iter(one))[2].numpy().flat[0] != records["view"][0]:
                raise ValueError(OTHER_AUGMENT)

    def _compute(self, codec: Codec, record: Any) -> Callable[..., np.ndarray]:
        """A function that makes the records of one batch."""
        heads, _ = Codec.heads_of(self.teacher)
        temperature = self.temperature
        spec = _stream(self.rows, self.augment, self.views, 1).element_spec[-1]
        names = [name for name, _, _ in codec.fields]

        @tf.function(
            input_signature=[tf.nest.map_structure(_any_batch, spec)], autograph=False
        )
        def outputs(x: Any) -> list[Any]:
            known, features = self.teacher(x, self.paths, temperature)
            return codec.encode(heads, known, features)

        def compute(keys: Any, seeds: Any, hashes: Any, x: Any) -> np.ndarray:
            records = np.empty(len(keys) * self.views, record)
            for name, value in zip(names, outputs(x), strict=True):
                field = records[name]
                with np.errstate(over="ignore"):
                    field[...] = value.numpy()
                if field.dtype.kind == "f" and not np.isfinite(field).all():
                    raise ValueError(
                        "The teacher's values are not finite in "
                        f"{field.dtype.name}: they go up to "
                        f"{np.abs(value.numpy()).max()}. Use dtype='float32' if they "
                        "are only large."
                    )
            if self.augment is not None:
                records["seed"] = seeds.numpy().reshape(-1, 2)
                records["view"] = hashes.numpy().reshape(-1)
            return records

        return compute


class _Progress:
    """A bar with the time left; one line at the end where there is no terminal."""

    def __init__(self, size: int) -> None:
        self._target = int(size) if size > 0 else None
        self._bar = keras.utils.Progbar(
            self._target, unit_name="row", verbose=1 if sys.stdout.isatty() else 2
        )

    def update(self, rows: int) -> None:
        if rows != self._target:
            self._bar.update(rows, finalize=False)

    def close(self, rows: int) -> None:
        self._bar.target = rows
        self._bar.update(rows, finalize=True)


# -- rows -----------------------------------------------------------------------------


def _stream(
    rows: tf.data.Dataset, augment: Any, views: int, batch_size: int
) -> tf.data.Dataset:
    """Batches `(keys, seeds, hashes of the views, x)` for the teacher.

    With views, `x` has `views` rows for each key, one after the other.
    """
    if augment is None:
        return rows.batch(batch_size).map(lambda x: _plain(content_keys(x), x))

    def replay(x: Any) -> tf.data.Dataset:
        # As `attach` does it, with the function of a map, so that views are bit-equal.
        key = row_key(x)
        seeds = view_seeds(key, views)
        each = tf.data.Dataset.from_tensor_slices(seeds)
        stacked = each.map(lambda seed: augment(x, seed)).batch(views)
        return stacked.map(lambda view: (key, seeds, content_keys(view), view))

    def flat(keys: Any, seeds: Any, hashes: Any, x: Any) -> Any:
        def joined(leaf: Any) -> Any:
            return tf.reshape(leaf, tf.concat([[-1], tf.shape(leaf)[2:]], 0))

        return keys, seeds, hashes, tf.nest.map_structure(joined, x)

    return rows.flat_map(replay).batch(batch_size).map(flat)


def _plain(keys: Any, x: Any) -> Any:
    return keys, tf.zeros((0, 2), tf.int32), tf.zeros((0,), tf.int64), x


def _as_tuple(element: Any) -> tuple[Any, ...]:
    return element if isinstance(element, tuple) else (element,)


def _chunk(dataset: tf.data.Dataset) -> int:
    """How many rows can be looked up together."""
    specs = tf.nest.flatten(dataset.element_spec)
    shapes = [getattr(spec, "shape", tf.TensorShape([])) for spec in specs]
    if not all(shape.is_fully_defined() for shape in shapes):
        return 1
    sizes = [s.shape.num_elements() * s.dtype.size for s in specs if hasattr(s, "dtype")]
    return max(min(CHUNK_ROWS, CHUNK_BYTES // max(sum(sizes), 1)), 1)


def _spec(structure: Any) -> list[list[Any]]:
    """Names, shapes and dtypes of the leaves, as JSON."""
    return [
        ["/".join(map(str, path)), spec.shape.as_list(), spec.dtype.name]
        for path, spec in keras.tree.flatten_with_path(structure)
    ]


def _fits(here: list[Any], there: list[Any]) -> bool:
    (name, shape, dtype), (other_name, other_shape, other_dtype) = here, there
    return (
        (name, dtype) == (other_name, other_dtype)
        and len(shape) == len(other_shape)
        and all(a == b or None in (a, b) for a, b in zip(shape, other_shape, strict=True))
    )


def _any_batch(spec: Any) -> tf.TensorSpec:
    return tf.TensorSpec((None, *spec.shape[1:]), spec.dtype)


def _symbol(shape: Sequence[int]) -> keras.KerasTensor:
    return keras.KerasTensor((None, *shape), "float32")


def _asked_at(temperatures: Sequence[float]) -> float:
    """The temperature at which the teacher is asked for its outputs."""
    return temperatures[0] if len(temperatures) == 1 else 1.0


# -- manifests ------------------------------------------------------------------------


def _checked(
    teacher: Teacher,
    taps: Any,
    top_k: Any,
    temperatures: Any,
    dtype: Any,
    views: Any,
    augment: Any,
    batch_size: Any,
    key: Any,
    shard: Any,
) -> dict[str, Any]:
    """The arguments of `build` as JSON."""
    if isinstance(teacher, Cache):
        raise ValueError("`teacher` is a cache already. Build from a live teacher.")
    for name, value in (("views", views), ("batch_size", batch_size)):
        if value != int(value) or value < 1:
            raise ValueError(f"`{name}` must be an integer from 1. Received: {value}")
    if top_k is not None and (top_k != int(top_k) or top_k < 1):
        raise ValueError(f"`top_k` must be an integer from 1. Received: {top_k}")
    if views > 1 and augment is None:
        raise ValueError(f"`views={views}` needs `augment`.")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"`dtype` must be 'float16' or 'float32'. Received: {dtype!r}")
    if key not in ("content", "position"):
        raise ValueError(f"`key` must be 'content' or 'position'. Received: {key!r}")
    if shard is not None:
        shard = [int(part) for part in shard]
        if len(shard) != 2 or not 0 <= shard[0] < shard[1]:
            raise ValueError(
                "`shard` must be (i, n), the part and the number of parts, with i from 0 "
                f"to n - 1. Received: {tuple(shard)}"
            )
    for temperature in temperatures:
        check_positive("temperatures", temperature)
    temperatures = sorted({number(t) for t in temperatures})
    if teacher.one_temperature and len(temperatures) != 1:
        raise ValueError(
            f"{teacher!r} has other outputs at each temperature: `temperatures` must be "
            f"the one at which the cache will be used. Received: {temperatures}"
        )
    if top_k is not None and not temperatures:
        raise ValueError(
            "`top_k` needs the `temperatures` at which the cache will be used: the "
            "classes that are left out weigh differently at each."
        )
    if temperatures and top_k is None and not teacher.one_temperature:
        raise ValueError(
            "`temperatures` has no effect without `top_k`: all logits serve at any. "
            f"Received: {temperatures}"
        )
    layers = list(taps)
    return {
        "taps": [tap if isinstance(tap, str) else tap.name for tap in layers],
        "top_k": None if top_k is None else int(top_k),
        "temperatures": temperatures,
        "dtype": dtype,
        "views": int(views),
        "augmented": augment is not None,
        "batch_size": int(batch_size),
        "key": key,
        "shard": shard,
        "tap_layers": layers,
    }


def _tap_names(taps: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    """What links may call the taps: as they were asked for, or by path."""
    return {path: path for path in paths} | dict(zip(taps, paths, strict=True))


def _check_dataset(name: str, dataset: Any) -> None:
    if not isinstance(dataset, tf.data.Dataset):
        raise TypeError(
            f"`{name}` must be a tf.data.Dataset of single rows. For arrays: "
            "tf.data.Dataset.from_tensor_slices((x, y)). Received: "
            f"{type(dataset).__name__}"
        )


def _check_fingerprint(stored: str, teacher: Teacher, path: str) -> None:
    if teacher.fingerprint() != stored:
        raise ValueError(
            f"The cache {path!r} is of another teacher than {teacher!r}: weights or "
            "architecture differ."
        )


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    path = directory / MANIFEST
    if not path.exists():
        return None
    manifest = json.loads(path.read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"The cache {str(directory)!r} has format {manifest.get('format')}; this "
            f"version reads format {FORMAT}. Build it anew."
        )
    return manifest


def _record(fields: Sequence[Any]) -> np.dtype:
    return np.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in fields])


def _identity(manifest: dict[str, Any]) -> str:
    """Tells caches apart by what they hold, wherever they lie."""
    parts = [manifest[name] for name in ("arguments", "fingerprint", "inputs")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def _part(directory: Path) -> dict[str, Any]:
    """The manifest of a finished, whole part."""
    manifest = _read_manifest(directory)
    if manifest is None or not manifest["complete"]:
        state = "no" if manifest is None else "no finished"
        raise ValueError(f"There is {state} cache at {str(directory)!r}.")
    if manifest["arguments"]["shard"] is None:
        raise ValueError(
            f"The cache {str(directory)!r} is not a part: it was built without `shard`."
        )
    for entry in manifest["shards"]:
        check_file(directory, entry)
    return manifest


def _check_own(directory: Path) -> None:
    """Raises ValueError where a new cache would lie among other files."""
    found = {entry.name for entry in directory.iterdir()} - {"lock"}
    if found:
        raise ValueError(
            f"`path` must be a directory of its own. {str(directory)!r} is not a cache, "
            f"and holds {sorted(found)[:3]}."
        )


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _finish(
    directory: Path,
    manifest: dict[str, Any],
    entries: list[dict[str, Any]],
    parts: list[int],
) -> None:
    """Writes the index, and the manifest that makes the cache a finished one."""
    index = None
    if manifest["arguments"]["key"] == "content":
        views = manifest["arguments"]["views"]
        shards = Shards(directory, entries, _record(manifest["record"]), views)
        index = write_index(directory, shards)
    done = {"complete": True, "shards": entries, "parts": parts, "index": index}
    write_json(directory / MANIFEST, manifest | done)
