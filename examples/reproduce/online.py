"""Learning without a teacher model, in a regime where a network over-fits.

CIFAR-10, averaged to 16 x 16, 500 images of each class, no crops: ResNet-14 (16 wide)
learns these by heart, so that there is something to gain. Each seed trains, from the
same initial weights and with the same batches:

* the plain network, and born-again generations after it (BAN, 3 in all);
* an on-the-fly native ensemble of 3 branches that part before the last stage (ONE);
* two networks that teach each other (DML), updated together;
* the network with two exits that it teaches itself (BYOT);
* ONE without its gate (a plain mean of logits), without sharing (the branches part at
  the image, and the gate sees nothing else), and without soft targets;
* the plain network with smoothed labels (0.1), a confidence penalty (0.1), and a
  virtual teacher (Tf-KD).

SGD with Nesterov momentum 0.9, rate 0.1 falling to 0 as a cosine, L2 of 5e-4 / 2 on all
kernels, batches of 128, 100 epochs, mirrored images; accuracy is that of the last epoch
on the 10,000 test images. Every method's result is written as soon as it is there, to
docs/results/online.json: the same command goes on where a run was interrupted.

    TFDS_DATA_DIR=... python examples/reproduce/online.py [--seeds 5]
        [--methods BAN ONE DML BYOT] [--smoke]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from experiment import Experiment, Row, gains, means, parser, plot_gains
from models import resnet

import keras_distill as kd

BATCH = 128
PLAIN = "BAN: plain"  # the first generation

Arrays = tuple[np.ndarray, np.ndarray]


def images(cache: Path) -> tuple[Arrays, Arrays]:
    """Training and test images of 16 x 16 as bytes, with labels.

    They are kept in a file of 10 MB, which also serves a machine without CIFAR-10.
    """
    if not cache.exists():
        data = kd.datasets.load("cifar10")
        labels = data.train[1]
        rows = [np.flatnonzero(labels == c)[:500] for c in range(data.num_classes)]
        few = np.sort(np.concatenate(rows))
        arrays = {}
        for name, (x, y) in {
            "train": (data.train[0][few], labels[few]),
            "test": data.test,
        }.items():
            pooled = x.reshape(len(x), 16, 2, 16, 2, 3).mean((2, 4))
            arrays[f"{name}_x"] = np.round(255 * pooled).astype("uint8")
            arrays[f"{name}_y"] = y
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, **arrays)
    with np.load(cache) as file:
        train, test = (
            (file[f"{name}_x"].astype("float32") / 127.5 - 1, file[f"{name}_y"])
            for name in ("train", "test")
        )
    return train, test


def batches(train: Arrays, seed: int) -> tf.data.Dataset:
    """Mirrored images in an order that depends on seed and epoch alone."""
    x, y = (tf.constant(part) for part in train)

    def make(key: tf.Tensor) -> tf.data.Dataset:
        def row(i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            j = tf.random.experimental.index_shuffle(i, key, len(train[1]) - 1)
            flip = tf.random.stateless_uniform((), key + [0, i]) < 0.5
            return tf.where(flip, tf.reverse(x[j], [1]), x[j]), y[j]

        return tf.data.Dataset.range(len(train[1])).map(row).batch(BATCH)

    return kd.data.per_epoch(make, seed=seed).prefetch(2)


@keras.saving.register_keras_serializable(package="online")
def smoothed(y_true: Any, y_pred: Any) -> Any:
    """Keras's label smoothing, for integers."""
    classes = keras.ops.cast(keras.ops.reshape(y_true, (-1,)), "int32")
    return keras.losses.categorical_crossentropy(
        keras.ops.one_hot(classes, y_pred.shape[-1]),
        y_pred,
        from_logits=True,
        label_smoothing=0.1,
    )


@keras.saving.register_keras_serializable(package="online")
class Equal(keras.layers.Layer):
    """A gate that gives every branch the same weight, whatever it sees."""

    def __init__(self, branches: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.branches = branches

    def call(self, x: Any) -> Any:
        return keras.ops.ones((keras.ops.shape(x)[0], self.branches)) / self.branches

    def compute_output_shape(self, shape: tuple) -> tuple:
        return (shape[0], self.branches)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "branches": self.branches}


class Methods:
    """Trains one method after the other, for one seed."""

    def __init__(
        self,
        train: Arrays,
        test: Arrays,
        depth: int,
        seed: int,
        epochs: int,
        folder: Path,
    ) -> None:
        self._depth, self._seed, self._epochs = depth, seed, epochs
        self._train, self._test, self._size = batches(train, seed), test, len(train[1])
        self._folder = folder / f"seed_{seed}"

    def run(self, method: str) -> dict[str, float]:
        """Test accuracies by name."""
        keras.utils.set_random_seed(self._seed)
        return METHODS[method](self)

    def _network(self, number: int = 0) -> keras.Model:
        """A network with L2 on its kernels; number 0 is the plain network's start."""
        seed = 100 * number + self._seed
        model = resnet(self._depth, 16, input_shape=(16, 16, 3), seed=seed)

        def regularized(layer: keras.Layer) -> keras.Layer:
            config = layer.get_config()
            if "kernel_regularizer" in config:
                config["kernel_regularizer"] = keras.regularizers.L2(5e-4 / 2)
            return type(layer).from_config(config)

        return keras.models.clone_model(model, clone_function=regularized)

    def _options(self, loss: Any = None) -> dict[str, Any]:
        steps = self._epochs * -(-self._size // BATCH)
        rate = keras.optimizers.schedules.CosineDecay(0.1, steps)
        return {
            "optimizer": keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
            "loss": loss
            or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        }

    def _trained(
        self,
        distiller: kd.BaseDistiller,
        method: str,
        loss: Any = None,
    ) -> dict[str, float]:
        """Trains a distiller; returns its own accuracies on the test images."""
        distiller.compile(**self._options(loss), metrics=["accuracy"])
        backup = kd.callbacks.Backup(self._folder / f"{method}.backup")
        distiller.fit(self._train, epochs=self._epochs, callbacks=[backup], verbose=0)
        x, y = self._test
        logs = distiller.evaluate(x, y, batch_size=500, verbose=0, return_dict=True)
        return {k: float(v) for k, v in logs.items() if k.endswith("accuracy")}

    def born_again(self) -> dict[str, float]:
        numbers = iter(range(3))
        done = len(list((self._folder / "BAN").glob("generation_?.keras")))
        for _ in range(done):  # every generation its own start, also when it goes on
            next(numbers)
        result = kd.generations.born_again(
            lambda: self._network(next(numbers)),
            self._options,
            self._train,
            generations=3,
            epochs=self._epochs,
            directory=self._folder / "BAN",
            verbose=0,
        )
        x, y = self._test
        logits = [m.predict(x, batch_size=500, verbose=0) for m in result.models]
        log_p = [keras.ops.convert_to_numpy(keras.ops.log_softmax(z)) for z in logits]
        found = {
            "plain": logits[0],
            "generation 1": logits[1],
            "generation 2": logits[2],
        }
        found["ensemble of 2"] = np.logaddexp(*log_p[:2])
        found["ensemble of 3"] = np.logaddexp.reduce(log_p)
        return {k: float(np.mean(z.argmax(-1) == y)) for k, z in found.items()}

    def one(
        self, name: str = "ONE", shared: bool = True, **changes: Any
    ) -> dict[str, float]:
        options = {"ramp_up": round(0.27 * self._epochs)} | changes
        if shared:
            network = self._network()
            ensemble = kd.OneEnsemble.from_model(network, "stage2", 3, **options)
        else:
            image = keras.Sequential(
                [keras.Input((16, 16, 3)), keras.layers.Identity()]
            )
            networks = [self._network(number) for number in range(3)]
            ensemble = kd.OneEnsemble(image, networks, **options)
        logs = self._trained(ensemble, name)
        branches = [logs[f"branch_{i}_accuracy"] for i in range(3)]
        return {
            "mean branch": statistics.mean(branches),
            **{f"branch {i}": value for i, value in enumerate(branches)},
            "ensemble": logs["ensemble_accuracy"],
        }

    def mutual(self) -> dict[str, float]:
        mutual = kd.MutualLearning(
            [self._network(0), self._network(1)], updates="together"
        )
        logs = self._trained(mutual, "DML")
        nets = [logs["net_0_accuracy"], logs["net_1_accuracy"]]
        return {
            "mean network": statistics.mean(nets),
            "network 0": nets[0],
            "network 1": nets[1],
            "mean of both": logs["accuracy"],
        }

    def exits(self) -> dict[str, float]:
        exits = kd.BeYourOwnTeacher.from_model(
            self._network(), exits=["stage1", "stage2"], alpha=0.3
        )
        logs = self._trained(exits, "BYOT")
        return {f"exit {i}": logs[f"exit_{i}_accuracy"] for i in range(3)}

    def single(
        self,
        name: str,
        make: Callable[[keras.Model], kd.BaseDistiller] = kd.BaseDistiller,
        loss: Any = None,
    ) -> dict[str, float]:
        found = self._trained(make(self._network()), name, loss)
        return {"network": found["accuracy"]}


METHODS: dict[str, Callable[[Methods], dict[str, float]]] = {
    "BAN": Methods.born_again,
    "ONE": Methods.one,
    "DML": Methods.mutual,
    "BYOT": Methods.exits,
    "ONE, no gate": lambda m: m.one("no_gate", gate=Equal(3)),
    "ONE, no sharing": lambda m: m.one("no_sharing", shared=False),
    "ONE, no soft targets": lambda m: m.one("no_soft", soft_weight=0.0),
    "label smoothing": lambda m: m.single("smoothing", loss=smoothed),
    "confidence penalty": lambda m: m.single(
        "penalty", loss=kd.losses.ConfidencePenalty(0.1)
    ),
    "Tf-KD": lambda m: m.single("Tf-KD", kd.TeacherFree),
}


def summary(rows: list[Row]) -> dict[str, Any]:
    """Accuracies beside the plain network's, and what each part of ONE is worth."""
    accuracies = means(rows, "accuracy %", PLAIN)
    for line in accuracies.values():
        if "difference" in line:
            line["over"] = PLAIN
    parts: dict[str, Row] = {}
    for model in ("mean branch", "ensemble"):
        some = [
            row
            for row in rows
            if row["run"].startswith("ONE") and row["model"] == model
        ]
        parts |= gains(some, "accuracy %", f"ONE: {model}")
    tables = {"accuracy": accuracies}
    return tables | ({"ONE without one of its parts": parts} if parts else {})


def main() -> None:
    """Runs what is missing in the result file."""
    options = parser(__doc__.splitlines()[0], "online", seeds=5)
    options.add_argument("--epochs", type=int, default=100)
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    chosen = options.parse_args()
    epochs, seeds = (1, 1) if chosen.smoke else (chosen.epochs, chosen.seeds)
    depth = 8 if chosen.smoke else 14
    if chosen.smoke:
        random = np.random.default_rng(0)
        train, test = (
            (random.random((n, 16, 16, 3), "float32"), random.integers(0, 10, n))
            for n in (16, 50)
        )
    else:
        train, test = images(chosen.runs / "images.npz")
    experiment = Experiment(
        chosen,
        "online",
        "Learning without a teacher model, where a network over-fits",
        {
            "network": f"ResNet-{depth}, 16 wide",
            "images": f"{len(train[1])} of 16 x 16 x 3",
            "epochs": epochs,
            "command": f"python examples/reproduce/online.py --epochs {epochs}",
        },
        summary,
    )
    for seed in range(seeds):
        trainer = Methods(train, test, depth, seed, epochs, experiment.folder)
        for method in chosen.methods:
            if experiment.has(method, seed):
                continue
            found = trainer.run(method)
            experiment.add(
                method,
                seed,
                ({"model": m, "accuracy %": 100 * value} for m, value in found.items()),
            )
    plot_gains(
        experiment.rows,
        "accuracy %",
        PLAIN,
        experiment.path.with_suffix(".png"),
        "test accuracy, points above the plain network of the same seed",
    )


if __name__ == "__main__":
    main()
