"""Two processes started by the launcher do what one does, and survive a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from distribution import worker

from keras_distill import launch as launcher

WORKERS = 2


def launch(directory, *arguments, options=()):
    """Runs the script as workers; returns what each found, and what was printed.

    With options the launcher is run as a file, which starts faster.
    """
    script = str(Path(worker.__file__))
    how = [launcher.__file__] if options else ["-m", "keras_distill.launch"]
    result = subprocess.run(
        [sys.executable, *how, "--workers", str(WORKERS), *options]
        + [script, str(directory), *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = []
    for index in range(WORKERS):
        with np.load(directory / f"weights-{index}.npz") as file:
            weights = list(file.values())
        logs = json.loads((directory / f"found-{index}.json").read_text())
        found.append((weights, logs))
    return found, result.stderr


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("workers"))[0]


def test_workers_equal_one_process(workers):
    weights, expected, _ = worker.run()
    for found, logs in workers:
        for value, wanted in zip(found, weights, strict=True):
            error = np.linalg.norm(value - wanted)
            assert error <= 1e-5 * max(np.linalg.norm(wanted), 0.1)
        for name, values in expected["history"].items():
            assert logs["history"][name] == pytest.approx(values, rel=1e-5), name
        assert logs["evaluate"] == pytest.approx(expected["evaluate"], rel=1e-4)


@pytest.mark.parametrize(("kind", "epochs"), [("per_epoch", 2), ("arrays", 1)])
def test_every_row_is_seen_by_one_worker(workers, kind, epochs):
    seen = [[i for i in logs[kind] if i] for _, logs in workers]
    assert all(seen)
    assert Counter(seen[0] + seen[1]) == dict.fromkeys(
        range(1, worker.ROWS + 1), epochs
    )


def test_workers_with_different_weights_are_refused(workers):
    for _, logs in workers:
        assert "different values of the variables: replicas [1]" in logs["refused"]


def test_a_killed_worker_is_named_and_the_run_continues(workers, tmp_path):
    again, printed = launch(tmp_path, "8", options=["--restarts", "1"])
    assert "launch: worker 1 was killed by SIGKILL; all workers were" in printed
    assert (tmp_path / "died").exists()
    for (found, logs), (wanted, expected) in zip(again, workers, strict=True):
        for value, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(value, other)
        last = {name: values[-1] for name, values in logs["history"].items()}
        for name, values in expected["history"].items():
            # The workers' parts of a running mean come back added up.
            assert last[name] == pytest.approx(values[-1], rel=1e-6), name
    # The last backup knew of two batches of the second epoch.
    rows = sum(len([i for i in logs["per_epoch"] if i]) for _, logs in again)
    assert rows == worker.ROWS - 2 * worker.BATCH
