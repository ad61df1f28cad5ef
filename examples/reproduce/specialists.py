"""A generalist and three specialists: their common opinion, and a student of it.

CIFAR-10, averaged to 16 x 16, 1500 images of each class. For each seed:

* a small convolutional network is trained on all classes (the generalist), 10 epochs;
* k-means on the covariance of its predictions divides the classes into three groups,
  and each group gets a specialist, 2 epochs from the generalist's weights;
* a copy of the generalist is trained on, with as many rows as all specialists saw:
  what the whole has to beat, because its specialists were trained for longer too;
* a smaller network is trained three times from the same initial weights and with the
  same batches, 10 epochs: on labels alone, with the generalist as teacher, and with
  the whole as teacher (T 2, alpha 0.1, beta 0.9).

Adam at 1e-3, batches of 100, no augmentation; figures are of the last epoch, on the
10,000 test images. An image is covered if the generalist's first choice belongs to a
specialist; where the groups hold all classes, every image is.

    TFDS_DATA_DIR=... python examples/reproduce/specialists.py [--seeds 3] [--smoke]
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from experiment import Experiment, means, parser, plot_gains
from keras import layers

import keras_distill as kd

BATCH = 100
EACH = 1500  # training images of each class
LABELS = "labels alone"
# What the others of the same run are compared with.
BASELINES = {"teacher": "generalist", "student": "of the generalist"}

Arrays = tuple[np.ndarray, np.ndarray]


def cifar() -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Training and test images of 16 x 16, and the names of the classes."""
    data = kd.datasets.load("cifar10")
    labels = data.train[1]
    rows = [np.flatnonzero(labels == c)[:EACH] for c in range(data.num_classes)]
    few = np.sort(np.concatenate(rows))

    def averaged(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), 16, 2, 16, 2, 3).mean((2, 4)) * 2 - 1

    train = averaged(data.train[0][few]), labels[few]
    return train, (averaged(data.test[0]), data.test[1]), data.class_names


def network(
    shape: tuple[int, ...], widths: tuple[int, ...], classes: int = 10
) -> keras.Model:
    """Plain 3 x 3 convolutions; the first and the last but one halve the grid."""
    z = inputs = keras.Input(shape)
    for stage, width in enumerate(widths):
        z = layers.Conv2D(width, 3, padding="same", use_bias=False)(z)
        z = layers.BatchNormalization(momentum=0.9)(z)
        z = layers.ReLU()(z)
        if stage in (0, len(widths) - 2):
            z = layers.MaxPooling2D()(z)
    z = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(z))
    return keras.Model(inputs, layers.Dense(classes, name="logits")(z))


class Whole:
    """One seed: the generalist, its specialists, and the students."""

    def __init__(self, train: Arrays, test: Arrays, seed: int, epochs: int) -> None:
        self._train, self._test, self._seed = train, test, seed
        self._epochs, self._further = epochs, max(epochs // 5, 1)
        self._shape = train[0].shape[1:]
        self._generalist = self._build(10)
        self._fitted(kd.BaseDistiller(self._generalist), epochs)
        self.teacher = kd.teachers.train_specialists(
            self._generalist,
            self._build,
            train,
            3,
            epochs=self._further,
            batch_size=BATCH,
            seed=seed,
            verbose=0,
        )

    def _build(self, classes: int) -> keras.Model:
        keras.utils.set_random_seed(self._seed)
        return network(self._shape, (24, 48, 48, 96), classes)

    def _fitted(self, distiller: kd.BaseDistiller, epochs: int) -> None:
        keras.utils.set_random_seed(self._seed)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        distiller.compile(keras.optimizers.Adam(1e-3), loss)
        distiller.fit(*self._train, batch_size=BATCH, epochs=epochs, verbose=0)

    def teachers(self) -> list[dict[str, Any]]:
        """Figures of the generalist, of one trained for longer, and of the whole."""
        x, y = self._test
        general = kd.teachers.Model(self._generalist)
        first = _log_p(general, x).argmax(-1)
        covered = np.isin(first, np.concatenate(self.teacher.classes))
        longer = self._build(10)
        longer.set_weights(self._generalist.get_weights())
        # An epoch of specialists shows each row in its group, and as many others.
        self._fitted(kd.BaseDistiller(longer), 2 * self._further)
        return [
            {"model": name, **_figures(_log_p(teacher, x), y, covered)}
            for name, teacher in (
                ("generalist", general),
                ("generalist, trained on", kd.teachers.Model(longer)),
                ("whole", self.teacher),
            )
        ]

    def students(self) -> list[dict[str, Any]]:
        """Figures of the students."""
        rows = []
        for name, teacher in (
            (LABELS, None),
            ("of the generalist", self._generalist),
            ("of the whole", self.teacher),
        ):
            keras.utils.set_random_seed(100 + self._seed)
            student = network(self._shape, (8, 16, 16))
            distiller = kd.BaseDistiller(student)
            if teacher is not None:
                distiller = kd.Distiller(student, teacher, temperature=2.0)
            self._fitted(distiller, self._epochs)
            log_p = _log_p(kd.teachers.Model(student), self._test[0])
            rows.append({"model": name, **_figures(log_p, self._test[1])})
        return rows


def _log_p(teacher: kd.teachers.Teacher, x: np.ndarray) -> np.ndarray:
    """Log-probabilities at temperature 1."""
    parts = [x[i : i + 500] for i in range(0, len(x), 500)]
    run = tf.function(lambda part: keras.ops.log_softmax(teacher(part, (), 1.0)[0]))
    return np.concatenate([run(part).numpy() for part in parts])


def _figures(
    log_p: np.ndarray, y: np.ndarray, covered: np.ndarray | None = None
) -> dict[str, float]:
    right = log_p.argmax(-1) == y
    figures = {
        "accuracy %": 100 * float(right.mean()),
        "log loss": -float(log_p[np.arange(len(y)), y].mean()),
    }
    if covered is not None:
        figures["covered %"] = 100 * float(covered.mean())
        figures["accuracy where covered %"] = 100 * float(right[covered].mean())
    return figures


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One table for teachers and one for students, for accuracy and for the loss."""
    tables = {}
    for run, baseline in BASELINES.items():
        own = [row for row in rows if row["run"] == run]
        for value in ("accuracy %", "log loss"):
            if own:
                tables[f"{run}, {value}"] = means(own, value, f"{run}: {baseline}")
    return tables


def gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the points above the baseline of the same run and seed."""
    base = {
        (row["run"], row["seed"]): row["accuracy %"]
        for row in rows
        if row["model"] == BASELINES[row["run"]]
    }
    return [
        {**row, "gain": row["accuracy %"] - base[row["run"], row["seed"]]}
        for row in rows
    ]


def main() -> None:
    """Runs what is missing in the result file."""
    options = parser(__doc__.splitlines()[0], "specialists", seeds=3)
    options.add_argument("--epochs", type=int, default=10)
    chosen = options.parse_args()
    epochs, seeds = (1, 1) if chosen.smoke else (chosen.epochs, chosen.seeds)
    if chosen.smoke:
        data = kd.datasets.load("digits")
        train, test = (
            tuple(part[:200] for part in rows) for rows in (data.train, data.test)
        )
        names = data.class_names
    else:
        train, test, names = cifar()
    experiment = Experiment(
        chosen,
        "specialists",
        "A generalist with specialists, and a student of the whole",
        {
            "generalist": "4 convolutions, 24, 48, 48, 96 wide",
            "student": "3 convolutions, 8, 16, 16 wide",
            "specialists": 3,
            "images": f"{len(train[1])} of {' x '.join(map(str, train[0].shape[1:]))}",
            "epochs": epochs,
            "command": f"python examples/reproduce/specialists.py --epochs {epochs}",
        },
        summary,
    )
    for seed in range(seeds):
        if experiment.has("student", seed):
            continue
        whole = Whole(train, test, seed, epochs)
        groups = "; ".join(
            ", ".join(names[c] for c in ids) for ids in whole.teacher.classes
        )
        if not experiment.has("teacher", seed):
            rows = whole.teachers()
            rows[-1]["groups"] = groups
            experiment.add("teacher", seed, rows)
        experiment.add("student", seed, whole.students())
    plot_gains(
        gains(experiment.rows),
        "gain",
        "teacher: generalist",
        experiment.path.with_suffix(".png"),
        "test accuracy, points above the generalist, or above the student of it",
    )


if __name__ == "__main__":
    main()
