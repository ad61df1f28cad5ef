"""A large teacher, a small student with few labels, and what distillation adds.

The task: many images, few of them labelled. The teacher was trained elsewhere, with all
labels; it is too large to ship. The small student is trained twice from the same
initial weights and for the same number of updates:

* alone, on the labelled images (by default 100 of 1000);
* distilled, on all images: the teacher's softened predictions stand in for the labels
  that are missing, and the labelled images count as before.

So the distilled student learns from images that the other one cannot use: this is
where distillation has most to win. Run from the root of the project:

    python examples/quickstart.py [--dataset digits|mnist|cifar10] [--smoke]

`digits` comes with scikit-learn. `mnist` and `cifar10` come from TensorFlow Datasets
(a download, or prepared data in the folder TFDS_DATA_DIR) and take much longer: see
`--seeds`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_distill as kd
from keras_distill import datasets, report

# Nine models trace nine functions, and TensorFlow takes that for a mistake.
logging.getLogger("tensorflow").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained on a data set, and for how long."""

    images: int  # of the training part
    labels: int  # that the student may see
    teacher: Sequence[int]  # channels of its layers
    student: Sequence[int]
    teacher_epochs: int
    student_epochs: int  # over all images
    batch_size: int = 64


SETTINGS = {
    "digits": Setting(1000, 100, (32, 64, 64), (4, 8), 30, 40),
    "mnist": Setting(10000, 100, (32, 64, 64), (4, 8, 8), 10, 20),
    "cifar10": Setting(20000, 2000, (32, 64, 128, 128), (16, 32, 32), 12, 15, 128),
}
TEACHER, ALONE, DISTILLED = "teacher", "student alone", "student distilled"


def convnet(widths: Sequence[int], data: datasets.Dataset, name: str) -> keras.Model:
    """Convolutions, all but the first of which halve the image; gives logits."""
    x = inputs = keras.Input(data.input_shape)
    for i, width in enumerate(widths):
        stride = 2 if i else 1
        x = layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
    x = layers.Flatten()(x)
    x = layers.Dropout(0.3 if name == "teacher" else 0.0)(x)
    return keras.Model(inputs, layers.Dense(data.num_classes)(x), name=name)


def hide_labels(labels: np.ndarray, keep: int, num_classes: int) -> np.ndarray:
    """Leaves `keep` labels, equally many of each class; the others become -1."""
    hidden = np.full_like(labels, -1)
    for label in range(num_classes):
        rows = np.flatnonzero(labels == label)[: keep // num_classes]
        hidden[rows] = label
    return hidden


def compile_options(updates: int) -> dict[str, Any]:
    """The same for every model: Adam with a rate that falls to 0 in `updates` steps."""
    rate = keras.optimizers.schedules.CosineDecay(3e-3, updates)
    return {
        "optimizer": keras.optimizers.Adam(rate),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
    }


class Progress(keras.callbacks.Callback):
    """One line per training run; in a terminal it is rewritten while training."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = title
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        logs = logs or {}
        line = (
            f"{self._title}  epoch {epoch + 1:>3}/{self.params['epochs']}  "
            f"validation accuracy {100 * logs['val_accuracy']:5.1f} %  "
            f"{time.perf_counter() - self._start:4.0f} s"
        )
        last = epoch + 1 == self.params["epochs"]
        if sys.stdout.isatty():
            print(f"\r{line}", end="\n" if last else "", flush=True)
        elif last:
            print(line, flush=True)


class Run:
    """Trains the three models of one seed."""

    def __init__(
        self, seed: int, data: datasets.Dataset, setting: Setting, out: Path
    ) -> None:
        self.seed, self.data, self.setting, self.out = seed, data, setting, out
        self.curves: dict[str, tuple[np.ndarray, list[float]]] = {}
        self.models = self._train()

    def _train(self) -> dict[str, keras.Model]:
        data, setting = self.data, self.setting
        keras.utils.set_random_seed(self.seed)
        images, labels = (part[: setting.images] for part in data.train)
        few = hide_labels(labels, setting.labels, data.num_classes)

        teacher = convnet(setting.teacher, data, "teacher")
        updates = setting.teacher_epochs * self._steps(len(images))
        teacher.compile(**compile_options(updates))
        self._fit(TEACHER, teacher, images, labels, setting.teacher_epochs)

        updates = setting.student_epochs * self._steps(len(images))
        alone = convnet(setting.student, data, "student")
        distilled = convnet(setting.student, data, "student")
        distilled.set_weights(alone.get_weights())

        # Each labelled image comes several times in an epoch, for as many updates.
        rows = np.resize(np.flatnonzero(few >= 0), len(images))
        alone.compile(**compile_options(updates))
        self._fit(ALONE, alone, images[rows], few[rows], setting.student_epochs)

        # A label of -1 means "no label": such rows have only the teacher's word.
        distiller = kd.Distiller(
            distilled, teacher, temperature=4.0, alpha=0.1, beta=0.9
        )
        distiller.compile(**compile_options(updates))
        self._fit(DISTILLED, distiller, images, few, setting.student_epochs)
        return {TEACHER: teacher, ALONE: alone, DISTILLED: distiller.student}

    def _steps(self, rows: int) -> int:
        return -(-int(rows) // self.setting.batch_size)

    def _fit(
        self, name: str, model: keras.Model, x: np.ndarray, y: np.ndarray, epochs: int
    ) -> None:
        logs = self.out / "logs" / f"seed{self.seed}" / name.replace(" ", "_")
        history = model.fit(
            x,
            y,
            batch_size=self.setting.batch_size,
            epochs=epochs,
            validation_data=self.data.validation,
            verbose=0,
            callbacks=[
                keras.callbacks.TensorBoard(os.fspath(logs)),
                Progress(f"seed {self.seed}  {name:<17}"),
            ],
        ).history
        accuracy = history["val_accuracy"]
        updates = self._steps(len(x)) * np.arange(1, epochs + 1)
        self.curves[name] = (updates, accuracy)


def plot(runs: Sequence[Run], table: report.Comparison, path: Path) -> None:
    """Learning curves of the two students, and the accuracy of all three."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {TEACHER: "tab:gray", ALONE: "tab:orange", DISTILLED: "tab:blue"}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4), width_ratios=(2, 1), layout="constrained"
    )
    for name in (ALONE, DISTILLED):
        updates = runs[0].curves[name][0]
        accuracy = 100 * np.array([run.curves[name][1] for run in runs])
        left.plot(updates, accuracy.mean(0), color=colors[name], label=name)
        low, high = accuracy.min(0), accuracy.max(0)
        left.fill_between(updates, low, high, color=colors[name], alpha=0.2, lw=0)
    teacher = 100 * np.mean([run.curves[TEACHER][1][-1] for run in runs])
    left.axhline(teacher, color=colors[TEACHER], ls="--", label="teacher, at its end")
    left.set(
        xlabel="updates of the weights",
        ylabel="validation accuracy (%)",
        title=f"Learning curves: mean and range over {len(runs)} seed(s)",
    )
    left.legend(loc="lower right")
    left.grid(alpha=0.3)

    for i, row in enumerate(table.rows):
        accuracy, spread = 100 * row.accuracy, 100 * (row.accuracy_spread or 0)
        right.errorbar(i, accuracy, spread, fmt="o", color=colors[row.name], capsize=5)
        right.annotate(
            f"{accuracy:.1f}", (i, accuracy), (8, -3), textcoords="offset points"
        )
    labels = [
        f"{row.name.removeprefix('student ')}\n{row.parameters:,}\nparameters"
        for row in table.rows
    ]
    right.set_xticks(range(len(labels)), labels)
    right.set(
        xlim=(-0.5, len(labels) - 0.3),
        ylabel="test accuracy (%)",
        title="Test: mean and standard deviation",
    )
    right.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Runs the comparison and writes its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=list(SETTINGS), default="digits")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--smoke", action="store_true", help="a trial of seconds")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be 1 or more, not {options.seeds}")

    setting, seeds = SETTINGS[options.dataset], options.seeds
    if options.smoke:
        setting = dataclasses.replace(setting, teacher_epochs=2, student_epochs=2)
        seeds = 1
    data = datasets.load(options.dataset)
    print(
        f"{options.dataset}: {setting.images} training images. The teacher sees all "
        f"labels, the student {setting.labels}.\n"
        f"Results are means over {seeds} seed(s) on {len(data.test[1])} test images.\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [Run(seed, data, setting, options.out) for seed in range(seeds)]
    print()
    table = report.compare(
        {
            name: [run.models[name] for run in runs]
            for name in (TEACHER, ALONE, DISTILLED)
        },
        data.test,
    )
    plot(runs, table, options.out / "quickstart.png")
    (options.out / "results.json").write_text(
        json.dumps(table.as_dicts(), indent=2) + "\n"
    )
    # Which student to ship is decided on the validation part, never on the test part.
    best = max(runs, key=lambda run: run.curves[DISTILLED][1][-1])
    best.models[DISTILLED].save(options.out / "student.keras")
    print(
        f"""
agreement: how often it chooses the teacher's class. gap closed: 0 % is the student
alone, 100 % the teacher.

Written to {options.out}:
  student.keras   the distilled student of seed {best.seed}, a plain Keras model:
                  keras.saving.load_model("{options.out}/student.keras")
  quickstart.png  learning curves and test accuracy
  results.json    the table
  logs            for TensorBoard: .venv/bin/tensorboard --logdir {options.out}/logs

Next: try `--dataset mnist`, change `temperature`, `alpha` and `beta` in
examples/quickstart.py, or put your own models in: a teacher is any built Keras model
whose classes are the student's. README.md shows the shortest such program."""
    )


if __name__ == "__main__":
    main()
