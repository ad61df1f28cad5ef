"""How many augmented views must a cache hold to teach like the live teacher?

CIFAR-10, averaged to 16 x 16. A ResNet-14 (16 wide) learns from 2,000 images of each
class. Students, ResNet-8 (8 wide), get 500 images of each class, moved and mirrored. Each
seed trains, from the same initial weights and with the images in the same order:

* a student without a teacher, and one with the live teacher, which see images that are
  augmented anew in every epoch;
* students that are taught from a cache of V = 1, 4 and 16 views of each image, and see
  those views in turn (dataset reinforcement, Faghri et al., arXiv:2303.08983).

T = 4, 0.1 x labels + 0.9 x soft targets; SGD with Nesterov momentum 0.9, rate 0.1 falling
to 0 as a cosine, batches of 128, 32 epochs; accuracy is that of the last epoch on the
10,000 test images. `seconds` is the time of an epoch, the first left out. Results go to
docs/results/views.json: the same command goes on where a run was interrupted.

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
    """Seconds of each epoch."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def options(size: int, epochs: int) -> dict[str, Any]:
    """What every network is compiled with."""
    rate = keras.optimizers.schedules.CosineDecay(0.1, epochs * -(-size // BATCH))
    return {
        "optimizer": keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }


def accuracy(model: keras.Model, test: Arrays) -> float:
    """In percent."""
    logits = model.predict(test[0], batch_size=500, verbose=0)
    return 100 * float(np.mean(logits.argmax(-1) == test[1]))


def trained_teacher(data: Arrays, epochs: int, path: Path) -> keras.Model:
    """The teacher, trained now or before."""
    if path.exists():
        return keras.saving.load_model(path)
    keras.utils.set_random_seed(0)
    model = resnet(14, 16, input_shape=(SIZE, SIZE, 3), seed=0)
    alone = kd.TeacherFree(model) if hasattr(kd, "Alone") else model
    alone.compile(**options(len(data[1]), epochs))
    alone.fit(fresh(data, 0), epochs=epochs, verbose=0)
    model.save(path)
    return model
