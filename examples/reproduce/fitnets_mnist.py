"""FitNets: a thin and deep MNIST network learns from its teacher's middle layer.

The teacher has two convolutions and a hidden layer (344,000 weights), the student six
convolutions of 8 and 16 channels (34,000 weights) and no normalisation. Each seed
trains the student, from the same initial weights, in three ways:

* labels: from the labels alone;
* soft: from the labels and the teacher's soft targets at T = 3, whose weight falls
  from 4 to 1 (without the factor T², as in the paper);
* hints: a quarter of the epochs on the teacher's second convolution, which the
  student's fourth one learns to predict through a 1 x 1 convolution; then as `soft`.

All get the same number of epochs, with RMSprop at a rate of 1e-3 (in the stage of the
hints; otherwise falling from there to 0 as a cosine), batches of 100, and the first
10,000 training images only, also for the teacher, so that a run takes a minute or two.
Errors are those of the last epoch on the 10,000 test images. Each result is written as
soon as it is there, to docs/results/fitnets_mnist.json: the same command goes on where
a run was interrupted. If the teacher's network is gone, as in a new clone, it is
trained anew from the same seed.

    TFDS_DATA_DIR=... python examples/reproduce/fitnets_mnist.py [--seeds 5] [--smoke]

Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015 (arXiv 1412.6550).
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from experiment import Experiment, Row, means, parser
from hinton_mnist import Data, batches, logits_of, mnist
from keras import layers

import keras_distill as kd

IMAGES = 10_000
BATCH = 100
METHODS = ("labels", "soft", "hints")
PAPER = {"teacher": 0.55, "labels": 1.9, "soft": 0.65, "hints": 0.51}  # error in %


def convolution(x: Any, channels: int, name: str) -> Any:
    return layers.Conv2D(channels, 3, padding="same", activation="relu", name=name)(x)


def teacher_network() -> keras.Model:
    """Wide and shallow: 48 and 96 channels."""
    inputs = keras.Input((784,))
    x = convolution(layers.Reshape((28, 28, 1))(inputs), 48, "conv1")
    x = convolution(layers.MaxPooling2D()(x), 96, "conv2")
    x = layers.Flatten()(layers.MaxPooling2D()(x))
    x = layers.Dropout(0.5)(layers.Dense(64, "relu")(x))
    return keras.Model(inputs, layers.Dense(10, name="logits")(x))


def student_network(seed: int) -> keras.Model:
    """Thin and deep: 8, 8, 16, 16, 16, 16 channels."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((784,))
    x = layers.Reshape((28, 28, 1))(inputs)
    for number, channels in enumerate((8, 8, 16, 16, 16, 16), start=1):
        x = convolution(x, channels, f"conv{number}")
        if number % 2 == 0:
            x = layers.MaxPooling2D()(x) if number < 6 else layers.Flatten()(x)
    x = layers.Dense(32, "relu")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x))


class FitNets:
    """Trains the teacher, and then one student after the other.

    Args:
        train: Training images and labels.
        test: Test images and labels.
        epochs: Of every run, the hints' stage included.
        folder: Where the teacher is kept.
    """

    def __init__(self, train: Data, test: Data, epochs: int, folder: Path) -> None:
        self._train, self._test, self._epochs = train, test, epochs
        self._file, self._cached = folder / "teacher.keras", folder / "cache"

    def run(self, method: str, seed: int) -> Row:
        """What a run gave."""
        if method == "teacher":
            return self._teacher(seed)
        if method != "labels" and not self._file.exists():
            self._teacher(0)  # its row is there, but not its network
        student = student_network(seed)
        found: Row = {"weights": student.count_params()}
        if method == "labels":
            found |= self._fitted(kd.BaseDistiller(student, alpha=1.0), seed)
        elif method == "soft":
            found |= self._soft(student, seed)
        else:
            found |= self._hints(student, seed)
        return found

    def _teacher(self, seed: int) -> Row:
        keras.utils.set_random_seed(1000 + seed)
        model = teacher_network()
        found = self._fitted(kd.BaseDistiller(model, alpha=1.0), 1000 + seed)
        model.save(self._file)
        return {"weights": model.count_params(), **found}

    def _soft(self, student: keras.Model, seed: int) -> Row:
        rows = tf.data.Dataset.from_tensor_slices(self._train)
        cache = kd.teachers.Cache.build(
            keras.models.load_model(self._file), rows, self._cached, batch_size=500
        )
        (known,) = cache.attach(rows).batch(len(self._train[1])).as_numpy_iterator()
        distiller = kd.Distiller(
            student, cache, alpha=1.0, beta=4.0, soft_loss=self._soft_targets()
        )
        fall = kd.schedules.linear(4.0, 1.0, over=max(self._epochs - 1, 1))
        schedule = kd.schedules.Schedule("beta", fall)
        return self._fitted(distiller, seed, known, callbacks=[schedule])

    def _hints(self, student: keras.Model, seed: int) -> Row:
        distiller = kd.HintDistiller(
            student,
            keras.models.load_model(self._file),
            hints={"conv4": "conv2"},
            soft_loss=self._soft_targets(),
        )
        epochs = max(self._epochs // 4, 1)
        history = distiller.fit_hints(
            batches(self._train, BATCH, 500 + seed, shifted=False),
            epochs=epochs,
            optimizer=keras.optimizers.RMSprop(1e-3),
            verbose=0,
        )
        losses = history.history["loss"]
        found = self._fitted(distiller, seed, epochs=self._epochs - epochs)
        return found | {"hint, first epoch": losses[0], "hint, last epoch": losses[-1]}

    def _soft_targets(self) -> kd.losses.SoftTarget:
        return kd.losses.SoftTarget(3.0, scale_by_temperature=False)

    def _fitted(
        self,
        distiller: kd.BaseDistiller,
        seed: int,
        data: Data | None = None,
        epochs: int | None = None,
        callbacks: list[keras.callbacks.Callback] | None = None,
    ) -> Row:
        """Trains a distiller; its student's error on the test images."""
        epochs = epochs or self._epochs
        steps = epochs * math.ceil(len(self._train[1]) / BATCH)
        rate = keras.optimizers.schedules.CosineDecay(1e-3, steps)
        distiller.compile(
            keras.optimizers.RMSprop(rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=10,
            jit_compile=False,
        )
        distiller.fit(
            batches(data or self._train, BATCH, seed, shifted=False),
            epochs=epochs,
            callbacks=callbacks,
            verbose=0,
        )
        x, y = self._test
        wrong = logits_of(distiller.student, x).argmax(1) != y
        return {"error %": 100 * float(np.mean(wrong))}


def summary(rows: list[Row]) -> dict[str, Any]:
    """The table of the docs."""
    table = means(rows, "error %", "labels")
    for name, line in table.items():
        line["paper"] = PAPER[name]
    result: dict[str, Any] = {"test error": table}
    for value in ("hint, first epoch", "hint, last epoch"):
        if some := [row for row in rows if value in row]:
            result[value] = statistics.mean(row[value] for row in some)
    return result


def plot(rows: list[Row], path: Path) -> None:
    """Each run's error, beside the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 3), layout="tight")
    for height, name in enumerate(PAPER):
        errors = [row["error %"] for row in rows if row["run"] == name]
        if errors:
            ax.plot(errors, [height] * len(errors), "o", alpha=0.6)
            ax.plot(statistics.mean(errors), height, "k|", ms=16, label="mean")
        ax.plot(PAPER[name], height, "kx", label="paper (60,000 images)")
    ax.set_yticks(range(len(PAPER)), PAPER)
    ax.invert_yaxis()
    ax.set_xlabel("test error, %")
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    ax.legend(unique.values(), unique.keys())
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Runs what is missing in the result file."""
    options = parser(__doc__.splitlines()[0], "fitnets_mnist", seeds=5)
    options.add_argument("--epochs", type=int, default=20)
    chosen = options.parse_args()
    seeds, epochs = (1, 1) if chosen.smoke else (chosen.seeds, chosen.epochs)
    train, test = mnist(chosen.smoke)
    train = (train[0][:IMAGES], train[1][:IMAGES])
    experiment = Experiment(
        chosen,
        "fitnets_mnist",
        "FitNets: hints for a thin and deep student",
        {
            "images": f"{len(train[1])} of 28 x 28",
            "epochs": epochs,
            "command": f"python examples/reproduce/fitnets_mnist.py --epochs {epochs}",
        },
        summary,
    )
    fitnets = FitNets(train, test, epochs, experiment.folder)
    runs = [("teacher", 0), *((method, s) for s in range(seeds) for method in METHODS)]
    for method, seed in runs:
        if experiment.has(method, seed):
            continue
        start = time.perf_counter()
        found = fitnets.run(method, seed)
        seconds = round(time.perf_counter() - start)
        experiment.add(method, seed, [{**found, "seconds": seconds}])
        keras.backend.clear_session()
    plot(experiment.rows, experiment.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
