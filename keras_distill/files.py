"""Files that are there whole or not at all, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"  # what a killed process may leave behind begins like this


@contextlib.contextmanager
def whole(path: str | os.PathLike[str], several: bool = False) -> Iterator[Path]:
    """A name to write to; the file takes its place once all of it is on the disk.

    Args:
        path: The place. The name to write to ends like it, for writers that go by that.
        several: Whether several processes may write this file at a time.

    Yields:
        The name. Where the block fails, what was written is removed, and what was at
        the place stays.

    Raises:
        OSError: If it cannot be written, because the disk is full, say.
    """
    path = Path(path)
    own = f"{uuid.uuid4().hex}-" if several else ""
    temporary = path.with_name(f"{TEMPORARY}{own}{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"{path.name} could not be written ({error.strerror or error}); what "
                "was there before is whole",
                str(path.parent),
            ) from error
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name too
    finally:
        os.close(folder)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write to; it takes the place of another once all of it is written.

    Args:
        path: The place. A folder that is there is removed with all that is in it.

    Yields:
        The new folder's name, to be made. Where the block fails, what was written is
        removed, and what was at the place stays. (Unlike a file, it is not forced onto
        the disk.)
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    replaced = path.with_name(f"{TEMPORARY}replaced-{path.name}")
    for left in (temporary, replaced):
        shutil.rmtree(left, ignore_errors=True)  # by a process that was killed
    try:
        yield temporary
        if path.exists():  # a folder that is not empty cannot be renamed over
            os.replace(path, replaced)
        os.replace(temporary, path)
    finally:
        for left in (temporary, replaced):
            shutil.rmtree(left, ignore_errors=True)


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure of matplotlib, in the format of its name, else as PNG."""
    path = Path(path)
    with whole(path if path.suffix else path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=100)


def write_json(path: Path, value: Any, several: bool = False) -> None:
    """Writes JSON."""
    with whole(path, several) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(path: Path, what: str, kind: type = dict) -> Any:
    """What `write_json` wrote: a value of this kind.

    Raises:
        ValueError: If the file is truncated, or was not written by `what`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"it holds no {kind.__name__}")
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is truncated or was not written by {what}: {error}"
        ) from error
    return value
