"""Relational distillation for metric learning: relations alone, no labels, new classes.

The digits 0 to 4 of MNIST train, 5 to 9 are what is searched in: an image's nearest
other image should show the same digit (recall@1). A teacher with 32 numbers per image
is trained with triplets (all of a batch that violate the margin 0.2, embeddings of
length 1). A small student with 4 numbers is trained with triplets too, or without any
label by how images lie to each other in the teacher's eyes: distances, angles, and both
1 : 2 as in the paper, without normalization.

10,000 images, Adam at 1e-3 falling to 0 as a cosine, batches of 128; the teacher's
triplets and the student's have 5 epochs, relations 10: the paper gives them twice the
time. Park et al., CVPR 2019 (arXiv:1904.05068); its images and networks are larger.

    TFDS_DATA_DIR=... python examples/reproduce/metric_learning.py [--smoke]
"""

from __future__ import annotations

import logging
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from experiment import Experiment, means, parser, plot_gains
from keras import layers, ops

import keras_distill as kd

# Many models trace many functions, and TensorFlow takes that for a mistake.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

BATCH = 128
RECALL = "recall@1 %"
TRIPLETS = "student, triplets"
RELATIONS = {
    "student, distances": (1.0, 0.0),
    "student, angles": (0.0, 2.0),
    "student, distances and angles": (1.0, 2.0),
}

Arrays = tuple[np.ndarray, np.ndarray]


class Triplets(keras.losses.Loss):
    """Triplets within a batch: a row nearer to its own class than to others.

    Each row gets the mean of `max(0, d(row, same) - d(row, other) + margin)` over the
    pairs for which it is above 0.

    Args:
        margin: How much nearer.
    """

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        self.margin = margin

    def call(self, y_true: Any, y_pred: Any) -> Any:
        labels = ops.reshape(y_true, (-1,))
        same = ops.cast(labels[:, None] == labels[None, :], y_pred.dtype)
        squares = ops.sum(ops.square(y_pred[:, None] - y_pred[None, :]), -1)
        distances = ops.sqrt(squares + 1e-12)
        gaps = distances[:, :, None] - distances[:, None, :] + self.margin
        valid = same[:, :, None] * (1 - same[:, None, :])
        values = ops.relu(gaps) * valid
        active = ops.sum(ops.cast(values > 0, y_pred.dtype), (1, 2))
        return ops.sum(values, (1, 2)) / ops.maximum(active, 1.0)


def encoder(shape: tuple[int, ...], width: int, size: int, unit: bool) -> keras.Model:
    """Two convolutions that halve the image, and `size` numbers called `code`."""
    x = inputs = keras.Input(shape)
    for channels in (width, 2 * width):
        x = layers.Conv2D(channels, 3, strides=2, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.Dense(size, name=None if unit else "code")(layers.Flatten()(x))
    if unit:
        x = layers.UnitNormalization(name="code")(x)
    return keras.Model(inputs, x)


def recall(model: keras.Model, data: Arrays) -> float:
    """Per cent of the images whose nearest other image is of the same class."""
    x, y = data
    codes = model.predict(x, batch_size=500, verbose=0)
    squares = np.square(codes).sum(-1)
    distances = squares[:, None] + squares[None, :] - 2 * codes @ codes.T
    np.fill_diagonal(distances, np.inf)
    return 100 * float(np.mean(y[distances.argmin(-1)] == y))


def run(seed: int, train: Arrays, test: Arrays, epochs: int) -> dict[str, float]:
    """Recall of the teacher and of the students of one seed."""
    x, y = train
    steps = -(-len(x) // BATCH)

    def adam(epochs: int) -> keras.optimizers.Optimizer:
        rate = keras.optimizers.schedules.CosineDecay(1e-3, epochs * steps)
        return keras.optimizers.Adam(rate)

    def student(unit: bool) -> keras.Model:
        keras.utils.set_random_seed(seed)
        return encoder(x.shape[1:], 8, 4, unit)

    found = {}
    keras.utils.set_random_seed(1000 + seed)
    teacher = encoder(x.shape[1:], 32, 32, unit=True)
    for name, model in {"teacher, triplets": teacher, TRIPLETS: student(True)}.items():
        model.compile(adam(epochs), Triplets())
        model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0)
        found[name] = recall(model, test)
    for name, (distance, angle) in RELATIONS.items():
        distiller = kd.RelationalDistiller(
            student(False),
            teacher,
            embedding=("code", "code"),
            distance_weight=distance,
            angle_weight=angle,
        )
        distiller.compile(adam(2 * epochs))
        distiller.fit(x, batch_size=BATCH, epochs=2 * epochs, verbose=0)
        found[name] = recall(distiller.student, test)
    return found


def halves(data: kd.datasets.Dataset, rows: int) -> tuple[Arrays, Arrays]:
    """Training images of the digits 0 to 4, test images of 5 to 9."""
    (x, y), (test_x, test_y) = data.train, data.test
    few, new = np.flatnonzero(y < 5)[:rows], test_y >= 5
    return (x[few], y[few]), (test_x[new], test_y[new])


def main() -> None:
    """Runs the seeds that are missing in the result file."""
    options = parser(__doc__.splitlines()[0], "metric_learning", seeds=3).parse_args()
    name, epochs, seeds = "mnist", 5, options.seeds
    if options.smoke:
        name, epochs, seeds = "digits", 1, 1
        tf.config.run_functions_eagerly(True)  # a few steps are not worth a graph
    train, test = halves(kd.datasets.load(name), 256 if options.smoke else 10_000)
    experiment = Experiment(
        options,
        "metric_learning",
        "Relations without labels, for classes that nobody has seen",
        {
            "training": f"{len(train[1])} images of the digits 0 to 4 ({name})",
            "search": f"{len(test[1])} test images of the digits 5 to 9",
            "numbers per image": "teacher 32, student 4",
            "epochs": f"triplets {epochs}, relations {2 * epochs}",
            "command": "python examples/reproduce/metric_learning.py",
        },
        lambda rows: means(rows, RECALL, TRIPLETS),
    )
    for seed in range(seeds):
        if not experiment.has(TRIPLETS, seed):
            for case, value in run(seed, train, test, epochs).items():
                experiment.add(case, seed, [{RECALL: value}])
    plot_gains(
        experiment.rows,
        RECALL,
        TRIPLETS,
        experiment.path.with_suffix(".png"),
        "recall@1, points above the student with triplets (same seed)",
    )


if __name__ == "__main__":
    main()
