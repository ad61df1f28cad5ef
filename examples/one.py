"""One network with three branches that teach each other, deployed at its own size.

A small residual network is trained twice for the same number of epochs: as it is, and
with three branches in place of its last stage (ONE), taught by their gated mixture.
The best branch, chosen on the validation part, has exactly the plain network's layers.

    python examples/one.py [--dataset digits|mnist|cifar10] [--smoke]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from keras import layers

import keras_distill as kd

EPOCHS = {"digits": 60, "mnist": 8, "cifar10": 30}
WIDTHS = {"digits": (4, 8, 16), "mnist": (8, 16, 32), "cifar10": (16, 32, 64)}


def resnet(data: kd.datasets.Dataset, widths: tuple[int, ...]) -> keras.Model:
    """One residual block per stage; the stages are called `stage1` to `stage3`."""
    inputs = keras.Input(data.input_shape)
    x = layers.Conv2D(widths[0], 3, padding="same", use_bias=False)(inputs)
    for stage, width in enumerate(widths):
        stride = 2 if stage else 1
        y = layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
        y = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(y))
        y = layers.Conv2D(width, 3, padding="same", use_bias=False)(y)
        y = layers.BatchNormalization(momentum=0.9)(y)
        if stage:
            x = layers.Conv2D(width, 1, stride, use_bias=False)(x)
        x = layers.ReLU(name=f"stage{stage + 1}")(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(data.num_classes)(x), name="resnet")


def train(
    model: keras.Model, data: kd.datasets.Dataset, epochs: int, logs: Path
) -> Any:
    """The same optimizer, data and number of epochs for both."""
    updates = epochs * -(-len(data.train[1]) // 64)
    rate = keras.optimizers.schedules.CosineDecay(3e-3, updates)
    model.compile(
        optimizer=keras.optimizers.Adam(rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model.fit(
        *data.train,
        batch_size=64,
        epochs=epochs,
        validation_data=data.validation,
        verbose=0,
        callbacks=[keras.callbacks.TensorBoard(os.fspath(logs))],
    ).history


def main() -> None:
    """Trains both and prints how they compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=list(EPOCHS), default="digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/one"))
    parser.add_argument("--smoke", action="store_true", help="a trial of seconds")
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)
    data = kd.datasets.load(options.dataset)
    epochs = 1 if options.smoke else EPOCHS[options.dataset]

    plain = resnet(data, WIDTHS[options.dataset])
    one = kd.OneEnsemble.from_model(
        plain, "stage2", num_branches=3, ramp_up=round(0.27 * epochs)
    )
    train(plain, data, epochs, options.out / "logs" / "plain")
    print(f"plain network trained for {epochs} epochs")
    history = train(one, data, epochs, options.out / "logs" / "one")
    print(f"network with three branches trained for {epochs} epochs")

    gates = ", ".join(f"{history[f'gate_{i}'][-1]:.2f}" for i in range(3))
    print(f"mean weights of the branches in the ensemble: {gates}\n")
    best = one.deploy("best")
    kd.report.compare(
        {
            "ensemble": one.deploy("ensemble"),  # the others are compared with it
            "plain": plain,
            **{f"branch {i}": one.deploy(i) for i in range(3)},
            "best branch": best,
        },
        data.test,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    best.save(options.out / "best_branch.keras")
    print(f"\nWritten: {options.out}/best_branch.keras, a plain Keras model")


if __name__ == "__main__":
    main()
