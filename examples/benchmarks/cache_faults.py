"""Kills the building of a cache at random moments, and compares what comes out.

A process that builds a cache is killed (SIGKILL) at a random moment and started again,
which goes on until the cache is finished; if it is finished before there were enough
kills, another one is begun. Every file must be the same, byte by byte, as that of a
build that nobody killed. Written to docs/results/cache_faults.json.

    python examples/benchmarks/cache_faults.py [--smoke] [--rounds 10]

`--rounds` is the number of kills.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from measure import RESULTS, TRIALS, parser, write

import keras_distill as kd
from keras_distill.files import TEMPORARY
from keras_distill.teachers.store import shards

FEATURES, CLASSES = 16, 100


def build(path: Path, rows: int, taught: Path) -> None:
    """Builds a cache; notes how many rows the teacher was asked for."""
    shards.SHARD_ROWS = 2048

    class Noted(kd.teachers.Model):
        """A model whose batches are counted, also if the process does not end well."""

        def __call__(self, x: Any, taps: Any, temperature: Any) -> tuple[Any, dict]:
            def note(value: np.ndarray) -> np.ndarray:
                with open(taught, "a") as file:
                    file.write(f"{len(value)}\n")
                return value

            x = tf.ensure_shape(tf.numpy_function(note, [x], x.dtype), x.shape)
            return super().__call__(x, taps, temperature)

    start = keras.initializers.GlorotUniform(seed=0)
    dense = keras.layers.Dense(CLASSES, kernel_initializer=start)
    model = keras.Sequential([keras.Input((FEATURES,)), dense])
    x = np.random.default_rng(0).normal(size=(rows, FEATURES)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices(x)
    kd.teachers.Cache.build(
        Noted(model), data, path, top_k=10, temperatures=(4.0,), batch_size=256
    )


def started(path: Path, rows: int, taught: Path) -> int:
    """A process that builds the cache. TensorFlow must not have run in this one."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        build(path, rows, taught)
        status = 0
    finally:
        os._exit(status)


def count(taught: Path) -> int:
    """Rows that the teacher was asked for until now."""
    return sum(map(int, taught.read_text().split())) if taught.exists() else 0


def killed(path: Path, rows: int, taught: Path, when: float) -> dict[str, Any] | None:
    """Kills one process `when` seconds after its first batch; None if it has ended."""
    before, process = count(taught), started(path, rows, taught)
    ended = 0
    while not ended and count(taught) == before:
        time.sleep(0.001)
        ended, status = os.waitpid(process, os.WNOHANG)
    deadline = time.perf_counter() + when
    while not ended and time.perf_counter() < deadline:
        time.sleep(0.001)
        ended, status = os.waitpid(process, os.WNOHANG)
    if ended:
        assert status == 0, "the build has failed"
        return None
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    names = [file.name for file in path.iterdir()]
    whole = sum(name.startswith("shard") and name.endswith(".bin") for name in names)
    return {
        "seconds after its first batch": when,
        "whole shards": whole,
        "a file half written": any(n.startswith(TEMPORARY) for n in names),
        "index": "index-keys.bin" in names,
    }


def differing(path: Path, reference: Path) -> list[str]:
    """Names of the files that differ in any byte, or are only in one directory."""
    files = [
        {f.name: f.read_bytes() for f in folder.iterdir()}
        for folder in (path, reference)
    ]
    names = files[0].keys() | files[1].keys()
    return sorted(name for name in names if files[0].get(name) != files[1].get(name))


def main() -> None:
    """Kills, compares and writes."""
    title = "Killing a process that builds a cache"
    options = parser(f"{title}.", "cache_faults").parse_args()
    rows = 20_000 if options.smoke else 100_000
    wanted = options.rounds or (2 if options.smoke else 10)
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = folder / "reference"
        process = started(reference, rows, folder / "reference.txt")
        while not (folder / "reference.txt").exists():
            time.sleep(0.001)
        begun = time.perf_counter()
        assert os.waitpid(process, 0)[1] == 0
        whole = time.perf_counter() - begun
        needed = count(folder / "reference.txt")
        kills: list[dict[str, Any]] = []
        builds: list[dict[str, Any]] = []
        while len(kills) < wanted:
            path, taught = (folder / f"{len(builds)}{end}" for end in ("", ".txt"))
            here = len(kills)
            while len(kills) < wanted:
                # On average a fifth of what a whole build takes.
                when = generator.uniform(0, 0.4) * whole
                kill = killed(path, rows, taught, when)
                if kill is None:
                    break
                kills.append({"build": len(builds), **kill})
                print(kills[-1], flush=True)
            else:
                assert os.waitpid(started(path, rows, taught), 0)[1] == 0
            files = differing(path, reference)
            assert not files, f"these files differ: {files}"
            builds.append(
                {
                    "build": len(builds),
                    "kills": len(kills) - here,
                    "files compared": len(list(reference.iterdir())),
                    "files that differ": len(files),
                    "rows that the teacher saw again": count(taught) - needed,
                }
            )
    setting = {
        "rows": rows,
        "classes": CLASSES,
        "rows per shard": 2048,
        "seconds of a build that is not killed": whole,
    }
    default = (TRIALS if options.smoke else RESULTS) / "cache_faults.json"
    result = {"setting": setting, "builds": builds, "kills": kills}
    write(options.out or default, title, result)


if __name__ == "__main__":
    main()
