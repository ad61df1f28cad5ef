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
    assert {"teacher.keras", "backup_64"} <= {path.name for path in tmp_path.iterdir()}


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    out = tmp_path / "faults.json"
    run("benchmarks/faults.py", "--out", os.fspath(out))
    for outcome in json.loads(out.read_text())["outcome"].values():
        assert outcome["kills"] == 2
        assert outcome["batches trained, with those taken back"] >= 63
        assert outcome["rows lost"] == outcome["rows repeated"] == 0
        assert outcome["variables that differ in any bit"] == 0


def test_what_distribution_costs(tmp_path):
    out = tmp_path / "distribution.json"
    run("benchmarks/distribution.py", "--out", os.fspath(out))
    steps = json.loads(out.read_text())["one step of the same global batch"]
    assert steps["1 device"]["bytes summed"] == 0
    # Once by the step, once by the optimizer.
    assert (
        steps["2 workers"]["bytes summed"]
        >= 2 * steps["2 workers"]["bytes of the weights"]
    )


def test_devices(tmp_path):
    out = tmp_path / "gpu.json"
    printed = run("benchmarks/gpu.py", "--out", os.fspath(out))
    assert "Found: no GPU, 2 logical devices." in printed
    assert "distillation" in json.loads(out.read_text())["median milliseconds"]
