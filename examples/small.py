"""What the small examples share: options, data, networks, and accuracy."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_distill import datasets


@dataclasses.dataclass(frozen=True)
class Setting:
    """How much of a data set is used, and for how long."""

    images: int  # of the training part
    epochs: int
    widths: Sequence[int]  # channels of the network's layers
    batch_size: int = 64


SETTINGS = {
    "digits": Setting(300, 30, (8, 16, 16)),
    "mnist": Setting(2000, 15, (8, 16, 16)),
    "cifar10": Setting(10000, 20, (32, 64, 64), 128),
}


def options(description: str) -> argparse.Namespace:
    """`--dataset`, `--epochs`, `--seed` and `--smoke`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dataset", choices=list(SETTINGS), default="digits")
    parser.add_argument("--epochs", type=int, help="of each training run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a trial of seconds")
    found = parser.parse_args()
    if found.epochs is not None and found.epochs < 1:
        parser.error(f"--epochs must be 1 or more, not {found.epochs}")
    return found


class Task:
    """A data set, and networks for it.

    Attributes:
        train: Images and labels.
        validation: The same, for decisions.
        test: The same, for the final figures.
        epochs: Of each training run.
        fit: Further arguments of `fit`.
        seeds: For examples that repeat what they do: three, from the one given.
    """

    def __init__(self, chosen: argparse.Namespace) -> None:
        keras.utils.set_random_seed(chosen.seed)
        self.setting = SETTINGS[chosen.dataset]
        self.data = datasets.load(chosen.dataset)
        self.train = tuple(part[: self.setting.images] for part in self.data.train)
        self.validation, self.test = self.data.validation, self.data.test
        self.epochs = chosen.epochs or (2 if chosen.smoke else self.setting.epochs)
        self.fit = {"batch_size": self.setting.batch_size, "verbose": 0}
        self.seeds = range(chosen.seed, chosen.seed + (1 if chosen.smoke else 3))
        print(
            f"{chosen.dataset}: {len(self.train[1])} training images, {self.epochs} "
            f"epochs; accuracy on {len(self.test[1])} test images.\n"
        )

    def network(
        self,
        factor: float = 1.0,
        name: str | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> keras.Model:
        """Convolutions, all but the first of which halve the image; gives logits."""
        x = inputs = keras.Input(shape or self.data.input_shape)
        for i, width in enumerate(self.setting.widths):
            width = max(1, round(factor * width))
            x = layers.Conv2D(width, 3, 2 if i else 1, padding="same", use_bias=False)(
                x
            )
            x = layers.BatchNormalization(momentum=0.9)(x)
            x = layers.ReLU()(x)
        x = layers.Dense(self.data.num_classes)(layers.Flatten()(x))
        return keras.Model(inputs, x, name=name)

    def compile_options(self) -> dict[str, Any]:
        """The same for every network: Adam with a rate that falls to 0."""
        steps = self.epochs * -(-len(self.train[1]) // self.setting.batch_size)
        rate = keras.optimizers.schedules.CosineDecay(3e-3, steps)
        return {
            "optimizer": keras.optimizers.Adam(rate),
            "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            "metrics": ["accuracy"],
        }

    def trained_alone(self, network: keras.Model, epochs: int | None = None) -> Any:
        """The network, trained with the labels alone."""
        network.compile(**self.compile_options())
        network.fit(*self.train, epochs=epochs or self.epochs, **self.fit)
        return network

    def accuracy(self, model: keras.Model) -> float:
        """Share of test images whose class it finds."""
        x, y = self.test
        return float(np.mean(model.predict(x, verbose=0).argmax(-1) == y))

    def show(self, title: str, model: keras.Model) -> None:
        """Prints a model's accuracy."""
        print(f"{title:<44} {100 * self.accuracy(model):5.1f} %", flush=True)


def show_means(accuracies: Mapping[str, Sequence[float]]) -> None:
    """Prints what each model reached with each seed, and the mean."""
    for title, values in accuracies.items():
        single = "  ".join(f"{100 * value:5.1f}" for value in values)
        print(f"{title:<44} {100 * np.mean(values):5.1f} %   ({single})")
