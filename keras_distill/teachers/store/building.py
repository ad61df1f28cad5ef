"""Building: the teacher runs over the data, shard by shard."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_distill.files import write_json
from keras_distill.losses.base import check_positive, number
from keras_distill.teachers.base import Teacher
from keras_distill.teachers.store.codec import Codec
from keras_distill.teachers.store.manifest import (
    FORMAT,
    MANIFEST,
    check_fingerprint,
    check_own,
    finish,
    identity,
    read_manifest,
    record_dtype,
)
from keras_distill.teachers.store.rows import content_keys, inputs_of, row_spec
from keras_distill.teachers.store.shards import (
    KEY,
    Shards,
    rows_per_shard,
    shard_name,
    whole_shard,
    write_shard,
)
from keras_distill.teachers.store.views import OTHER_AUGMENT, stream


def checked_arguments(
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
                "`shard` must be (i, n), the part and the number of parts, with i from "
                f"0 to n - 1. Received: {tuple(shard)}"
            )
    for temperature in temperatures:
        check_positive("temperatures", temperature)
    temperatures = sorted({number(t) for t in temperatures})
    if teacher.one_temperature and len(temperatures) != 1:
        raise ValueError(
            f"{teacher!r} has other outputs at each temperature: `temperatures` must "
            f"be the one at which the cache will be used. Received: {temperatures}"
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


class Builder:
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
        self.directory = directory
        self.arguments = arguments
        self.augment = augment
        self.views = arguments["views"]
        self.paths = [teacher.resolve(tap) for tap in arguments.pop("tap_layers")]
        self.temperature = asked_at(arguments["temperatures"])
        self.rows = dataset.map(lambda *element: (inputs_of(*element),))

    def run(self) -> None:
        """Leaves a finished cache, made now or before."""
        for left in self.directory.glob("*.tmp"):
            left.unlink()
        manifest = read_manifest(self.directory)
        if manifest is None:
            manifest = self._new_manifest()
            write_json(self.directory / MANIFEST, manifest)
        else:
            self._check_same(manifest)
        if not manifest["complete"]:
            self._fill(manifest)

    def _new_manifest(self) -> dict[str, Any]:
        check_own(self.directory)
        first = next(iter(stream(self.rows, self.augment, self.views, 1)), None)
        if first is None:
            raise ValueError("`dataset` is empty: there is no row to store.")
        arguments = self.arguments
        try:
            example = self.teacher(first[-1], self.paths, self.temperature)
        except ValueError as error:
            raise ValueError(
                "The teacher cannot run on a row of `dataset`, which must hold single "
                f"rows, not batches: {error}"
            ) from error
        codec = Codec.of(
            self.teacher,
            self.paths,
            example,
            arguments["dtype"],
            arguments["top_k"],
            tuple(arguments["temperatures"]),
        )
        extra = [("seed", "int32", (2,)), ("view", "int64", ())]
        fields = codec.fields + extra * bool(self.augment)
        record = [
            [name, np.dtype(dtype).str, list(shape)] for name, dtype, shape in fields
        ]
        row_bytes = KEY.itemsize + self.views * record_dtype(record).itemsize
        manifest = {
            "format": FORMAT,
            "complete": False,
            "arguments": arguments,
            "fingerprint": self.teacher.fingerprint(),
            "one_temperature": self.teacher.one_temperature,
            "inputs": row_spec(self.rows.element_spec[0]),
            "codec": json.loads(json.dumps(codec.get_config())),
            "tap_names": _tap_names(arguments["taps"], self.paths),
            "record": record,
            "rows_per_shard": rows_per_shard(row_bytes, self._rows_per_batch),
            "shards": [],
            "parts": [],
            "index": None,
        }
        return manifest | {"id": identity(manifest)}

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
        check_fingerprint(manifest["fingerprint"], self.teacher, path)
        here = row_spec(self.rows.element_spec[0])
        if manifest["inputs"] != here:
            raise ValueError(
                f"There is a cache at {path!r} of rows with {manifest['inputs']}. "
                f"Received rows with {here}."
            )

    def _fill(self, manifest: dict[str, Any]) -> None:
        """Computes what is missing, shard by shard."""
        record = record_dtype(manifest["record"])
        row_bytes = KEY.itemsize + self.views * record.itemsize
        per_shard = manifest["rows_per_shard"]
        entries = self._done(row_bytes, per_shard)
        codec = Codec.from_config(manifest["codec"])
        done = per_shard * len(entries)
        compute = self._compute(codec, record)
        self._check_order(entries, record)
        rest = self.rows.skip(done)
        # Of what is left: rows that were there before would make the rate too high.
        bar = Progress(rest.cardinality().numpy())
        keys: list[np.ndarray] = []
        records: list[np.ndarray] = []

        def flush() -> None:
            path = self.directory / shard_name(len(entries))
            entry = write_shard(path, np.concatenate(keys), np.concatenate(records))
            entries.append(entry)
            keys.clear()
            records.clear()

        count = 0
        for batch in stream(rest, self.augment, self.views, self._rows_per_batch):
            keys.append(batch[0].numpy().view(KEY))
            records.append(compute(*batch))
            count += len(batch[0])
            bar.update(count)
            if count % per_shard == 0:
                flush()
        if keys:
            flush()
        bar.close(count)
        parts = [sum(entry["rows"] for entry in entries)]
        finish(self.directory, manifest, entries, parts)

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
                f"The cache {str(self.directory)!r} is unfinished, and `dataset` is "
                "not the one, or not in the order, with which it was begun: row "
                f"{seen} or the next ones differ. Give the same data without "
                "shuffling, or delete the cache."
            )
        if self.augment is not None:
            one = stream(self.rows.take(1), self.augment, self.views, 1)
            _, records = shards.read(np.zeros(1, int), np.zeros(1, int))
            if next(iter(one))[2].numpy().flat[0] != records["view"][0]:
                raise ValueError(OTHER_AUGMENT)

    def _compute(self, codec: Codec, record: Any) -> Callable[..., np.ndarray]:
        """A function that makes the records of one batch."""
        heads, _ = Codec.heads_of(self.teacher)
        temperature = self.temperature
        spec = stream(self.rows, self.augment, self.views, 1).element_spec[-1]
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


class Progress:
    """A bar with the time left; one line at the end where there is no terminal."""

    def __init__(self, size: int) -> None:
        self._target = int(size) if size > 0 else None
        self._bar = keras.utils.Progbar(
            self._target, unit_name="row", verbose=1 if sys.stdout.isatty() else 2
        )

    def update(self, rows: int) -> None:
        """So many rows are done."""
        if rows != self._target:
            self._bar.update(rows, finalize=False)

    def close(self, rows: int) -> None:
        """All rows are done."""
        if rows:
            self._bar.target = rows
            self._bar.update(rows, finalize=True)


def asked_at(temperatures: Sequence[float]) -> float:
    """The temperature at which the teacher is asked for its outputs."""
    return temperatures[0] if len(temperatures) == 1 else 1.0


def _tap_names(taps: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    """What links may call the taps: by path, or as they were asked for.

    A name that stands for several paths is none: a link has to say which.
    """
    meant: dict[str, set[str]] = {}
    for tap, path in zip(taps, paths, strict=True):
        meant.setdefault(tap, set()).add(path)
    names = {tap: found.pop() for tap, found in meant.items() if len(found) == 1}
    return {path: path for path in paths} | names


def _any_batch(spec: Any) -> tf.TensorSpec:
    return tf.TensorSpec((None, *spec.shape[1:]), spec.dtype)
