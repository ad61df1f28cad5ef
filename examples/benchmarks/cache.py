"""What a cached teacher saves, and what it costs to build and to keep.

Three training steps in turn, each with its own input pipeline: the student alone, the
student with a cached teacher, the student with the live teacher; and the rows per
second of building the cache. Written to docs/results/cache.json. (`cache_scale.py`
measures what large caches take.)

    python examples/benchmarks/cache.py [--smoke] [--rounds 40]
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
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


def main() -> None:
    """Measures and writes."""
    options = parser("What a cached teacher saves and costs.", "cache").parse_args()
    size = {"teacher": 40, "width": 2, "batch": 64, "rows": 2048}
    size["rounds"] = options.rounds or 40
    if options.smoke:
        size = {"teacher": 16, "width": 1, "batch": 8, "rows": 64}
        size["rounds"] = options.rounds or 2
    keras.utils.set_random_seed(0)
    with tempfile.TemporaryDirectory() as name:
        result = steps(size, Path(name))
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
    default = (TRIALS if options.smoke else RESULTS) / "cache.json"
    title = "What a cached teacher saves and costs"
    write(options.out or default, title, {"setting": setting, **result})


if __name__ == "__main__":
    main()
