"""A search by several processes: keras-tuner's chief, and workers of which one dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny

SCRIPT = Path(__file__).with_name("tuning_workers.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The directory with what the processes did."""
    path = tmp_path_factory.mktemp("workers")
    result = subprocess.run(
        [sys.executable, SCRIPT, path],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "-1",
            "PYTHONPATH": os.fspath(Path(tiny.__file__).parent),
        },
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return path


def lines(path):
    return [tuple(line.split()) for line in path.read_text().splitlines()]


def test_every_trial_is_done_once(found):
    trials = json.loads((found / "trials.json").read_text())
    assert sorted(trial["trial"] for trial in trials) == list("01234")
    assert {trial["status"] for trial in trials} == {"COMPLETED"}
    assert all(trial["val_hard_loss"] > 0 for trial in trials)
    done = Counter(float(temperature) for _, temperature in lines(found / "ended"))
    for trial in trials:
        key = min(done, key=lambda t: abs(t - trial["temperature"]))
        assert key == pytest.approx(trial["temperature"], rel=1e-5)
    assert set(done.values()) == {1}
    assert len(done) == len(trials)


def test_a_killed_worker_goes_on_with_its_trial(found):
    began = [what for who, what in lines(found / "began") if who == "worker-1"]
    ended = [what for who, what in lines(found / "ended") if who == "worker-1"]
    assert began[0] == began[1] == ended[0]
    assert len(began) == len(ended) + 1


def test_the_workers_share_one_cache(found):
    # One row shows what there is to store; then all of them, once.
    assert lines(found / "taught") == [("1",), ("24",)]
