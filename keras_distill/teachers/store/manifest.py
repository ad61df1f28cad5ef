"""The manifest: what a cache holds, of which teacher, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_distill.files import TEMPORARY, read_json, write_json
from keras_distill.teachers.base import Teacher
from keras_distill.teachers.store.shards import (
    Shards,
    check_file,
    locked,
    shard_name,
    write_index,
)

FORMAT = 1
MANIFEST = "manifest.json"


def open_manifest(directory: Path, augmented: bool) -> dict[str, Any]:
    """The manifest of a finished cache whose files are whole: see `Cache.open`."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise ValueError(f"There is no cache at {str(directory)!r}.")
    if not manifest["complete"]:
        raise ValueError(
            f"The cache {str(directory)!r} is unfinished. `Cache.build` with the same "
            "arguments goes on where it stopped."
        )
    if manifest["arguments"]["augmented"] and not augmented:
        raise ValueError(
            "`augment` must be the function with which the cache was built: it holds "
            "augmented views. Received: None"
        )
    if augmented and not manifest["arguments"]["augmented"]:
        raise ValueError("`augment` has no effect: the cache was built without one.")
    for entry in [*manifest["shards"], *(manifest["index"] or {}).values()]:
        check_file(directory, entry)
    return manifest


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, finished or not, or None where there is none."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path, "a cache")
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"The cache {str(directory)!r} has format {manifest.get('format')}; this "
            f"version reads format {FORMAT}. Build it anew."
        )
    return manifest


def record_dtype(fields: Sequence[Any]) -> np.dtype:
    """The dtype of a record, from JSON."""
    return np.dtype([(name, dtype, tuple(shape)) for name, dtype, shape in fields])


def identity(manifest: dict[str, Any]) -> str:
    """Tells caches apart by what they hold, wherever they lie."""
    parts = [manifest[name] for name in ("arguments", "fingerprint", "inputs")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def check_own(directory: Path) -> None:
    """Raises ValueError where a new cache would lie among other files."""
    names = {entry.name for entry in directory.iterdir()} - {"lock"}
    found = {name for name in names if not name.startswith(TEMPORARY)}
    if found:
        raise ValueError(
            f"`path` must be a directory of its own. {str(directory)!r} is not a "
            f"cache, and holds {sorted(found)[:3]}."
        )


def check_fingerprint(stored: str, teacher: Teacher, path: str) -> None:
    """Raises ValueError if a cache is not of this teacher."""
    if teacher.fingerprint() != stored:
        raise ValueError(
            f"The cache {path!r} is of another teacher than {teacher!r}: weights or "
            "architecture differ."
        )


def finish(
    directory: Path,
    manifest: dict[str, Any],
    entries: list[dict[str, Any]],
    parts: list[int],
) -> dict[str, Any]:
    """Writes the index, and the manifest that makes the cache a finished one."""
    index = None
    if manifest["arguments"]["key"] == "content":
        views = manifest["arguments"]["views"]
        shards = Shards(directory, entries, record_dtype(manifest["record"]), views)
        index = write_index(directory, shards)
    done = {"complete": True, "shards": entries, "parts": parts, "index": index}
    write_json(directory / MANIFEST, manifest | done)
    return manifest | done


def _part(directory: Path) -> dict[str, Any]:
    """The manifest of a finished, whole part."""
    manifest = read_manifest(directory)
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


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def join_parts(paths: Sequence[Path], directory: Path) -> dict[str, Any]:
    """Makes one cache of parts, and returns its manifest: see `Cache.join`."""
    if not paths:
        raise ValueError("`paths` must name the parts of a cache. Received none.")
    manifests = [_part(one) for one in paths]
    shards = [m["arguments"]["shard"] for m in manifests]
    common = [{**m, "arguments": {**m["arguments"], "shard": None}} for m in manifests]
    same = ("arguments", "fingerprint", "codec", "record", "inputs")
    for other, name in zip(common[1:], paths[1:], strict=True):
        for what in same:
            if other[what] != common[0][what]:
                raise ValueError(
                    f"The parts differ in {what}: {str(paths[0])!r} has "
                    f"{common[0][what]}, {str(name)!r} has {other[what]}."
                )
    number_of_parts = shards[0][1]
    if sorted(shards) != [[i, number_of_parts] for i in range(number_of_parts)]:
        raise ValueError(
            f"`paths` must be all {number_of_parts} parts, each once. Received the "
            f"parts {sorted(shards)}."
        )
    order = sorted(range(len(shards)), key=lambda i: shards[i])
    files = [(paths[i] / e["file"], e) for i in order for e in manifests[i]["shards"]]
    entries = [{**e, "file": shard_name(i)} for i, (_, e) in enumerate(files)]
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        manifest = {**common[0], "complete": False, "shards": [], "parts": []}
        manifest["id"] = identity(manifest)
        there = read_manifest(directory)
        if there is None:
            check_own(directory)
            write_json(directory / MANIFEST, manifest)
        elif there["id"] != manifest["id"]:
            raise ValueError(f"There is another cache at {str(directory)!r}.")
        elif there["complete"] and there["shards"] != entries:
            raise ValueError(
                f"The cache at {str(directory)!r} is of other rows than the parts."
            )
        for (source, _), entry in zip(files, entries, strict=True):
            _link(source, directory / entry["file"])
        parts = [manifests[part]["parts"][0] for part in order]
        return finish(directory, manifest, entries, parts)
