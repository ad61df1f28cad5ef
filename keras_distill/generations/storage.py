"""Finished generations on disk, and the one in progress."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import keras

from keras_distill.callbacks import Backup
from keras_distill.distribute.workers import is_chief
from keras_distill.files import read_json, whole, write_json

_FORMAT = 1
_WRITER = "a chain of generations"


class Storage:
    """A folder with the generations of one chain.

    A finished generation is `generation_<i>.keras`, with `generation_<i>.json` beside
    it: its logs, the file's checksum and the checksum of the generation that taught it.
    Every file is written to a temporary name and renamed, the model last, so that a
    model in place is complete. `generation_<i>.progress` holds the one in progress.

    Args:
        directory: The folder; made if needed.
        settings: What the chain is: another one in the same folder is refused.

    Raises:
        ValueError: If the folder holds another chain, or models that are not part of
            any.
    """

    def __init__(self, directory: str | os.PathLike, settings: dict[str, Any]) -> None:
        self._folder = Path(directory)
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = {"format": _FORMAT, **json.loads(json.dumps(settings))}
        path = self._folder / "chain.json"
        if path.exists():
            found = read_json(path, _WRITER)
            if found != settings:
                raise ValueError(
                    f"`directory`: {str(self._folder)!r} holds another chain, with the "
                    f"settings {found}. This one has {settings}. Choose another folder."
                )
            return
        foreign = sorted(p.name for p in self._folder.glob("generation_*"))
        if foreign:
            raise ValueError(
                f"`directory`: {str(self._folder)!r} holds {foreign[:3]}, but no "
                "chain.json, so no chain of generations wrote them. Choose another "
                "folder."
            )
        write_json(path, settings, several=True)

    def load(self, index: int) -> tuple[keras.Model, dict[str, Any]] | None:
        """A finished generation and its logs, or None.

        Raises:
            ValueError: If a file is truncated, foreign, or of another chain.
        """
        model, record = self._model(index), self._record(index)
        if not model.exists():
            return None
        if not record.exists():
            raise ValueError(
                f"{str(model)!r} was not written by this chain: {record.name} is "
                "missing. Delete it to train that generation again."
            )
        about = read_json(record, _WRITER)
        if about.get("checksum") != _checksum(model):
            raise ValueError(
                f"{str(model)!r} is truncated or was changed: its checksum is not the "
                f"one in {record.name}. Delete it to train that generation again."
            )
        if about["teacher"] != self._teacher(index):
            raise ValueError(
                f"{str(model)!r} was taught by another generation {index - 1} than the "
                "one in this folder. Delete it to train it again."
            )
        return keras.saving.load_model(model, compile=False), about["history"]

    def save(self, index: int, model: keras.Model, history: dict[str, Any]) -> None:
        """Writes a finished generation, and removes what was kept of its progress."""
        with whole(self._model(index)) as temporary:
            model.save(temporary)
            about = {
                "checksum": _checksum(temporary),
                "teacher": self._teacher(index),
                "history": history,
            }
            write_json(self._record(index), about)
        shutil.rmtree(self._progress(index), ignore_errors=True)

    def callbacks(self, index: int) -> list[keras.callbacks.Callback]:
        """What lets the generation in progress go on: its logs, then its state."""
        folder = self._progress(index)
        return [Record(folder / "logs.json"), Backup(folder / "backup.kd")]

    def _model(self, index: int) -> Path:
        return self._folder / f"generation_{index}.keras"

    def _record(self, index: int) -> Path:
        return self._folder / f"generation_{index}.json"

    def _progress(self, index: int) -> Path:
        return self._folder / f"generation_{index}.progress"

    def _teacher(self, index: int) -> str | None:
        if index == 0:
            return None
        return read_json(self._record(index - 1), _WRITER)["checksum"]


class Record(keras.callbacks.Callback):
    """The logs of all epochs, also of those before an interruption.

    Args:
        path: A JSON file that keeps them, or None.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self._path = path
        self._epochs: list[dict[str, float]] = []
        if path is not None and path.exists():
            self._epochs = read_json(path, _WRITER, list)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del self._epochs[epoch:]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._epochs.append({k: float(v) for k, v in (logs or {}).items()})
        if self._path is not None and is_chief(self.model.distribute_strategy):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._epochs)

    @property
    def history(self) -> dict[str, list[float]]:
        """The logs as lists, one number per epoch."""
        names = dict.fromkeys(name for logs in self._epochs for name in logs)
        return {n: [logs[n] for logs in self._epochs if n in logs] for n in names}


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
