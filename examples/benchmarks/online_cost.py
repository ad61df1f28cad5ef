"""What branches cost in training, and what early exit saves in prediction.

* A step of ONE with three branches on ResNet-14 (16 wide, split before the last
  stage), against a plain step and against the ratio of the floating-point operations.
* `predict(threshold=...)` of a network with exits, against the whole network, with
  thresholds at which given shares of the rows leave at the first of three exits.

All cases are run in turn, one each per round. Written to docs/results/online_cost.json:

    python examples/benchmarks/online_cost.py [--smoke] [--rounds 30]
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from measure import RESULTS, TRIALS, interleaved, median_ratio, parser, write
from models import resnet

import keras_distill as kd

BRANCHES = 3


def operations(model: keras.Model) -> int:
    """Multiplications and additions of the convolutions and dense layers for a row."""
    total = 0
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            positions = int(np.prod(layer.output.shape[1:-1]))
            total += 2 * positions * int(np.prod(layer.kernel.shape))
    return total


def step(model: keras.Model, data: tf.data.Dataset) -> Callable[[], Any]:
    """One training step, with the function that `fit` made and uses."""
    model.compile(
        optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(data, steps_per_epoch=1, verbose=0)
    iterator = iter(data)
    return lambda: model.train_function(iterator)


def threshold_for(distiller: kd.BeYourOwnTeacher, x: np.ndarray, share: float) -> float:
    """The threshold at which this share of the rows leaves at the first exit."""
    logits = distiller.predict(x, exit=0, batch_size=256, verbose=0)
    sure = np.asarray(keras.ops.softmax(logits)).max(-1)
    return float(np.quantile(sure, 1 - share))


def main() -> None:
    """Measures and writes."""
    options = parser("What branches cost and exits save.", "online_cost").parse_args()
    depth, width, batch, rows = 14, 16, 128, 1024
    rounds = options.rounds or 30
    if options.smoke:
        depth, width, batch, rows, rounds = 8, 4, 8, 64, options.rounds or 2
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x = random.random((batch, 32, 32, 3), "float32")
    y = random.integers(0, 10, batch)
    data = tf.data.Dataset.from_tensors((x, y)).cache().repeat()

    plain = resnet(depth, width, seed=0)
    one = kd.OneEnsemble.from_model(plain, "stage2", num_branches=BRANCHES)
    stem, branch = operations(one.stem), operations(one.branches[0])
    ratio = (stem + BRANCHES * branch) / (stem + branch)
    steps = {"plain step": step(plain, data), "ONE step": step(one, data)}
    times = interleaved(steps, rounds)

    network = resnet(depth, width, seed=1)
    byot = kd.BeYourOwnTeacher.from_model(network, ["stage1", "stage2"])
    images = random.normal(size=(rows, 32, 32, 3)).astype("float32")
    predict = {"batch_size": 256, "verbose": 0}
    whole = byot.deploy(2)
    starts = range(0, rows, predict["batch_size"])
    cases: dict[str, Callable[[], Any]] = {
        # Batch by batch, as rows that leave early go: without what `predict` costs.
        "whole network": lambda: [
            whole.predict_on_batch(images[i : i + predict["batch_size"]])
            for i in starts
        ]
    }
    for share in (0.0, 0.5, 0.8, 1.0):
        level = threshold_for(byot, images, share) if share else 1.0
        cases[f"{share:.0%} of the rows leave first"] = lambda level=level: (
            byot.predict(images, threshold=level, **predict)
        )
    exits = interleaved(cases, rounds)

    ratios = {
        "(ONE step) / (plain step)": {
            clock: median_ratio(times["ONE step"][clock], times["plain step"][clock])
            for clock in ("wall", "cpu")
        }
        | {"operations": ratio, "to reach": 1.1 * ratio}
    }
    for name in list(cases)[1:]:
        ratios[f"({name}) / (whole network)"] = {
            clock: median_ratio(exits[name][clock], exits["whole network"][clock])
            for clock in ("wall", "cpu")
        } | {"operations": None, "to reach": None}
    result = {
        "setting": {
            "network": plain.name,
            "branches": BRANCHES,
            "split behind": "stage2",
            "batch": batch,
            "image": "32 x 32 x 3",
            "exits behind": "stage1, stage2",
            "rows predicted": rows,
            "rounds": rounds,
        },
        "median milliseconds": {
            name: {
                clock: 1e3 * statistics.median(values)
                for clock, values in clocks.items()
            }
            for name, clocks in {**times, **exits}.items()
        },
        "ratios": ratios,
    }
    for name, values in result["median milliseconds"].items():
        print(f"{name:<32} {values['wall']:8.1f} ms  {values['cpu']:8.1f} ms CPU")
    for name, values in ratios.items():
        print(f"{name:<60} {values['wall']:6.3f}  {values['cpu']:6.3f} CPU")
    print(f"operations of ONE over the plain network: {ratio:.3f}")
    default = (TRIALS if options.smoke else RESULTS) / "online_cost.json"
    title = "What branches cost and exits save"
    write(options.out or default, title, result)


if __name__ == "__main__":
    main()
