"""Every reproduction runs, writes its figures, and does not repeat a finished run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "reproduce"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.stem != "experiment")


@pytest.mark.parametrize("script", SCRIPTS)
def test_reproduction(script, tmp_path):
    out = tmp_path / "result.json"
    command = [
        *(sys.executable, FOLDER / script, "--smoke"),
        *("--out", out, "--runs", tmp_path / "runs"),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    environment.pop("TFDS_DATA_DIR", None)
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads(out.read_text())
    assert {"title", "setting", "summary", "runs", "machine"} == set(written)
    assert all({"run", "seed"} <= set(row) for row in written["runs"])
    assert out.with_suffix(".png").stat().st_size > 5000
