"""What a step of mutual learning costs, beside a plain step of one network.

Two equal networks (ResNet-14, 16 wide) learn from each other, updated together or in
turn; the plain step trains one of them alone. The cases take turns, one step each per
round. Written to docs/results/mutual_cost.json.

    python examples/benchmarks/mutual_cost.py [--smoke] [--rounds 40]
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

PLAIN = "plain step"
BOUNDS = {"together": 2.1, "in_turn": 2.5}


def compile_options() -> dict[str, Any]:
    """New objects for each model: an optimizer belongs to one."""
    return {
        "optimizer": keras.optimizers.SGD(0.01, momentum=0.9),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }


def step(model: keras.Model, data: tf.data.Dataset) -> Callable[[], Any]:
    """One training step, with the function that `fit` made and uses."""
    model.compile(**compile_options())
    model.fit(data, steps_per_epoch=1, verbose=0)
    iterator = iter(data)
    return lambda: model.train_function(iterator)


def main() -> None:
    """Measures and writes."""
    options = parser("What mutual learning costs.", "mutual_cost").parse_args()
    depth, size, batch, rounds = 14, 32, 128, options.rounds or 40
    if options.smoke:
        depth, size, batch, rounds = 8, 16, 8, options.rounds or 2
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x = random.random((batch, size, size, 3), "float32")
    y = random.integers(0, 10, batch)
    data = tf.data.Dataset.from_tensors((x, y)).cache().repeat()

    def network() -> keras.Model:
        return resnet(depth, input_shape=x.shape[1:])

    cases = {PLAIN: step(network(), data)}
    for updates in BOUNDS:
        networks = [network(), network()]
        cases[updates] = step(kd.MutualLearning(networks, updates=updates), data)
    times = interleaved(cases, rounds)
    ratios = {
        f"({updates}) / ({PLAIN})": {
            clock: median_ratio(times[updates][clock], times[PLAIN][clock])
            for clock in ("wall", "cpu")
        }
        | {"to reach": bound}
        for updates, bound in BOUNDS.items()
    }
    result = {
        "setting": {
            "networks": f"two of {network().name}",
            "batch": batch,
            "image": f"{size} x {size} x 3",
            "rounds": rounds,
        },
        "median milliseconds": {
            name: {
                clock: 1e3 * statistics.median(values)
                for clock, values in clocks.items()
            }
            for name, clocks in times.items()
        },
        "ratios": ratios,
    }
    for name, values in ratios.items():
        print(
            f"{name:<28} {values['wall']:6.3f}  {values['cpu']:6.3f} CPU  "
            f"to reach {values['to reach']}"
        )
    default = (TRIALS if options.smoke else RESULTS) / "mutual_cost.json"
    write(options.out or default, "What a step of mutual learning costs", result)


if __name__ == "__main__":
    main()
