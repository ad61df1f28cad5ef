"""Two networks that teach each other, beside the same two trained alone.

Neither network is a teacher: each learns from the labels and from the other's
predictions, from the same initial weights as when it is trained alone. Run from the
root of the project:

    python examples/mutual.py [--dataset digits|mnist|cifar10] [--smoke]
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from small import Task, options

import keras_distill as kd


def main() -> None:
    """Trains and prints."""
    task = Task(options(__doc__.splitlines()[0]))
    factors = {"large": 1.0, "small": 0.5}
    start = {name: task.network(factor) for name, factor in factors.items()}

    def copies() -> list[keras.Model]:
        networks = [task.network(factor) for factor in factors.values()]
        for network, first in zip(networks, start.values(), strict=True):
            network.set_weights(first.get_weights())
        return networks

    for name, network in zip(factors, copies(), strict=True):
        task.show(f"{name} network, alone", task.trained_alone(network))
    for updates in ("in_turn", "together"):
        mutual = kd.MutualLearning(copies(), updates=updates)
        # One optimizer: it is cloned for each network.
        mutual.compile(**task.compile_options())
        mutual.fit(*task.train, epochs=task.epochs, **task.fit)
        for name, network in zip(factors, mutual.networks, strict=True):
            task.show(f"{name} network, mutual, updated {updates}", network)
        task.show(f"mean of both, updated {updates}", mutual)


if __name__ == "__main__":
    main()
