"""The scripts about runs on several devices, and runs that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script, *arguments):
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, "--smoke", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_distributed(tmp_path):
    printed = run("distributed.py", "--out", os.fspath(tmp_path))
    assert printed.startswith("1 replicas, test accuracy 0.")
    assert {"teacher.keras", "backup"} <= {path.name for path in tmp_path.iterdir()}


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    out = tmp_path / "faults.json"
    run("benchmarks/faults.py", "--out", os.fspath(out))
    result = json.loads(out.read_text())
    assert sum(result["kills by moment"].values()) == 2
    outcome = result["outcome"]
    assert outcome["batches trained, with those taken back"] >= 63
    assert outcome["rows lost"] == outcome["rows repeated"] == 0
    assert outcome["variables that differ in any bit"] == 0
