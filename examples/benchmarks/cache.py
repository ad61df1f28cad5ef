"""What a cached teacher saves, and what it costs to build and to keep.

Three training steps in turn, each with its own input pipeline: the student alone, the
student with a cached teacher, the student with the live teacher. Then the size of a row
and the rows per second of building and of reading, and a simulation of a large set, in
which memory must stay flat. Written to docs/results/cache.json.

    python examples/benchmarks/cache.py [--smoke] [--rounds 40]
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from measure import RESULTS, TRIALS, interleaved, median_ratio, parser, write
from models import wide_resnet

import keras_distill as kd


def compile_options() -> dict[str, Any]:
    """New objects for each model: an optimizer belongs to one."""
    return {
        "optimizer": keras.optimizers.SGD(0.01, momentum=0.9),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }


def step(model: keras.Model, rows: tf.data.Dataset, batch: int) -> Callable[[], Any]:
    """One training step as `fit` makes it, with the reading of its batch."""
    model.compile(**compile_options())
    data = rows.repeat().shuffle(1000).batch(batch).prefetch(tf.data.AUTOTUNE)
    model.fit(data, steps_per_epoch=1, verbose=0)
    iterator = iter(data)
    return lambda: model.train_function(iterator)


def steps(size: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The three steps, and the cache that the second one reads."""
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (size["rows"], 32, 32, 3)).astype("float32") / 255
    rows = tf.data.Dataset.from_tensor_slices((x, random.integers(0, 10, len(x))))
    teacher = wide_resnet(size["teacher"], size["width"])

    def student() -> keras.Model:
        return wide_resnet(16, size["width"], seed=0)

    started = time.perf_counter()
    cache = kd.teachers.Cache.build(teacher, rows, directory)
    seconds = time.perf_counter() - started
    batch = size["batch"]
    times = interleaved(
        {
            "student alone": step(student(), rows, batch),
            "cached teacher": step(
                kd.Distiller(student(), cache), cache.attach(rows), batch
            ),
            "live teacher": step(kd.Distiller(student(), teacher), rows, batch),
        },
        size["rounds"],
    )
    return {
        "median milliseconds": {
            name: {
                clock: 1e3 * statistics.median(values)
                for clock, values in clocks.items()
            }
            for name, clocks in times.items()
        },
        "ratios": {
            f"({a}) / ({b})": {
                clock: median_ratio(times[a][clock], times[b][clock])
                for clock in ("wall", "cpu")
            }
            | {"to reach": bound}
            for a, b, bound in (
                ("cached teacher", "student alone", 1.05),
                ("live teacher", "student alone", None),
                ("live teacher", "cached teacher", None),
            )
        },
        "rows per second, building": {teacher.name: len(x) / seconds},
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


FEATURES = 16


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


def simulation(
    rows: int, classes: int, directory: Path, **options: Any
) -> dict[str, Any]:
    """Builds and reads a cache of many rows; memory and speed on the way."""
    data = imagined_rows(rows)
    with watched() as memory:
        started = time.perf_counter()
        cache = kd.teachers.Cache.build(
            Imagined(FEATURES, classes), data, directory, batch_size=512, **options
        )
        built = time.perf_counter()
        read = sum(1 for _ in cache.attach(data).batch(512))
        done = time.perf_counter()
        alone = sum(1 for _ in data.batch(512))
        again = time.perf_counter()
    assert read == alone == -(-rows // 512)
    size = sum(file.stat().st_size for file in directory.iterdir())
    early = max(memory[: max(len(memory) // 5, 1)], default=0.0)
    return {
        "rows": rows,
        "classes": classes,
        "options": " ".join(f"{name}={value}" for name, value in options.items()),
        "bytes per row": size / rows,
        "rows per second, building": rows / (built - started),
        "rows per second, reading": rows / (done - built),
        "microseconds per row, attach": 1e6 * (2 * done - built - again) / rows,
        "MiB of memory, most in the first fifth": early,
        "MiB of memory, most at all": max(memory, default=0.0),
    }


def main() -> None:
    """Measures and writes."""
    options = parser("What a cached teacher saves and costs.", "cache").parse_args()
    size = {"teacher": 40, "width": 2, "batch": 64, "rows": 2048}
    size["rounds"] = options.rounds or 40
    many, some = 1_000_000, 100_000
    if options.smoke:
        size = {"teacher": 16, "width": 1, "batch": 8, "rows": 64}
        size["rounds"] = options.rounds or 2
        many, some = 3_000, 1_000
    keras.utils.set_random_seed(0)
    sparse = {"top_k": 20, "temperatures": (4.0,)}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        result = steps(size, directory / "steps")
        result["sizes"] = [
            simulation(many, 1000, directory / "a", **sparse),
            simulation(many, 1000, directory / "b", **sparse, key="position"),
            simulation(some, 1000, directory / "c"),
            simulation(
                some, 18_000 // (100 if options.smoke else 1), directory / "d", **sparse
            ),
        ]
    setting = {
        "teacher": f"WRN-{size['teacher']}-{size['width']}",
        "student": f"WRN-16-{size['width']}",
        **{name: size[name] for name in ("batch", "rounds")},
        "images": f"{size['rows']} of 32 x 32 x 3",
    }
    for name, values in result["median milliseconds"].items():
        print(f"{name:<34} {values['wall']:8.1f} ms  {values['cpu']:8.1f} ms CPU")
    for name, values in result["ratios"].items():
        bound = f"  to reach {values['to reach']}" if values["to reach"] else ""
        print(f"{name:<34} {values['wall']:8.3f}  {values['cpu']:8.3f} CPU{bound}")
    for row in result["sizes"]:
        print(row)
    default = (TRIALS if options.smoke else RESULTS) / "cache.json"
    title = "What a cached teacher saves and costs"
    write(options.out or default, title, {"setting": setting, **result})


if __name__ == "__main__":
    main()
