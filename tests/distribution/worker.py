"""What each worker of the test does: `worker.py <directory> [<step to die at>]`.

Run without `TF_CONFIG`, or imported, it is the same run in one process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_distill as kd

ROWS, BATCH, EPOCHS = 37, 8, 2


@keras.saving.register_keras_serializable(package="tests")
class Ids(keras.layers.Layer):
    """Notes the first feature of every row that comes by."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def call(self, x):
        def note(first):
            self.seen += first[:, 0].astype(int).tolist()
            return first

        first = tf.numpy_function(note, [x[:, :1]], x.dtype)
        return tf.concat([tf.ensure_shape(first, (None, 1)), x[:, 1:]], 1)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


class Die(keras.callbacks.Callback):
    """Kills the last worker once, in mid-epoch."""

    def __init__(self, step, mark):
        super().__init__()
        self.step = step
        self.mark = mark
        self.done = 0

    def on_train_batch_end(self, batch, logs=None):
        self.done += 1
        if self.done == self.step and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def numbered(count):
    """Rows whose first feature is their number, from 1: padding has 0."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(count, 4)).astype("float32")
    x[:, 0] = np.arange(1, count + 1)
    return x, generator.integers(0, 3, count)


def network(width, ids=None):
    inputs = keras.Input((4,))
    x = inputs if ids is None else ids(inputs)
    x = keras.layers.Dense(width, "tanh", name="hidden")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))


def make(seed):
    """The data set of one epoch."""
    rows = tf.data.Dataset.from_tensor_slices(numbered(ROWS))
    return rows.shuffle(ROWS, seed=seed[0] + seed[1]).batch(BATCH)


def run(callbacks=()):
    """Trains, counts, evaluates and predicts; returns weights, all else, distiller."""
    keras.utils.set_random_seed(0)
    strategy = tf.distribute.get_strategy()
    if "TF_CONFIG" in os.environ:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    ids = Ids()
    with strategy.scope():
        known, student = network(6), network(4, ids)
        link = kd.Link("hidden", "hidden", kd.losses.RelationalDistance(), name="rkd")
        distiller = kd.Distiller(student, known, links=[link])
        distiller.compile(
            keras.optimizers.SGD(0.01, momentum=0.9, global_clipnorm=0.5),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            across_replicas=strategy.num_replicas_in_sync > 1,
        )
    data = kd.data.per_epoch(make)
    history = distiller.fit(
        data, epochs=EPOCHS, verbose=0, callbacks=list(callbacks)
    ).history
    weights = [np.array(v.numpy()) for v in distiller.trainable_variables]
    found = {"history": history, "per_epoch": list(ids.seen)}
    ids.seen.clear()
    x, y = numbered(ROWS)
    found["evaluate"] = distiller.evaluate(
        x, y, batch_size=BATCH, verbose=0, return_dict=True
    )
    ids.seen.clear()
    distiller.fit(x, y, batch_size=BATCH, verbose=0)
    found["arrays"] = list(ids.seen)
    return weights, found, distiller


def main():
    here = Path(sys.argv[1])
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    callbacks = []
    if len(sys.argv) > 2:
        callbacks.append(kd.callbacks.Backup(here / "backup", save_freq=2))
        if index:
            callbacks.append(Die(int(sys.argv[2]), here / "died"))
    weights, found, distiller = run(callbacks)
    if index:
        distiller.student.trainable_variables[0].assign(np.ones((4, 4)))
    x, y = numbered(ROWS)
    try:
        distiller.fit(x, y, batch_size=BATCH, verbose=0)
    except ValueError as error:
        found["refused"] = str(error)
    np.savez(here / f"weights-{index}.npz", *weights)
    (here / f"found-{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
