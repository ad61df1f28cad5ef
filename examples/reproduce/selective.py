"""Selective distillation: which rows should a teacher teach a low-resolution student?

The teacher sees 28 x 28 images of MNIST and has learned from 10,000 of them. The
student sees images averaged to 7 x 7. The transfer set are 4000 other images, once with
the true labels, and once with 30 % of them replaced by wrong ones, as in a set that was
gathered without care. Each seed trains, from the same initial weights and for the same
number of updates:

* labels alone: no teacher, all rows;
* all rows: half labels, half teacher (T = 4);
* selected by graph, by agreement, by confidence: the same on the rows that
  `kd.teachers.select_transfer_set` keeps with its defaults;
* random rows: the same on as many random rows as the graph keeps.

Accuracy on the 10,000 test images, at 7 x 7. Training goes on where it was interrupted:

    TFDS_DATA_DIR=... python examples/reproduce/selective.py [--seeds 5] [--smoke]

With --smoke, the embedded digits (8 x 8, student 4 x 4).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

import keras
import numpy as np
from experiment import Experiment, Row, means, name_of, parser
from keras import layers

import keras_distill as kd

TEMPERATURE, BATCH = 4.0, 64
METHODS = ("graph", "agreement", "confidence")
RUNS = ("labels alone", "all rows", *(f"by {m}" for m in METHODS), "random rows")
NOISE = {"clean labels": 0.0, "30 % wrong labels": 0.3}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is trained, on what."""

    data: str
    teacher_images: int
    teacher_epochs: int
    images: int  # of the transfer set
    factor: int  # by which the student's images are smaller
    epochs: int
    runs: tuple[str, ...] = RUNS


FULL = Scale("mnist", 10000, 8, 4000, 4, 30)
SMOKE = Scale("digits", 500, 3, 200, 2, 1, RUNS[1:3])


@dataclasses.dataclass(frozen=True)
class Part:
    """Images in both resolutions, and their labels."""

    full: np.ndarray
    small: np.ndarray
    y: np.ndarray

    def rows(self, chosen: np.ndarray) -> Part:
        """Some rows."""
        return Part(self.full[chosen], self.small[chosen], self.y[chosen])


def part(x: np.ndarray, y: np.ndarray, factor: int) -> Part:
    """Images with their averages over `factor` x `factor` pixels."""
    rows, height, width, channels = x.shape
    grid = (rows, height // factor, factor, width // factor, factor, channels)
    return Part(x, x.reshape(grid).mean((2, 4)), y)


def with_wrong_labels(y: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Labels of which a share is replaced by other classes."""
    random = np.random.default_rng(seed)
    other = (y + random.integers(1, 10, len(y))) % 10
    return np.where(random.random(len(y)) < share, other, y).astype(y.dtype)


def trained_teacher(train: Part, epochs: int) -> keras.Model:
    """A convolutional network with a layer `embedding`."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input(train.full.shape[1:])
    for width in (16, 32, 64):
        x = layers.Conv2D(width, 3, strides=2, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
    x = layers.Dense(64, "relu", name="embedding")(layers.Flatten()(x))
    teacher = keras.Model(inputs, layers.Dense(10)(x))
    teacher.compile(keras.optimizers.Adam(2e-3), LOSS)
    teacher.fit(train.full, train.y, batch_size=64, epochs=epochs, verbose=0)
    return teacher


def network(shape: tuple[int, ...]) -> keras.Model:
    """The student."""
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Flatten(),
            layers.Dense(64, "relu"),
            layers.Dense(10),
        ]
    )


class Setting:
    """A transfer set with its labels, and students of it.

    Args:
        teacher: Trained, with a layer `embedding`.
        transfer: What the students learn from.
        test: For the accuracy.
        seed: Of initial weights, batches and random rows.
        epochs: Passes over all rows, or as many updates.
    """

    def __init__(
        self, teacher: keras.Model, transfer: Part, test: Part, seed: int, epochs: int
    ) -> None:
        self._teacher, self._transfer, self._test = teacher, transfer, test
        self._seed, self._epochs = seed, epochs
        self._kept: dict[str, np.ndarray] = {}

    def kept(self, method: str) -> np.ndarray:
        """Which rows a method keeps."""
        if method not in self._kept:
            options = {"embedding": "embedding"} if method == "graph" else {}
            selection = kd.teachers.select_transfer_set(
                self._teacher,
                (self._transfer.full, self._transfer.y),
                method=method,
                **options,
            )
            self._kept[method] = selection.keep
        return self._kept[method]

    def run(self, run: str) -> Row:
        """The test accuracy of one student in percent, and how many rows it saw."""
        rows = np.arange(len(self._transfer.y))
        if run.startswith("by "):
            rows = rows[self.kept(run.removeprefix("by "))]
        elif run == "random rows":
            count = int(self.kept("graph").sum())
            rows = np.random.default_rng(self._seed).permutation(rows)[:count]
        # As many updates for all: a smaller set is seen more often.
        seen = self._transfer.rows(np.resize(rows, len(self._transfer.y)))
        keras.utils.set_random_seed(self._seed)
        student = network(seen.small.shape[1:])
        steps = self._epochs * -(-len(seen.y) // BATCH)
        rate = keras.optimizers.schedules.CosineDecay(3e-3, steps)
        alone = run == "labels alone"
        distiller = kd.Distiller(
            student,
            kd.teachers.Model(self._teacher, inputs="full"),
            student_inputs="small",
            temperature=TEMPERATURE,
            alpha=1.0 if alone else 0.5,
            beta=0.0 if alone else 0.5,
        )
        optimizer = keras.optimizers.Adam(rate)
        distiller.compile(optimizer, LOSS, steps_per_execution=21)
        x = {"full": seen.full, "small": seen.small}
        fit = {"batch_size": BATCH, "epochs": self._epochs, "verbose": 0}
        distiller.fit(x, seen.y, **fit)
        found = student.predict(self._test.small, batch_size=500, verbose=0)
        accuracy = 100 * float(np.mean(found.argmax(-1) == self._test.y))
        return {"rows": len(rows), "accuracy %": accuracy}


def share_of(chosen: np.ndarray, rows: np.ndarray) -> float | None:
    """In percent, how many of these rows are chosen."""
    return 100 * float(chosen[rows].mean()) if rows.any() else None


def summary(rows: list[Row]) -> dict[str, Row]:
    """Means, and differences from all rows with the same labels and seed."""
    table: dict[str, Row] = {}
    for label in NOISE:
        own = [row for row in rows if row["run"] == label]
        table |= means(own, "accuracy %", f"{label}: all rows")
    for name, line in table.items():
        seen = [row for row in rows if name_of(row) == name]
        for key in ("rows", "wrong labels dropped %", "others dropped %"):
            values = [row[key] for row in seen if row.get(key) is not None]
            line[key] = statistics.mean(values) if values else None
    return table


def plot(rows: list[Row], path: Path) -> None:
    """Accuracy of each student; the line is at the mean of those of all rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [label for label in NOISE if any(row["run"] == label for row in rows)]
    size = (4.5 * len(labels) + 1.5, 3.2)
    figure, panels = plt.subplots(
        1, len(labels), figsize=size, sharey=True, squeeze=False, layout="tight"
    )
    for axes, label in zip(panels[0], labels, strict=True):
        own = [row for row in rows if row["run"] == label]
        names = [run for run in RUNS if any(row["model"] == run for row in own)]
        for height, name in enumerate(names):
            values = [row["accuracy %"] for row in own if row["model"] == name]
            axes.plot(values, [height] * len(values), "o", alpha=0.6, mec="none")
            mean = statistics.mean(values)
            axes.plot([mean, mean], [height - 0.3, height + 0.3], color="black")
            if name == "all rows":
                axes.axvline(mean, color="gray", lw=1)
        axes.set_yticks(range(len(names)), names)
        axes.set(title=label, xlabel="test accuracy %")
    panels[0][0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Runs what is missing in the result file."""
    chosen = parser(__doc__.splitlines()[0], "selective", seeds=5).parse_args()
    scale = SMOKE if chosen.smoke else FULL
    data = kd.datasets.load(scale.data)
    whole, test = (part(*rows, scale.factor) for rows in (data.train, data.test))
    first = np.arange(scale.teacher_images)
    transfer = whole.rows(first[-1] + 1 + np.arange(scale.images))
    teacher = trained_teacher(whole.rows(first), scale.teacher_epochs)
    said = teacher.predict(test.full, batch_size=500, verbose=0).argmax(-1)
    experiment = Experiment(
        chosen,
        "selective",
        "Selective distillation at low resolution",
        {
            **dataclasses.asdict(scale),
            "pixels of the student": transfer.small[0].size,
            "teacher's accuracy %": round(100 * float(np.mean(said == test.y)), 1),
            "temperature": TEMPERATURE,
            "command": "python examples/reproduce/selective.py",
        },
        summary,
    )
    for seed in range(1 if chosen.smoke else chosen.seeds):
        for label, share in NOISE.items():
            if experiment.has(label, seed):
                continue
            y = with_wrong_labels(transfer.y, share, seed)
            wrong = y != transfer.y
            noisy = dataclasses.replace(transfer, y=y)
            setting = Setting(teacher, noisy, test, seed, scale.epochs)
            found = []
            for run in scale.runs:
                start = time.perf_counter()
                row = {"model": run, **setting.run(run)}
                row["seconds"] = round(time.perf_counter() - start)
                if run.startswith("by "):
                    dropped = ~setting.kept(run.removeprefix("by "))
                    row["wrong labels dropped %"] = share_of(dropped, wrong)
                    row["others dropped %"] = share_of(dropped, ~wrong)
                found.append(row)
            experiment.add(label, seed, found)
    plot(experiment.rows, experiment.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
