"""Generations of the same network, each taught by the one before it.

The first generation learns from the labels, the later ones from their predecessor's
predictions. Every finished generation is kept in a folder: a run that was interrupted
goes on with the same command. Run from the root of the project:

    python examples/born_again.py [--dataset digits|mnist|cifar10] [--smoke]
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from small import Task, options

import keras_distill as kd


def main() -> None:
    """Trains and prints."""
    chosen = options(__doc__.splitlines()[0])
    task = Task(chosen)
    methods = kd.generations.METHODS
    for method in methods[:1] if chosen.smoke else methods:
        name = f"{chosen.dataset}_{method}_{task.epochs}_{chosen.seed}"
        result = kd.generations.born_again(
            task.network,
            task.compile_options,
            task.train,
            generations=2 if chosen.smoke else 3,
            epochs=task.epochs,
            directory=os.path.join("runs", "born_again", name),
            method=method,
            **task.fit,
        )
        for index, model in enumerate(result.models):
            task.show(f"{method}: generation {index}", model)
        task.show(f"{method}: ensemble of the generations", result.ensemble)
        print()


if __name__ == "__main__":
    main()
