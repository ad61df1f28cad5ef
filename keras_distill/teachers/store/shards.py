"""Shards: fixed-size records in files that are whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_distill.files import whole

# A shard is what a kill can cost: its rows are in memory until it is written.
SHARD_BYTES = 64 << 20
SHARD_ROWS = 1 << 16
BLOCK = 1 << 22  # what is read or sorted at once
KEY = np.dtype("<u8")


def rows_per_shard(row_bytes: int, step: int) -> int:
    """How many rows a shard holds: a multiple of `step`."""
    rows = min(SHARD_ROWS, SHARD_BYTES // row_bytes)
    return max(rows // step, 1) * step


# -- files --------------------------------------------------------------------------


def write_whole(path: Path, parts: Iterable[Any]) -> dict[str, Any]:
    """Writes a file that is there completely or not at all, also after a power cut.

    Args:
        path: Where.
        parts: Buffers, written one after the other.

    Returns:
        What `check_file` needs: `file`, `bytes`, `crc32`.

    Raises:
        OSError: If it cannot be written.
    """
    size = checksum = 0
    with whole(path) as temporary, open(temporary, "wb") as file:
        for part in parts:
            buffer = memoryview(part).cast("B") if len(part) else b""
            file.write(buffer)
            size += len(buffer)
            checksum = zlib.crc32(buffer, checksum)
    return {"file": path.name, "bytes": size, "crc32": checksum}


def check_file(directory: Path, entry: dict[str, Any]) -> None:
    """Raises ValueError unless a file is as it was written."""
    path = directory / entry["file"]
    size = path.stat().st_size if path.exists() else 0
    if size != entry["bytes"]:
        raise ValueError(
            f"The cache {str(directory)!r} is damaged: {entry['file']} has {size} "
            f"bytes and should have {entry['bytes']}. Build it anew."
        )
    if _checksum(path, size) != entry["crc32"]:
        raise ValueError(
            f"The cache {str(directory)!r} is damaged: the checksum of {entry['file']} "
            "does not fit. Build it anew."
        )


def _checksum(path: Path, size: int) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while size > 0:
            block = file.read(min(BLOCK, size))
            checksum = zlib.crc32(block, checksum)
            size -= len(block)
    return checksum


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds a directory's lock: other processes wait; it ends with the process."""
    with open(directory / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- shards -------------------------------------------------------------------------


def shard_name(index: int) -> str:
    """The file name of a shard."""
    return f"shard-{index:06d}.bin"


def write_shard(path: Path, keys: np.ndarray, records: np.ndarray) -> dict[str, Any]:
    """Writes one shard: a key per row, then `views` records per row, then a checksum.

    The checksum in the file tells a later run that the shard is whole before any
    manifest names it.

    Returns:
        The manifest's entry.
    """
    parts = [part.view("u1").data for part in (keys, records)]
    checksum = zlib.crc32(parts[1], zlib.crc32(parts[0]))
    entry = write_whole(path, [*parts, np.array([checksum], "<u8")])
    return entry | {"rows": len(keys)}


def whole_shard(path: Path, row_bytes: int) -> dict[str, Any] | None:
    """The entry of a shard that a killed run has left, or None if it is damaged."""
    size = path.stat().st_size
    if size <= KEY.itemsize or (size - KEY.itemsize) % row_bytes:
        return None
    with open(path, "rb") as file:
        file.seek(-KEY.itemsize, os.SEEK_END)
        trailer = file.read()
    if _checksum(path, size - len(trailer)) != int.from_bytes(trailer, "little"):
        return None
    return {
        "file": path.name,
        "bytes": size,
        "crc32": _checksum(path, size),
        "rows": (size - KEY.itemsize) // row_bytes,
    }


class Shards:
    """Read access to the rows of all shards, mapped into memory.

    Args:
        directory: Of the cache.
        entries: The manifest's entries.
        record: The dtype of a record.
        views: Records per row.
    """

    def __init__(
        self, directory: Path, entries: list[dict[str, Any]], record: Any, views: int
    ) -> None:
        self.views = views
        self.starts = np.cumsum([0] + [entry["rows"] for entry in entries])
        self.record = record
        self._files = [(directory / e["file"], e["rows"]) for e in entries]
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def keys(self, shard: int) -> np.ndarray:
        """The keys of one shard's rows."""
        return self._mapped(shard)[0]

    def read(
        self, rows: np.ndarray, views: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys and records of some rows, each in one view."""
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        local = rows - self.starts[shards]
        keys = np.empty(len(rows), KEY)
        records = np.empty(len(rows), self.record)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            all_keys, all_records = self._mapped(int(shard))
            keys[here] = all_keys[local[here]]
            records[here] = all_records[local[here] * self.views + views[here]]
        return keys, records

    def _mapped(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        found = self._maps.get(shard)
        if found is None:
            path, rows = self._files[shard]
            whole = np.asarray(np.memmap(path, "u1", "r"))
            split = rows * KEY.itemsize
            keys, rest = whole[:split].view(KEY), whole[split : -KEY.itemsize]
            found = self._maps[shard] = keys, rest.view(self.record)
        return found


# -- the index of the keys ----------------------------------------------------------


def write_index(directory: Path, shards: Shards) -> dict[str, Any]:
    """Writes all keys in rising order, and the row of each.

    Keys are hashes, so that equal ranges of them hold about as many: one range after
    the other is collected and sorted, and memory stays flat.
    """
    count = len(shards)
    ranges = -(-count // BLOCK)
    bounds = [(i << 64) // ranges for i in range(ranges + 1)]
    spans = [np.uint64(b) for b in bounds[:-1]]

    def collected(part: int) -> tuple[np.ndarray, np.ndarray]:
        keys, rows = [], []
        for shard, start in enumerate(shards.starts[:-1]):
            some = shards.keys(shard)
            inside = some >= spans[part]
            if part + 1 < ranges:
                inside &= some < spans[part + 1]
            here = np.flatnonzero(inside)
            keys.append(some[here])
            rows.append(here + start)
        all_keys, all_rows = np.concatenate(keys), np.concatenate(rows)
        order = np.argsort(all_keys, kind="stable")
        return all_keys[order], all_rows[order].astype("<i8")

    files = {"keys": directory / "index-keys.bin", "rows": directory / "index-rows.bin"}
    return {
        name: write_whole(path, (collected(part)[place] for part in range(ranges)))
        for place, (name, path) in enumerate(files.items())
    }


class Index:
    """Finds the rows of keys in the sorted files, mapped into memory."""

    def __init__(self, directory: Path, entries: dict[str, Any]) -> None:
        self._keys, self._rows = (
            np.asarray(np.memmap(directory / entries[name]["file"], dtype, "r"))
            for name, dtype in (("keys", KEY), ("rows", "<i8"))
        )

    def rows(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A row for each key, and whether the key is there at all."""
        places = np.searchsorted(self._keys, keys)
        places = np.minimum(places, len(self._keys) - 1)
        return self._rows[places], self._keys[places] == keys
