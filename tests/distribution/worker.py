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

ROWS, BATCH, EPOCHS = 37, 8, 2  # the last batch does not divide
RAGGED = 33  # and this one leaves workers without rows


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


def compiled(distiller, **options):
    """Ready to train; eagerly where one process does it alone, which is quicker."""
    return distiller.compile(
        keras.optimizers.SGD(0.01, momentum=0.9, global_clipnorm=0.5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        run_eagerly="TF_CONFIG" not in os.environ,
        **options,
    )


def values(distiller):
    return [np.array(v.numpy()) for v in distiller.trainable_variables]


def run(strategy, callbacks=()):
    """Trains by an order of its own and evaluates: weights, all else, distiller."""
    keras.utils.set_random_seed(0)
    ids = Ids()
    with strategy.scope():
        known, student = network(6), network(4, ids)
        link = kd.Link("hidden", "hidden", kd.losses.RelationalDistance(), name="rkd")
        distiller = kd.Distiller(student, known, links=[link])
        compiled(distiller, across_replicas=strategy.num_replicas_in_sync > 1)
    data = kd.data.per_epoch(make)
    history = distiller.fit(
        data, epochs=EPOCHS, verbose=0, callbacks=list(callbacks)
    ).history
    found = {"history": history, "per_epoch": list(ids.seen)}
    x, y = numbered(ROWS)
    found["evaluate"] = distiller.evaluate(
        x, y, batch_size=BATCH, verbose=0, return_dict=True
    )
    rows = distiller.predict(x, batch_size=BATCH, verbose=0)
    found["predict"] = np.asarray(rows).tolist()
    return values(distiller), found, distiller


def run_with_nan(strategy):
    """Trains on three batches; in the second the last worker's last row holds NaN."""
    keras.utils.set_random_seed(0)
    x, y = numbered(3 * BATCH)
    x[2 * BATCH - 1, 1] = np.nan
    with strategy.scope():
        distiller = kd.Distiller(network(4), network(6))
        compiled(distiller, skip_nonfinite=True)
    rows = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    return distiller.fit(rows, verbose=0).history, values(distiller)


def count(distiller, here):
    """Which rows this worker sees in an epoch of each kind of data."""
    strategy, student = distiller.distribute_strategy, distiller.student
    ids = next(layer for layer in student.layers if isinstance(layer, Ids))
    keras.utils.set_random_seed(1)
    x, y = numbered(ROWS)
    rows = tf.data.Dataset.from_tensor_slices((x, y))
    cache = kd.teachers.Cache.build(network(6), rows, here / "cache")
    with strategy.scope():
        cached = compiled(kd.Distiller(student, cache))
    ragged = tf.data.Dataset.from_tensor_slices(numbered(RAGGED))
    writers = [
        keras.callbacks.ModelCheckpoint(here / "checkpoint.keras"),
        keras.callbacks.TensorBoard(here / "logs"),
        keras.callbacks.CSVLogger(here / "log.csv"),
    ]
    found = {}
    for kind, (which, options) in {
        "arrays": (
            distiller,
            {"x": x, "y": y, "batch_size": BATCH, "callbacks": writers},
        ),
        "tf.data": (distiller, {"x": ragged.shuffle(RAGGED, seed=5).batch(BATCH)}),
        "cache": (cached, {"x": cache.attach(rows).shuffle(ROWS, seed=5).batch(BATCH)}),
    }.items():
        ids.seen.clear()
        which.fit(verbose=0, **options)
        found[kind] = list(ids.seen)
    return found


def error_of(fit, *args, **kwargs):
    """What it says."""
    try:
        fit(*args, **kwargs, verbose=0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def refusals(distiller, index):
    """What stock Keras says, and what we say to workers that differ."""
    x, y = numbered(ROWS)
    with distiller.distribute_strategy.scope():
        plain = network(4)
        plain.compile("sgd", "mse")
    found = {"keras": error_of(plain.fit, x, y.astype("float32"), batch_size=BATCH)}
    version = keras.__version__
    keras.__version__ = f"{version}.dev{index}"
    found["versions"] = error_of(distiller.fit, x, y, batch_size=BATCH)
    keras.__version__ = version
    hidden = distiller.student.get_layer("hidden")
    # One difference on top of the other: what is looked at first comes last.
    for kind, difference in {
        "values": lambda: hidden.kernel.assign(np.ones((4, 4))),
        "students": lambda: setattr(hidden, "activation", keras.activations.relu),
        "teachers": lambda: distiller.teacher.variables[0].assign(np.ones((4, 6))),
    }.items():
        if index:
            difference()
        found[kind] = error_of(distiller.fit, x, y, batch_size=BATCH)
    return found


def main():
    here = Path(sys.argv[1])
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    callbacks = []
    if len(sys.argv) > 2:
        callbacks.append(kd.callbacks.Backup(here / "backup", save_freq=2))
        if index:
            callbacks.append(Die(int(sys.argv[2]), here / "died"))
    weights, found, distiller = run(strategy, callbacks)
    if not callbacks:
        found["nan"], after = run_with_nan(strategy)
        np.savez(here / f"nan-{index}.npz", *after)
        found |= count(distiller, here)
        found |= refusals(distiller, index)
    np.savez(here / f"weights-{index}.npz", *weights)
    (here / f"found-{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
