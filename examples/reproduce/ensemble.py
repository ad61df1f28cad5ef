"""An ensemble of five networks in one (Hinton et al., arXiv:1503.02531).

MNIST with few labels: 500 labelled images, and 5,000 without labels. Each seed trains
five small convolutional networks on the labelled images, from other initial weights and
in another order each; then students of the same size, all from the same initial
weights:

* from the labels alone, which is one more single network;
* taught by the ensemble (arithmetic, T = 4) on the labelled images alone;
* taught by the ensemble on both, labelled and unlabelled images mixed in one fit;
* taught on both by the first of the five networks, to tell what the ensemble adds from
  what the additional images add.

Adam, batches of 50, 60 epochs over the labelled images or 15 over both; students that
are taught learn from 0.1 x labels + 0.9 x soft targets. Accuracy is that of the last
epoch on the 10,000 test images. Results go to docs/results/ensemble.json: the same
command goes on where a run was interrupted.

    TFDS_DATA_DIR=... python examples/reproduce/ensemble.py [--seeds 3] [--smoke]
"""

from __future__ import annotations

import statistics
from typing import Any

import keras
import numpy as np
from experiment import Experiment, means, parser, plot_gains

import keras_distill as kd

MEMBERS = 5
BATCH = 50
SINGLE = "mean single network"

Arrays = tuple[np.ndarray, np.ndarray]


def network(shape: tuple[int, ...], width: int, seed: int) -> keras.Model:
    """Two convolutions, each of which halves the image, and a dense layer."""

    def start(place: int) -> keras.Initializer:
        return keras.initializers.HeNormal(seed=10 * seed + place)

    def convolution(channels: int, size: int) -> keras.Layer:
        return keras.layers.Conv2D(
            channels,
            size,
            strides=2,
            padding="same",
            activation="relu",
            kernel_initializer=start(size),
        )

    return keras.Sequential(
        [
            keras.Input(shape),
            convolution(width, 5),
            convolution(2 * width, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(10, kernel_initializer=start(0)),
        ]
    )


def options() -> dict[str, Any]:
    """What every network is compiled with."""
    return {
        "optimizer": keras.optimizers.Adam(1e-3),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }


def trained(model: Any, data: Arrays, seed: int, epochs: int) -> Any:
    """A network or a distiller after its training."""
    keras.utils.set_random_seed(seed)
    model.compile(**options())
    model.fit(*data, batch_size=BATCH, epochs=epochs, verbose=0)
    return model


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """In percent."""
    return 100 * float(np.mean(logits.argmax(-1) == labels))


def load(smoke: bool) -> tuple[Arrays, Arrays, Arrays]:
    """Labelled images, those and unlabelled ones (label -1), test images."""
    data = kd.datasets.load("digits" if smoke else "mnist")
    x, y = data.train
    few, count = (100, 1000) if smoke else (500, 5500)
    labels = np.where(np.arange(count) < few, y[:count], -1).astype("int32")
    return (x[:few], y[:few]), (x[:count], labels), data.test


def main() -> None:
    """Runs what is missing in the result file."""
    chosen = parser(__doc__.splitlines()[0], "ensemble", seeds=3).parse_args()
    few, both, test = load(chosen.smoke)
    seeds, width = (1, 4) if chosen.smoke else (chosen.seeds, 16)
    long, short = (2, 1) if chosen.smoke else (60, 15)
    shape = few[0].shape[1:]
    experiment = Experiment(
        chosen,
        "ensemble",
        "An ensemble of five networks in one",
        {
            "networks": f"two convolutions, {width} and {2 * width} channels",
            "labelled images": len(few[1]),
            "unlabelled images": len(both[1]) - len(few[1]),
            "epochs": f"{long} over the labelled images, {short} over both",
            "command": "python examples/reproduce/ensemble.py",
        },
        lambda rows: means(rows, "accuracy %", SINGLE),
    )

    def tested(model: keras.Model) -> np.ndarray:
        return model.predict(test[0], batch_size=1000, verbose=0)

    for seed in range(seeds):
        if experiment.has("ensemble of 5", seed):
            continue
        starts = [10 * seed + place for place in range(MEMBERS + 1)]
        members = [
            trained(network(shape, width, start), few, start, long)
            for start in starts[1:]
        ]
        logits = [tested(member) for member in members]
        singles = [accuracy(z, test[1]) for z in logits]
        ensemble = kd.teachers.Ensemble(members)
        mean, _ = ensemble(test[0], [], 1.0)
        found = {SINGLE: statistics.mean(singles)}
        for name, teacher, data, epochs in (
            ("student of labels", None, few, long),
            ("student of the ensemble", ensemble, few, long),
            ("student of the ensemble, unlabelled images", ensemble, both, short),
            ("student of one network, unlabelled images", members[0], both, short),
        ):
            student = network(shape, width, starts[0])
            learner = student if teacher is None else kd.Distiller(student, teacher)
            trained(learner, data, starts[0], epochs)
            found[name] = accuracy(tested(student), test[1])
        found["ensemble of 5"] = accuracy(keras.ops.convert_to_numpy(mean), test[1])
        for name, value in found.items():
            experiment.add(name, seed, [{"accuracy %": value}])
    plot_gains(
        experiment.rows,
        "accuracy %",
        SINGLE,
        experiment.path.with_suffix(".png"),
        "test accuracy, points above the mean of the five networks, same seed",
    )


if __name__ == "__main__":
    main()
