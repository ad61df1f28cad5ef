"""One script for one device, several GPUs, and several worker processes.

It takes what it finds: a cluster in the variable `TF_CONFIG`, else all GPUs of the
machine, else the one device. Run from the root of the project, alone or as workers
that are started again when one of them is killed:

    python examples/distributed.py [--epochs 10] [--batch-size 64] [--smoke]
    python -m keras_distill.launch --workers 2 --restarts 3 examples/distributed.py
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import keras_distill as kd


def choose_strategy() -> tf.distribute.Strategy:
    """The strategy for the devices at hand. Nothing may use TensorFlow before it."""
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def network(shape: tuple[int, ...], classes: int, width: int) -> keras.Model:
    """A small convolutional network.

    Its statistics are over the global batch, so that the number of replicas does not
    change what is learnt.
    """
    x = inputs = keras.Input(shape)
    for factor in (1, 2):
        x = keras.layers.Conv2D(factor * width, 3, 2, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(synchronized=True)(x)
        x = keras.layers.ReLU()(x)
    x = keras.layers.GlobalAveragePooling2D(name="embedding")(x)
    return keras.Model(inputs, keras.layers.Dense(classes, name="logits")(x))


def compile_options(batch_size: int) -> dict:
    """What teacher and student are compiled with."""
    return {
        "optimizer": keras.optimizers.Adam(2e-3 * (batch_size / 64) ** 0.5),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
    }


def trained_teacher(data: kd.datasets.Dataset, path: str, smoke: bool) -> keras.Model:
    """The teacher, trained without a strategy, and saved for the next start.

    Every worker makes the same one by itself: from one seed, on the same rows.
    """
    if os.path.exists(path):
        return keras.saving.load_model(path)
    teacher = network(data.input_shape, data.num_classes, 24)
    teacher.compile(**compile_options(64))
    teacher.fit(*data.train, batch_size=64, epochs=1 if smoke else 15, verbose=0)
    temporary = f"{path}.{os.getpid()}.keras"
    teacher.save(temporary)
    os.replace(temporary, path)
    return teacher


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="of all replicas")
    parser.add_argument("--smoke", action="store_true", help="a trial of seconds")
    parser.add_argument("--out", help="folder, default runs/distributed")
    options = parser.parse_args()
    options.out = options.out or f"runs/distributed{'_smoke' * options.smoke}"
    epochs = 2 if options.smoke else options.epochs

    strategy = choose_strategy()
    keras.utils.set_random_seed(0)
    digits = kd.datasets.load("digits")
    os.makedirs(options.out, exist_ok=True)
    path = os.path.join(options.out, "teacher.keras")
    teacher = trained_teacher(digits, path, options.smoke)

    # Student, distiller and compile belong into the scope; the teacher need not.
    keras.utils.set_random_seed(1)
    with strategy.scope():
        student = network(digits.input_shape, digits.num_classes, 6)
        relation = kd.Link("embedding", "embedding", kd.losses.RelationalDistance())
        distiller = kd.Distiller(student, teacher, links=[relation])
        distiller.compile(
            **compile_options(options.batch_size),
            # Relations between all rows of a batch, not only those of one replica.
            across_replicas=strategy.num_replicas_in_sync > 1,
            skip_nonfinite=True,
        )

    def rows(seed: tf.Tensor) -> tf.data.Dataset:
        """The rows of one epoch: the same on every worker, and in every run."""
        data = tf.data.Dataset.from_tensor_slices(digits.train)
        data = data.shuffle(len(digits.train[0]), seed=seed[0] + seed[1])
        return data.batch(options.batch_size, drop_remainder=True).prefetch(2)

    backup = kd.callbacks.Backup(
        os.path.join(options.out, f"backup_{options.batch_size}")
    )
    distiller.fit(
        kd.data.per_epoch(rows),
        epochs=epochs,
        callbacks=[backup],
        shuffle=False,  # the rows are shuffled already
        verbose=0,
    )
    found = distiller.evaluate(
        *digits.test, batch_size=options.batch_size, verbose=0, return_dict=True
    )
    print(
        f"{strategy.num_replicas_in_sync} replicas, "
        f"test accuracy {found['accuracy']:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
