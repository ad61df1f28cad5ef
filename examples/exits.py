"""One network with exits that its own end teaches, and rows that leave early.

A convolutional network with an exit behind each of its first stages is trained in one
run (Be Your Own Teacher). Every exit can be deployed; or rows leave at the first exit
that is sure enough, and the others are computed further. What that saves is measured.

    python examples/exits.py [--dataset digits|mnist|cifar10] [--smoke]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_distill as kd

EPOCHS = {"digits": 40, "mnist": 5, "cifar10": 20}
THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.99)


def convnet(data: kd.datasets.Dataset) -> keras.Model:
    """Three stages of two convolutions; the later ones cost the most."""
    x = inputs = keras.Input(data.input_shape)
    for stage, width in enumerate((16, 64, 128)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            x = layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
            x = layers.BatchNormalization(momentum=0.9)(x)
            name = f"stage{stage + 1}" if block else None
            x = layers.ReLU(name=name)(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(data.num_classes)(x), name="convnet")


def seconds(run: Callable[[], Any], rounds: int = 5) -> float:
    """Median time of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Trains, deploys every exit and measures early exit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=list(EPOCHS), default="digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/exits"))
    parser.add_argument("--smoke", action="store_true", help="a trial of seconds")
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)
    data = kd.datasets.load(options.dataset)
    epochs = 1 if options.smoke else EPOCHS[options.dataset]

    distiller = kd.BeYourOwnTeacher.from_model(
        convnet(data), exits=["stage1", "stage2"], alpha=0.3
    )
    updates = epochs * -(-len(data.train[1]) // 64)
    distiller.compile(
        optimizer=keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(3e-3, updates)
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    distiller.fit(
        *data.train,
        batch_size=64,
        epochs=epochs,
        validation_data=data.validation,
        verbose=0,
        callbacks=[keras.callbacks.TensorBoard(os.fspath(options.out / "logs"))],
    )
    print(f"trained for {epochs} epochs\n")

    options.out.mkdir(parents=True, exist_ok=True)
    models = {f"exit {i}": distiller.deploy(i) for i in (2, 1, 0)}
    for name, model in models.items():
        model.save(options.out / f"{name.replace(' ', '_')}.keras")
    kd.report.compare(models, data.test)

    x, y = data.test
    x, y = (x[:500], y[:500]) if options.smoke else (x, y)
    batch = {"batch_size": 256, "verbose": 0}
    whole, parts = models["exit 2"], range(0, len(x), 256)
    full = seconds(lambda: [whole.predict_on_batch(x[i : i + 256]) for i in parts])
    print("\nthreshold  accuracy  time of the whole network")
    for threshold in THRESHOLDS[-2:] if options.smoke else THRESHOLDS:
        logits = distiller.predict(x, threshold=threshold, **batch)
        accuracy = np.mean(logits.argmax(-1) == y)
        early = seconds(lambda t=threshold: distiller.predict(x, threshold=t, **batch))
        print(f"{threshold:9}  {100 * accuracy:6.1f} %  {100 * early / full:6.0f} %")
    print(f"\nWritten: {options.out}/exit_<i>.keras, plain Keras models")


if __name__ == "__main__":
    main()
