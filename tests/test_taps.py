"""Taps: layers by path, and what they return in one forward pass."""

from __future__ import annotations

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd
from keras_distill.taps import find_layer, reading, run_with_taps


def nested(width=4):
    """A backbone inside a model: taps `backbone/block1`."""
    backbone = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(width, 3, 2, padding="same", name="block1"),
            keras.layers.ReLU(name="relu"),
        ],
        name="backbone",
    )
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.GlobalAveragePooling2D()(backbone(inputs))
    return keras.Model(inputs, keras.layers.Dense(tiny.CLASSES)(x))


class Subclassed(keras.Model):
    """A model that is not functional; `stem` is applied inside `call`."""

    def __init__(self, width=4):
        super().__init__()
        self.stem = keras.layers.Conv2D(width, 3, 2, padding="same", name="block1")
        self.pool = keras.layers.GlobalAveragePooling2D()
        self.head = keras.layers.Dense(tiny.CLASSES, name="logits")

    def call(self, x, training=None):
        return self.head(self.pool(self.stem(x)))


def subclassed(width=4):
    model = Subclassed(width)
    model(np.zeros((1, 8, 8, 3), "float32"))
    return model


@pytest.mark.parametrize("run_eagerly", [True, False])
@pytest.mark.parametrize(
    ("build", "path"),
    [(tiny.cnn, "block1"), (nested, "backbone/block1"), (subclassed, "block1")],
)
def test_taps_of_any_model(build, path, run_eagerly):
    x, y = tiny.images()
    student, teacher = build(), build(8)
    own, known = (find_layer(m, path, "layer") for m in (student, teacher))
    link = kd.Link(path, path, "mse", adapter="auto")
    distiller = kd.Distiller(student, teacher, links=[link])
    tiny.compiled(distiller, run_eagerly=run_eagerly)
    adapted = distiller.links[0].adapter(own(x))
    value = float(np.mean((np.asarray(known(x)) - np.asarray(adapted)) ** 2))
    logs = tiny.history(distiller, x, y)
    name = path.replace("/", "-")
    assert logs[f"{name}_loss"][0] == pytest.approx(value, rel=1e-4)
    assert "call" not in own.__dict__
    assert "call" not in known.__dict__


def test_a_layer_object_and_a_path_are_the_same():
    student, teacher = nested(), nested(8)
    by_object = kd.Link(
        student.get_layer("backbone").get_layer("block1"),
        teacher.get_layer("backbone").get_layer("block1"),
        "mse",
        adapter="auto",
        name="b",
    )
    distiller = kd.Distiller(student, teacher, links=[by_object])
    link = distiller.links[0]
    assert link.student_layer == link.teacher_layer == "backbone/block1"
    assert link.name == "b"
    assert by_object.adapter == "auto"  # the user's link is not changed


def test_the_whole_nested_model_can_be_read():
    x, _ = tiny.images()
    model = nested()
    _, features = run_with_taps(model, x, ["backbone"], False)
    np.testing.assert_allclose(features["backbone"], model.get_layer("backbone")(x))


def test_features_and_outputs_come_from_the_same_pass():
    # With dropout two passes would differ.
    x, _ = tiny.data(16)
    student = tiny.mlp(layers=[keras.layers.Dropout(0.5, seed=1, name="drop")])
    outputs, features = run_with_taps(student, x, ["drop", "hidden"], True)
    assert np.any(features["drop"] != features["hidden"])
    np.testing.assert_array_equal(outputs, student.layers[-1](features["drop"]))


def test_a_layer_used_twice_is_refused():
    inputs = keras.Input((6,))
    shared = keras.layers.Dense(6, name="shared")
    outputs = keras.layers.Dense(3)(shared(shared(inputs)))
    student = keras.Model(inputs, outputs)
    link = kd.Link("shared", "hidden", "mse", adapter="auto")
    with pytest.raises(ValueError, match="'shared'.*called 2 times.*exactly once"):
        kd.Distiller(student, tiny.teacher(), links=[link])


class Twins(keras.Model):
    """Two layers of one name, the first of which is also an attribute of its own."""

    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(6, name="twin")
        self.blocks = [self.first, keras.layers.Dense(6, name="twin")]
        self.head = keras.layers.Dense(3, name="head")

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_layers_of_one_name_are_refused():
    student = Twins()
    student(np.zeros((2, 6), "float32"))
    for tap in ("twin", student.first, student.blocks[1]):
        link = kd.Link(tap, "hidden", "mse", adapter="auto")
        with pytest.raises(ValueError, match="2 layers in 'twins'.*called 'twin'"):
            kd.Distiller(student, tiny.teacher(), links=[link])
    kd.Distiller(
        student,
        tiny.teacher(),
        links=[kd.Link("head", "hidden", "mse", adapter="auto")],
    )


def test_nothing_is_left_on_a_layer_after_an_error():
    model = tiny.mlp()
    layer = model.get_layer("hidden")
    with pytest.raises(ValueError, match="incompatible"):
        run_with_taps(model, np.zeros((2, 5), "float32"), ["hidden"], False)
    assert "call" not in layer.__dict__
    with pytest.raises(RuntimeError, match="mine"), reading([layer]):
        raise RuntimeError("mine")
    assert "call" not in layer.__dict__


def test_quantized_layers_can_be_read():
    model = tiny.mlp()
    x, _ = tiny.data()
    model.quantize("int8")
    outputs, features = run_with_taps(model, x, ["hidden"], False)
    logits = model.get_layer("logits")(features["hidden"])
    np.testing.assert_array_equal(outputs, logits)
    layer = model.get_layer("hidden")
    assert not {"call", "quantized_call"} & set(vars(layer))
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    logs = tiny.history(tiny.compiled(tiny.distiller(known=model, links=[link])), x)
    assert np.isfinite(logs["hidden_loss"][0])


def test_interleaved_threads_read_their_own_features():
    model = tiny.mlp()
    layer = model.get_layer("hidden")
    inside, errors = threading.Barrier(2, timeout=20), []

    def read(value):
        try:
            with reading([layer]) as found:
                inside.wait()
                x = np.full((1, tiny.FEATURES), value, "float32")
                model(x)
                inside.wait()
            (features,) = found[id(layer)]
            expected = tf.nn.relu(x @ layer.kernel.numpy() + layer.bias.numpy())
            np.testing.assert_allclose(features, expected, rtol=1e-5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(v,)) for v in (1.0, -2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert "call" not in layer.__dict__
