"""The folder of a search says which search it is of.

keras-tuner goes on with whatever it finds in its folder. So the first trial leaves a
note there of what was searched, and what does not agree with it is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from keras_distill.files import read_json

_NOTE = "distillation.json"


def check_folder(tuner: Any, identity: dict[str, Any], write: bool) -> None:
    """Raises ValueError if the trials in a tuner's folder are of another search.

    Args:
        tuner: A tuner of keras-tuner.
        identity: What makes a search this one, as JSON.
        write: Whether a folder without a note gets one.
    """
    folder = Path(tuner.project_dir)
    note = folder / _NOTE
    text = json.dumps(identity, indent=1)
    if write and not note.exists() and not _has_results(folder):
        # Several workers may come here at once; a link appears whole, and only once.
        own = note.with_suffix(f".{os.getpid()}")
        own.write_text(text)
        with contextlib.suppress(FileExistsError):
            os.link(own, note)
        own.unlink()
    if note.exists():
        found, wanted = read_json(note, "a search"), json.loads(text)
        other = [key for key in wanted if found.get(key) != wanted[key]]
    else:
        other = ["hypermodel"] if _has_results(folder) else []
    if other:
        raise ValueError(
            f"The folder {folder} holds the trials of another search: another "
            f"{', '.join(other)}. Give the tuner another `directory` or "
            "`project_name`, or overwrite=True."
        )


def _has_results(folder: Path) -> bool:
    """Whether a trial has ended well. Only then has a search of ours left its note."""
    # As text: another worker's file may be half written at this moment.
    return any(
        '"status": "COMPLETED"' in path.read_text()
        for path in folder.glob("trial_*/trial.json")
    )
