"""What a large cache takes: a plan on paper, and a simulation of a million rows.

The plan: bytes, shards, hosts and hours for 1.3 million rows of 1000 classes and for
300 million rows of 18,000 classes. The simulation builds and reads caches of a teacher
that costs next to nothing, so that what is measured is the cache: bytes per row beside
those of the plan, rows per second, and this process's own memory, which must stay flat.
Written to docs/results/cache_scale.json.

    python examples/benchmarks/cache_scale.py [--smoke]
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from measure import RESULTS, TRIALS, parser, write

import keras_distill as kd
from keras_distill.teachers.store.shards import SHARD_BYTES, SHARD_ROWS

FEATURES = 16
RATE = 1000  # rows per second and accelerator: an assumption of the plan


def bytes_per_row(
    classes: int, top_k: int | None, temperatures: int, views: int, key: str
) -> int:
    """What a row takes by the format's description, float16."""
    values = 2 * classes
    if top_k is not None:
        values = top_k * (2 + (2 if classes <= 1 << 16 else 4)) + 4 * temperatures
    seeds = 16 if views > 1 else 0
    index = 16 if key == "content" else 0
    return views * (values + seeds) + 8 + index


def plan(
    rows: int,
    classes: int,
    top_k: int | None,
    views: int,
    key: str,
    hosts: int,
) -> dict[str, Any]:
    """A cache on paper, at one temperature."""
    size = bytes_per_row(classes, top_k, 1, views, key)
    per_shard = min(SHARD_ROWS, SHARD_BYTES // size)
    return {
        "rows": rows,
        "classes": classes,
        "top_k": top_k,
        "views": views,
        "key": key,
        "hosts": hosts,
        "bytes per row": size,
        "GB in all": rows * size / 1e9,
        "GB per host": rows * size / 1e9 / hosts,
        "GB of index": rows * 16 / 1e9 if key == "content" else 0.0,
        "shards": hosts * -(-rows // hosts // per_shard),
        f"hours at {RATE} rows per second and host": rows * views / RATE / hosts / 3600,
    }


class Imagined(kd.teachers.Teacher):
    """A teacher that costs little: as many classes as wanted, from a few numbers."""

    def __init__(self, features: int, classes: int) -> None:
        random = np.random.default_rng(0)
        self.kernel = tf.constant(random.normal(size=(features, classes)), "float32")
        self.outputs = keras.KerasTensor((None, classes))
        self.names = ["logits"]

    def __call__(self, x: Any, taps: Any, temperature: Any) -> tuple[Any, dict]:
        return x @ self.kernel, {}

    def fingerprint(self) -> str:
        return f"imagined {tuple(self.kernel.shape)}"

    def tap_specs(self, taps: Any) -> dict[str, Any]:
        return {}


def imagined_rows(count: int) -> tf.data.Dataset:
    """Rows made on the way, so that the data take no memory."""
    block = 500

    def rows(i: Any) -> Any:
        seed = tf.stack([tf.cast(i, tf.int32), 0])
        return tf.random.stateless_normal((block, FEATURES), seed)

    blocks = tf.data.Dataset.range(count // block).map(rows)
    return blocks.unbatch().apply(tf.data.experimental.assert_cardinality(count))


@contextlib.contextmanager
def watched() -> Iterator[list[float]]:
    """Samples of this process's own memory in MiB (mapped files do not count)."""
    samples: list[float] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.2):
            status = Path("/proc/self/status").read_text()
            line = next(li for li in status.splitlines() if li.startswith("RssAnon"))
            samples.append(int(line.split()[1]) / 1024)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


class Times:
    """Wall and processor seconds since the last reading."""

    def __init__(self) -> None:
        self.read()

    def read(self) -> tuple[float, float]:
        """Both, and begins anew."""
        now = time.perf_counter(), time.process_time()
        before, self._last = getattr(self, "_last", now), now
        return now[0] - before[0], now[1] - before[1]


def simulation(
    rows: int, classes: int, directory: Path, parts: int = 1, **options: Any
) -> dict[str, Any]:
    """Builds and reads a cache of many rows; memory and speed on the way."""
    data = imagined_rows(rows)
    teacher = Imagined(FEATURES, classes)
    path = directory / "whole"
    with watched() as memory:
        times = Times()
        if parts == 1:
            kd.teachers.Cache.build(teacher, data, path, batch_size=512, **options)
        else:
            paths = [directory / str(part) for part in range(parts)]
            for part, own in enumerate(paths):
                kd.teachers.Cache.build(
                    teacher, data, own, batch_size=512, shard=(part, parts), **options
                )
            kd.teachers.Cache.join(paths, path)
        build = times.read()
        read = sum(1 for _ in kd.teachers.Cache.open(path).attach(data).batch(512))
        reading = times.read()
        alone = sum(1 for _ in data.batch(512))
        plain = times.read()
    assert read == alone == -(-rows // 512)
    size = sum(file.stat().st_size for file in path.iterdir())
    early = memory[: max(len(memory) // 5, 1)]
    key = options.get("key", "content")
    top_k = options.get("top_k")
    return {
        "rows": rows,
        "classes": classes,
        "top_k": top_k,
        "key": key,
        "parts": parts,
        "bytes per row": size / rows,
        "on paper": bytes_per_row(classes, top_k, 1, 1, key),
        "rows per second, building": rows / build[0],
        "per CPU second, building": rows / build[1],
        "rows per second, reading": rows / reading[0],
        "CPU microseconds per row, attach": 1e6 * (reading[1] - plain[1]) / rows,
        "MiB of memory, most in the first fifth": max(early, default=0.0),
        "MiB of memory, most at all": max(memory, default=0.0),
    }


def main() -> None:
    """Measures and writes."""
    options = parser("What a large cache takes.", "cache_scale").parse_args()
    many, some, classes = (
        (3_000, 1_000, 200) if options.smoke else (1_000_000, 100_000, 18_000)
    )
    sparse: dict[str, Any] = {"temperatures": (4.0,), "top_k": 20}
    wide: dict[str, Any] = {"temperatures": (4.0,), "top_k": 50, "key": "position"}
    simulations = []
    for rows, count, parts, chosen in (
        (many, 1000, 1, sparse),
        (many, 1000, 4, {**sparse, "key": "position"}),
        (some, 1000, 1, {}),
        (some, classes, 1, wide),
    ):
        with tempfile.TemporaryDirectory() as name:
            row = simulation(rows, count, Path(name), parts, **chosen)
        print(row, flush=True)
        simulations.append(row)
    million, hosts = 1_000_000, 64
    default = (TRIALS if options.smoke else RESULTS) / "cache_scale.json"
    result = {
        "setting": {"storage": "float16", "temperatures": 1, "batch": 512},
        "plan on paper": [
            plan(1_300_000, 1000, None, 1, "content", 1),
            plan(1_300_000, 1000, 20, 1, "content", 1),
            plan(1_300_000, 1000, 20, 16, "content", 1),
            plan(300 * million, 18_000, None, 1, "position", hosts),
            plan(300 * million, 18_000, 50, 1, "position", hosts),
            plan(300 * million, 18_000, 50, 16, "position", hosts),
        ],
        "simulation": simulations,
    }
    write(options.out or default, "What a large cache takes", result)


if __name__ == "__main__":
    main()
