"""Tiny networks and data for the tests of the distillers."""

from __future__ import annotations

import sys
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

import keras_distill as kd

FEATURES, CLASSES = 6, 3
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(rows: int = 24, seed: int = 0):
    """Rows `x` and integer labels `y`."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, FEATURES)).astype("float32")
    return x, generator.integers(0, CLASSES, rows).astype("int32")


def images(rows: int = 8, seed: int = 0):
    """Images `x` of 8 x 8 x 3 and integer labels `y`."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, 8, 8, 3)).astype("float32")
    return x, generator.integers(0, CLASSES, rows).astype("int32")


def mlp(width: int = 8, name: str | None = None, layers=(), **dense) -> keras.Model:
    """Dense layers `hidden` and `logits`; `layers` come in between."""
    inputs = keras.Input((FEATURES,))
    x = keras.layers.Dense(width, "relu", name="hidden", **dense)(inputs)
    for layer in layers:
        x = layer(x)
    outputs = keras.layers.Dense(CLASSES, name="logits", dtype=dense.get("dtype"))(x)
    return keras.Model(inputs, outputs, name=name)


def teacher(width: int = 12) -> keras.Model:
    """A teacher that is always the same, with logits far from uniform."""
    model = mlp(width)
    generator = np.random.default_rng(7)
    model.set_weights([generator.normal(size=w.shape) for w in model.weights])
    return model


def linear() -> keras.Model:
    """One Dense layer."""
    return keras.Sequential(
        [keras.Input((FEATURES,)), keras.layers.Dense(CLASSES, name="logits")]
    )


def cnn(width: int = 4, name: str | None = None) -> keras.Model:
    """Two convolutions `block1`, `block2` with batch normalization."""
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(width, 3, 2, padding="same", name="block1")(inputs)
    x = keras.layers.BatchNormalization(name="norm1")(x)
    x = keras.layers.ReLU()(x)
    x = keras.layers.Conv2D(2 * width, 3, 2, padding="same", name="block2")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    outputs = keras.layers.Dense(CLASSES, name="logits")(x)
    return keras.Model(inputs, outputs, name=name)


def compiled(distiller, loss=SPARSE, optimizer=None, run_eagerly=True, **kwargs):
    """The distiller, compiled to run eagerly (no tracing) with plain SGD."""
    optimizer = optimizer or keras.optimizers.SGD(0.1)
    return distiller.compile(optimizer, loss, run_eagerly=run_eagerly, **kwargs)


def distiller(student=None, known=None, **kwargs) -> kd.Distiller:
    """A distiller of tiny networks, not compiled."""
    return kd.Distiller(student or mlp(), known or teacher(), **kwargs)


def values(variables) -> list[np.ndarray]:
    """The variables' values, copied."""
    return [np.array(v.numpy()) for v in variables]


def same(first, second) -> bool:
    """Whether two lists of arrays are equal to the last bit."""
    return len(first) == len(second) and all(
        np.array_equal(a, b) for a, b in zip(first, second, strict=True)
    )


def history(distiller, x=None, y=None, **kwargs) -> dict[str, list[float]]:
    """The logs of a quiet fit without shuffling."""
    kwargs = {"verbose": 0, "shuffle": False} | kwargs
    return distiller.fit(x, y, **kwargs).history


@keras.saving.register_keras_serializable(package="tests")
class Counting(keras.layers.Layer):
    """Hands its input through and notes every run, also inside a graph."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.runs = []

    def call(self, x, training=None):
        def note(x):
            self.runs.append(bool(training))
            return x

        result = tf.grad_pass_through(lambda t: tf.numpy_function(note, [t], t.dtype))(
            x
        )
        return tf.ensure_shape(result, x.shape)

    def compute_output_spec(self, x, training=None):
        return keras.KerasTensor(x.shape, x.dtype)


def loaded_without_package(path):
    """A model from a file, as where keras_distill is not installed."""
    own = [name for name in sys.modules if name.partition(".")[0] == "keras_distill"]
    with (
        mock.patch.dict(keras.saving.get_custom_objects(), clear=True),
        mock.patch.dict(sys.modules, dict.fromkeys(own)),  # an import would fail
    ):
        return keras.saving.load_model(path)
