"""Distillation of MNIST networks, after section 3 of Hinton, Vinyals and Dean (2015).

A teacher of 2 x 1200 units learns from images shifted at random by up to 2 pixels, with
dropout (0.1 of the inputs, 0.3 of the units) and weights of bounded norm. Students of
2 x 800 units, without any regularisation, learn from the images as they are:

* labels: from the labels alone;
* soft: from the teacher's soft targets at T = 20 alone; mixed: 0.9 of them and 0.1 of
  the labels; soft, shifted images: from images shifted like the teacher's, which is
  more than the paper did;
* no 3s, only 7s and 8s: from soft targets of a part of the classes, for as many steps,
  but at most three times the epochs. Then the biases of
  the missing (the only) classes are moved: by what is best on the test images, as in
  the paper, or by what gives each of these classes the mean probability that the
  teacher gives it, on the images that the student has seen or on all training images
  (`kd.teachers.correct_bias`, without labels);
* 3 %: from the labels, or from the soft targets, of 1800 images.

Smaller students show what the temperature does: 2 x 30 and 2 x 300 units, soft targets
alone. All train with Adam, its rate falling from 1e-3 to 0 as a cosine, batches of 128
(the teacher 256); the teacher computes in bfloat16. Errors are those of the last epoch
on the 10,000 test images. The dropout was chosen in short runs, on the last 6,000 of
the 60,000 training images. Each result is written as soon as it is there, to
docs/results/hinton_mnist.json: the same command goes on where a run was interrupted. A
teacher whose network is gone, as in a new clone, is trained anew from the same seed. On
another machine that gives another network, for sums are rounded differently: students
say how many errors their own teacher makes.

    TFDS_DATA_DIR=... python examples/reproduce/hinton_mnist.py [--seeds 5] [--smoke]

Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015
(arXiv 1503.02531).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from experiment import Experiment, Row, gains, means, name_of, parser
from keras import layers
from scipy.special import softmax

import keras_distill as kd

T = 20.0
SHIFT = 2  # pixels, in any direction
TAUGHT_BY = "its teacher's errors"  # in the rows of students
PAPER = {  # errors of 10,000
    "teacher": 67,
    "labels": 146,
    "mixed": 74,
    "no 3s: as it is": 206,
    "no 3s: best on test": 109,
    "only 7s and 8s: as it is": 4730,
    "only 7s and 8s: best on test": 1320,
}

Data = tuple[Any, np.ndarray]  # what a network sees, and labels


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed; the defaults are the full run."""

    teacher_epochs: int = 250
    epochs: int = 40
    shifted_epochs: int = 100
    small_epochs: int = 300
    small_rows: int = 1800
    teacher: int = 1200
    student: int = 800
    smaller: tuple[int, ...] = (30, 300)
    temperatures: tuple[int, ...] = (1, 2, 3, 4, 8, 20)
    teachers: int = 3


TRIAL = Sizes(1, 1, 1, 1, 100, 24, 16, (8,), (4,), 1)


class Teacher(NamedTuple):
    """A trained network and what it knows."""

    model: keras.Model
    errors: int  # on the test images
    cache: kd.teachers.Cache
    known: Data  # the training data, with its outputs


def mnist(smoke: bool) -> tuple[Data, Data]:
    """Training images (the validation part too) and test images, as rows of pixels."""
    if smoke:
        random = np.random.default_rng(0)
        parts = [
            (random.random((n, 784), "float32"), np.arange(n, dtype="int32") % 10)
            for n in (300, 200)
        ]
        return parts[0], parts[1]
    data = kd.datasets.load("mnist")
    both = zip(data.train, data.validation, strict=True)
    x, y = (np.concatenate(pair) for pair in both)
    return (x.reshape(len(x), -1), y), (data.test[0].reshape(-1, 784), data.test[1])


def network(units: int, regularized: bool = False) -> keras.Model:
    """Two layers of ReLU units; regularized: dropout, and bounded weights of a unit."""
    policy = "mixed_bfloat16" if regularized else "float32"
    constraint = keras.constraints.MaxNorm(math.sqrt(15)) if regularized else None
    x = inputs = keras.Input((784,))
    if regularized:
        x = layers.Dropout(0.1)(x)
    for _ in range(2):
        x = layers.Dense(units, "relu", kernel_constraint=constraint, dtype=policy)(x)
        if regularized:
            x = layers.Dropout(0.3, dtype=policy)(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x))


def batches(data: Data, size: int, seed: int, shifted: bool) -> tf.data.Dataset:
    """Batches from memory, in an order that depends on seed and epoch alone."""
    if shifted:
        margin = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT))
        images = np.pad(data[0].reshape(-1, 28, 28), margin)
        data = (images.reshape(len(images), -1), data[1])
    rows_of = keras.tree.map_structure(tf.constant, data)
    width = 28 + 2 * SHIFT
    window = (np.arange(28)[:, None] * width + np.arange(28)).reshape(1, -1)

    def make(key: tf.Tensor) -> tf.data.Dataset:
        def batch(number: tf.Tensor, rows: tf.Tensor) -> Data:
            x, y = keras.tree.map_structure(lambda part: tf.gather(part, rows), rows_of)
            if not shifted:
                return x, y
            corner = tf.random.stateless_uniform(
                (tf.size(rows), 2),
                tf.stack([key[0] * 100_000 + key[1], number]),
                maxval=2 * SHIFT + 1,
                dtype=tf.int64,
            )
            return tf.gather(x, window + corner @ [[width], [1]], batch_dims=1), y

        order = tf.random.experimental.stateless_shuffle(tf.range(len(data[1])), key)
        return (
            tf.data.Dataset.from_tensor_slices(order)
            .batch(size)
            .enumerate()
            .map(batch, num_parallel_calls=2)
        )

    return kd.data.per_epoch(make, seed=seed).prefetch(4)


def trained(
    distiller: kd.BaseDistiller,
    data: Data,
    epochs: int,
    seed: int,
    *,
    rate: float = 1e-3,
    batch: int = 128,
    shifted: bool = False,
    callbacks: list[keras.callbacks.Callback] | None = None,
) -> keras.Model:
    """The distiller's student, trained."""
    steps = epochs * math.ceil(len(data[1]) / batch)
    distiller.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=14,
        jit_compile=False,
    )
    distiller.fit(
        batches(data, batch, seed, shifted),
        epochs=epochs,
        callbacks=callbacks,
        verbose=0,
    )
    return distiller.student


def logits_of(model: keras.Model, x: np.ndarray) -> np.ndarray:
    """What a model says, 64 bits wide."""
    parts = [model(x[i : i + 1000], training=False) for i in range(0, len(x), 1000)]
    return np.concatenate(parts).astype("float64")


class EveryTenth(keras.callbacks.Callback):
    """Counts the test errors after every tenth epoch.

    Attributes:
        best: The fewest.
    """

    def __init__(self, count: Callable[[keras.Model], int]) -> None:
        super().__init__()
        self._count = count
        self.best: int | None = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch % 10 == 9 or epoch + 1 == self.params["epochs"]:
            errors = self._count(self.model.student)
            self.best = errors if self.best is None else min(self.best, errors)


class Hinton:
    """Trains the networks, one after the other.

    Args:
        train: Training images and labels.
        test: Test images and labels.
        sizes: How much is computed.
        folder: Where teachers, what they know, and backups are kept.
    """

    def __init__(self, train: Data, test: Data, sizes: Sizes, folder: Path) -> None:
        self._train, self._test = train, test
        self._sizes, self._folder = sizes, folder
        self._teachers: dict[int, Teacher] = {}

    def runs(self, seeds: int) -> Iterator[tuple[str, int, Callable[[], list[Row]]]]:
        """Name, seed and function of each run, the most telling first."""
        first = range(seeds)
        yield "teacher", 0, lambda: self._new_teacher(0)
        for s in first:
            yield "labels", s, lambda s=s: self._labels(s)
            yield "soft", s, lambda s=s: self._distilled(s)
            yield "mixed", s, lambda s=s: self._distilled(s, alpha=0.1)
        for s in first:
            yield "no 3s", s, lambda s=s: self._without(s, (3,))
            yield "only 7s and 8s", s, lambda s=s: self._only(s, (7, 8))
            yield "3 %, labels", s, lambda s=s: self._few(s, soft=False)
            yield "3 %, soft", s, lambda s=s: self._few(s, soft=True)
        yield from self._by_temperature(self._sizes.smaller[0], first)
        for s in first:
            yield "soft, shifted images", s, lambda s=s: self._shifted(s)
        for k in range(1, self._sizes.teachers):
            yield "teacher", k, lambda k=k: self._new_teacher(k)
            for s in first:
                name = f"soft, teacher {k}"
                yield name, s, lambda s=s, k=k: self._distilled(s, teacher=k)
        for units in self._sizes.smaller[1:]:
            yield from self._by_temperature(units, first)

    def _by_temperature(self, units: int, seeds: range) -> Iterator[Any]:
        for s in seeds:
            yield f"2 x {units}, labels", s, lambda s=s: self._labels(s, units)
            for t in self._sizes.temperatures:
                yield (
                    f"2 x {units}, T = {t}",
                    s,
                    lambda s=s, t=t: self._distilled(s, units, temperature=t),
                )

    # -- teachers -------------------------------------------------------------------

    def _new_teacher(self, number: int) -> list[Row]:
        keras.utils.set_random_seed(1000 + number)
        model = trained(
            kd.BaseDistiller(network(self._sizes.teacher, True), alpha=1.0),
            self._train,
            self._sizes.teacher_epochs,
            1000 + number,
            batch=256,
            shifted=True,
            callbacks=[kd.callbacks.Backup(self._folder / f"teacher_{number}.backup")],
        )
        exact = network(self._sizes.teacher)  # float32, and nothing random
        exact.set_weights([v.numpy() for v in model.trainable_variables])
        exact.save(self._folder / f"teacher_{number}.keras")
        return [{"errors": self._errors(exact)}]

    def _teacher(self, number: int) -> Teacher:
        """A teacher from its file, or trained anew; the same object each time."""
        if number not in self._teachers:
            path = self._folder / f"teacher_{number}.keras"
            if not path.exists():
                self._new_teacher(number)
            model = keras.models.load_model(path)
            rows = tf.data.Dataset.from_tensor_slices(self._train)
            cache = kd.teachers.Cache.build(
                model,
                rows,
                self._folder / f"cache_{number}",
                dtype="float32",
                batch_size=1000,
            )
            everything = cache.attach(rows).batch(len(self._train[1]))
            (known,) = everything.as_numpy_iterator()
            self._teachers[number] = Teacher(model, self._errors(model), cache, known)
        return self._teachers[number]

    # -- students -------------------------------------------------------------------

    def _student(self, seed: int, units: int | None = None) -> keras.Model:
        keras.utils.set_random_seed(seed)
        return network(units or self._sizes.student)

    def _labels(self, seed: int, units: int | None = None) -> list[Row]:
        plain = kd.BaseDistiller(self._student(seed, units), alpha=1.0)
        model = trained(plain, self._train, self._sizes.epochs, seed)
        return [{"errors": self._errors(model)}]

    def _distilled(
        self,
        seed: int,
        units: int | None = None,
        *,
        teacher: int = 0,
        temperature: float = T,
        alpha: float = 0.0,
    ) -> list[Row]:
        taught_by = self._teacher(teacher)
        distiller = kd.Distiller(
            self._student(seed, units),
            taught_by.cache,
            temperature=temperature,
            alpha=alpha,
            beta=1 - alpha,
        )
        model = trained(distiller, taught_by.known, self._sizes.epochs, seed)
        return [{"errors": self._errors(model), TAUGHT_BY: taught_by.errors}]

    def _shifted(self, seed: int) -> list[Row]:
        teacher = self._teacher(0)
        distiller = kd.Distiller(
            self._student(seed), teacher.model, temperature=T, alpha=0, beta=1
        )
        backup = kd.callbacks.Backup(self._folder / f"shifted_{seed}.backup")
        model = trained(
            distiller,
            self._train,
            self._sizes.shifted_epochs,
            seed,
            shifted=True,
            callbacks=[backup],
        )
        return [{"errors": self._errors(model), TAUGHT_BY: teacher.errors}]

    def _few(self, seed: int, soft: bool) -> list[Row]:
        size = self._sizes.small_rows
        rows = np.random.default_rng(seed).permutation(len(self._train[1]))[:size]
        student = self._student(seed)
        if soft:
            teacher = self._teacher(0)
            distiller = kd.Distiller(
                student, teacher.cache, temperature=T, alpha=0, beta=1
            )
            data = teacher.known
        else:
            distiller, data = kd.BaseDistiller(student, alpha=1.0), self._train
        watch = EveryTenth(self._errors)
        some = keras.tree.map_structure(lambda part: part[rows], data)
        model = trained(
            distiller, some, self._sizes.small_epochs, seed, callbacks=[watch]
        )
        return [{"errors": self._errors(model), "errors, best epoch": watch.best}]

    # -- classes that the student never sees ----------------------------------------

    def _without(self, seed: int, classes: tuple[int, ...]) -> list[Row]:
        return self._partial(seed, ~np.isin(self._train[1], classes), classes)

    def _only(self, seed: int, classes: tuple[int, ...]) -> list[Row]:
        return self._partial(seed, np.isin(self._train[1], classes), classes)

    def _partial(
        self, seed: int, seen: np.ndarray, classes: tuple[int, ...]
    ) -> list[Row]:
        """Trains on some rows; then moves the biases of some classes."""
        teacher = self._teacher(0)
        distiller = kd.Distiller(
            self._student(seed), teacher.cache, temperature=T, alpha=0, beta=1
        )
        some = keras.tree.map_structure(lambda part: part[seen], teacher.known)
        # As many steps as with all rows, within limits.
        epochs = round(self._sizes.epochs * len(seen) / max(seen.sum(), 1))
        model = trained(distiller, some, min(epochs, 3 * self._sizes.epochs), seed)
        logits = logits_of(model, self._test[0])
        grid = np.arange(-150, 151) / 10
        shifts: dict[str, Any] = {
            "as it is": 0.0,
            "best on test": min(
                grid, key=lambda s: (self._moved(logits, classes, s)[0], abs(s))
            ),
        }
        trained_weights = model.get_weights()
        for name, rows in (("seen", seen), ("all", np.full(len(seen), True))):
            x = self._train[0][rows]
            shares = softmax(logits_of(teacher.model, x), axis=1).mean(0)
            found = kd.teachers.correct_bias(
                model, x, {c: shares[c] for c in classes}, batch_size=1000
            )
            shifts[f"matched on {name}"] = np.array([found[c] for c in classes])
            model.set_weights(trained_weights)
        rows = []
        for name, shift in shifts.items():
            errors, inside = self._moved(logits, classes, shift)
            row = {"model": name, "errors": errors, "errors on these digits": inside}
            rows.append(row | {"shift": float(np.mean(shift))})
        return rows

    def _moved(
        self, logits: np.ndarray, classes: tuple[int, ...], shift: Any
    ) -> tuple[int, int]:
        """Test errors with moved biases: all, and those on images of these classes."""
        moved = logits.copy()
        moved[:, list(classes)] += shift
        labels = self._test[1]
        wrong = moved.argmax(1) != labels
        return int(wrong.sum()), int(wrong[np.isin(labels, classes)].sum())

    def _errors(self, model: keras.Model) -> int:
        x, y = self._test
        return int(np.sum(logits_of(model, x).argmax(1) != y))


# -- what came out --------------------------------------------------------------------


def summary(rows: list[Row]) -> dict[str, Any]:
    """Tables of the docs: errors beside the paper's, the gap closed, the shifts."""
    errors = means(rows, "errors")
    for name, line in errors.items():
        line["paper"] = PAPER.get(name)
    for value in ("errors on these digits", "shift", "errors, best epoch"):
        for name, line in means(rows, value).items():
            errors[name][value] = line[value]
    result: dict[str, Any] = {"test errors": errors}
    if gained := all_gains(rows):
        result["accuracy gained, in points"] = gained
    if closed := gaps(rows):
        result["part of the gap between labels and teacher that is closed"] = closed
    return result


def all_gains(rows: list[Row]) -> dict[str, Row]:
    """Paired differences, each run against what it is meant to be better than."""
    result: dict[str, Row] = {}
    for baseline, group in {
        "labels": ("labels", "soft", "mixed"),
        "no 3s: as it is": ("no 3s",),
        "only 7s and 8s: as it is": ("only 7s and 8s",),
        "3 %, labels": ("3 %",),
        **{f"2 x {n}, labels": (f"2 x {n},",) for n in Sizes().smaller},
    }.items():
        some = [
            row | {"accuracy": 100 - row["errors"] / 100}
            for row in rows
            if row["run"].startswith(group)
        ]
        result |= gains(some, "accuracy", baseline)
    return result


def gaps(rows: list[Row]) -> dict[str, Row]:
    """How far distillation brings a student towards its teacher, in percent."""
    teachers = {row["seed"]: row["errors"] for row in rows if row["run"] == "teacher"}
    labels = {row["seed"]: row["errors"] for row in rows if row["run"] == "labels"}
    names = {"soft": 0, "mixed": 0, "soft, shifted images": 0}
    names |= {f"soft, teacher {k}": k for k in teachers if k}
    result: dict[str, Row] = {}
    for name, number in names.items():
        if number not in teachers:
            continue
        found = [
            (labels[row["seed"]], row["errors"], row.get(TAUGHT_BY, teachers[number]))
            for row in rows
            if row["run"] == name and row["seed"] in labels
        ]
        if not found:
            continue
        plain, own, teacher = map(statistics.mean, zip(*found, strict=True))
        gap = plain - teacher
        result[name] = {
            "seeds": len(found),
            "teacher": teacher,
            "labels": plain,
            "distilled": own,
            "gap closed %": 100 * (plain - own) / gap if gap else None,
            "paper": 91 if name == "mixed" else None,
        }
    return result


def plot(rows: list[Row], sizes: Sizes, path: Path) -> None:
    """Errors by method, with classes missing, and over the temperature."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(name_of(row), []).append(row["errors"])
    figure, axes = plt.subplots(1, 3, figsize=(17, 4.5), layout="constrained")
    parts = [name for name in found if name.startswith(("no 3s", "only"))]
    small = [name for name in found if name.startswith(("2 x", "3 %"))]
    main = [name for name in found if name not in parts + small]
    for ax, names in zip(axes, (main, parts), strict=False):
        for height, name in enumerate(names):
            ax.plot(found[name], [height] * len(found[name]), "o", alpha=0.6)
            ax.plot(statistics.mean(found[name]), height, "k|", ms=16, label="mean")
            if name in PAPER:
                ax.plot(PAPER[name], height, "kx", label="paper")
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set_xlabel("test errors of 10,000")
        handles, labels = ax.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        ax.legend(unique.values(), unique.keys())
    axes[0].set_title("2 x 800 students")
    axes[1].set_title("Digits that the student never saw")
    if parts:
        axes[1].set_xscale("log")
    for number, width in enumerate(sizes.smaller):
        color = f"C{number}"
        points = [
            (t, statistics.mean(found[f"2 x {width}, T = {t}"]))
            for t in sizes.temperatures
            if f"2 x {width}, T = {t}" in found
        ]
        if points:
            axes[2].plot(*zip(*points, strict=True), "o-", color=color, label=width)
        if plain := found.get(f"2 x {width}, labels"):
            axes[2].axhline(statistics.mean(plain), color=color, ls=":")
    axes[2].set_xscale("log", base=2)
    axes[2].set_xlabel("temperature")
    axes[2].set_ylabel("test errors of 10,000")
    axes[2].set_title("Smaller students\n(dotted: labels alone)")
    if axes[2].get_legend_handles_labels()[0]:
        axes[2].legend(title="units per layer")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    options = parser(__doc__.splitlines()[0], "hinton_mnist", seeds=5)
    for name in ("teacher_epochs", "epochs"):
        default = getattr(Sizes, name)
        options.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return options.parse_args()


def main() -> None:
    """Runs what is missing in the result file."""
    chosen = arguments()
    sizes = TRIAL if chosen.smoke else Sizes(chosen.teacher_epochs, chosen.epochs)
    train, test = mnist(chosen.smoke)
    experiment = Experiment(
        chosen,
        "hinton_mnist",
        "MNIST: soft targets, missing classes, few labels",
        {
            "images": f"{len(train[1])} of 28 x 28",
            **dataclasses.asdict(sizes),
            "command": "python examples/reproduce/hinton_mnist.py",
        },
        summary,
    )
    hinton = Hinton(train, test, sizes, experiment.folder)
    for run, seed, work in hinton.runs(1 if chosen.smoke else chosen.seeds):
        if experiment.has(run, seed):
            continue
        start = time.perf_counter()
        rows = work()
        seconds = round(time.perf_counter() - start)
        experiment.add(run, seed, [{**row, "seconds": seconds} for row in rows])
        keras.backend.clear_session()
    plot(experiment.rows, sizes, experiment.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
