"""How many augmented views must a cache hold to teach like the live teacher?

CIFAR-10, averaged to 16 x 16. A ResNet-14 (16 wide) learns from 1,000 images of each
class. Students, ResNet-8 (8 wide), get 300 of each class, moved and mirrored. Each
seed trains, from the same initial weights and with the images in the same order:

* a student without a teacher, and one with the live teacher, which see images that are
  augmented anew in every epoch;
* students that are taught from a cache of V = 1, 4 and 16 views of each image, and see
  those views in turn (dataset reinforcement, Faghri et al., arXiv:2303.08983).

T = 4, 0.1 x labels + 0.9 x soft targets; SGD with Nesterov momentum 0.9, rate falling
from 0.1 as a cosine, batches of 128, 32 epochs; accuracy is that of the last epoch on
the 10,000 test images. `seconds` of an epoch only compare on an idle machine. Results
go to docs/results/views.json: the same command goes on where a run was interrupted.

    TFDS_DATA_DIR=... python examples/reproduce/views.py [--seeds 3] [--smoke]
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from experiment import Experiment, means, parser, plot_gains
from models import resnet

import keras_distill as kd

BATCH = 128
SIZE = 16
VIEWS = (1, 4, 16)
ALONE, LIVE = "no teacher", "live teacher"

Arrays = tuple[np.ndarray, np.ndarray]


def small(part: Arrays) -> Arrays:
    """Images averaged to 16 x 16, in [-1, 1]."""
    x, y = part
    pooled = x.reshape(len(x), SIZE, 2, SIZE, 2, 3).mean((2, 4))
    return (2 * pooled - 1).astype("float32"), y


def first(part: Arrays, per_class: int) -> Arrays:
    """So many images of each class, in the order in which they were."""
    x, y = part
    rows = [np.flatnonzero(y == c)[:per_class] for c in range(10)]
    few = np.sort(np.concatenate(rows))
    return x[few], y[few]


def augment(image: Any, seed: Any) -> Any:
    """The image moved by up to two pixels, and mirrored or not."""
    image = tf.image.stateless_random_flip_left_right(image, seed)
    wide = tf.pad(image, [[2, 2], [2, 2], [0, 0]], "REFLECT")
    return tf.image.stateless_random_crop(wide, (SIZE, SIZE, 3), seed)


def shuffled(data: Arrays, seed: int) -> tf.data.Dataset:
    """Single rows `(image, label, seed)`, functions of the seed and the epoch."""
    x, y = (tf.constant(part) for part in data)

    def make(key: Any) -> tf.data.Dataset:
        def row(i: Any) -> Any:
            j = tf.random.experimental.index_shuffle(i, key, len(data[1]) - 1)
            own = tf.random.stateless_uniform((2,), key + [0, i], None, None, tf.int32)
            return x[j], y[j], own

        return tf.data.Dataset.range(len(data[1])).map(row)

    return kd.data.per_epoch(make, seed=seed)


def fresh(data: Arrays, seed: int) -> tf.data.Dataset:
    """Batches whose images are augmented anew in every epoch."""
    rows = shuffled(data, seed).map(
        lambda x, y, own: (augment(x, own), y), num_parallel_calls=2
    )
    return rows.batch(BATCH).prefetch(2)


def stored(data: Arrays, seed: int, cache: kd.teachers.Cache) -> tf.data.Dataset:
    """Batches of the cache's views."""
    rows = shuffled(data, seed).map(lambda x, y, own: (x, y))
    return cache.attach(rows).batch(BATCH).prefetch(2)


class Clock(keras.callbacks.Callback):
    """Tells the data which epoch it is, also under a plain model, and times it."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        kd.data.set_epoch(epoch)
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def trained(model: keras.Model, rows: tf.data.Dataset, epochs: int) -> list[float]:
    """Trains a network or a distiller; returns the seconds of each epoch."""
    rate = keras.optimizers.schedules.CosineDecay(0.1, epochs * int(rows.cardinality()))
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    clock = Clock()
    model.fit(rows, epochs=epochs, callbacks=[clock], verbose=0)
    return clock.seconds


def accuracy(model: keras.Model, test: Arrays) -> float:
    """In percent."""
    logits = model.predict(test[0], batch_size=500, verbose=0)
    return 100 * float(np.mean(logits.argmax(-1) == test[1]))


def ready_teacher(data: Arrays, epochs: int, path: Path) -> keras.Model:
    """The teacher, trained now or before."""
    if path.exists():
        return keras.saving.load_model(path)
    keras.utils.set_random_seed(0)
    teacher = resnet(14, 16, input_shape=(SIZE, SIZE, 3), seed=0)
    trained(teacher, fresh(data, 0), epochs)
    teacher.save(path)
    return teacher


def main() -> None:
    """Runs what is missing in the result file."""
    chosen = parser(__doc__.splitlines()[0], "views", seeds=3).parse_args()
    if chosen.smoke:
        random = np.random.default_rng(0)
        images = random.random((600, 32, 32, 3), "float32")
        parts = small((images, random.integers(0, 10, 600)))
        many = few = tuple(part[:256] for part in parts)
        test = tuple(part[256:] for part in parts)
        views, seeds, epochs, teacher_epochs = (2,), 1, 2, 1
    else:
        data = kd.datasets.load("cifar10")
        many, few = (small(first(data.train, count)) for count in (1000, 300))
        test = small(data.test)
        views, seeds, epochs, teacher_epochs = VIEWS, chosen.seeds, 32, 12
        del data
    experiment = Experiment(
        chosen,
        "views",
        "Cached views against a live teacher",
        {
            "teacher": f"ResNet-14, 16 wide, from {len(many[1])} images",
            "student": "ResNet-8, 8 wide",
            "images": f"{len(few[1])} of 16 x 16 x 3, moved and mirrored",
            "epochs": epochs,
            "command": "python examples/reproduce/views.py",
        },
        lambda rows: means(rows, "accuracy %", ALONE),
    )
    teacher = ready_teacher(many, teacher_epochs, experiment.folder / "teacher.keras")
    if not experiment.has("teacher", 0):
        row = {"accuracy %": accuracy(teacher, test), "seconds": None}
        experiment.add("teacher", 0, [row])
    raw = tf.data.Dataset.from_tensor_slices(few[0])
    caches = {
        f"cache, V = {count}": kd.teachers.Cache.build(
            teacher,
            raw,
            experiment.folder / f"views_{count}",
            views=count,
            augment=augment,
        )
        for count in views
    }
    for seed in range(seeds):
        for run in (ALONE, LIVE, *caches):
            if experiment.has(run, seed):
                continue
            student = resnet(8, 8, input_shape=(SIZE, SIZE, 3), seed=seed + 1)
            keras.utils.set_random_seed(seed)
            known = caches.get(run, teacher)
            model = student if run == ALONE else kd.Distiller(student, known)
            rows = stored(few, seed, known) if run in caches else fresh(few, seed)
            seconds = trained(model, rows, epochs)
            found = {
                "accuracy %": accuracy(student, test),
                "seconds": statistics.mean(seconds[1:]),
            }
            experiment.add(run, seed, [found])
    plot_gains(
        [row for row in experiment.rows if row["run"] != "teacher"],
        "accuracy %",
        ALONE,
        experiment.path.with_suffix(".png"),
        "test accuracy, points above the student without a teacher, same seed",
    )


if __name__ == "__main__":
    main()
