"""Links: layers by path, taps in one forward pass, adapters, any loss."""

from __future__ import annotations

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd
from keras_distill.links import find_layer, reading, run_with_taps


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


def test_lists_of_taps_go_to_losses_on_several():
    x, y = tiny.images()
    taps = ["block1", "norm1"]
    link = kd.Link(taps, taps, kd.losses.FlowOfProcedure(), weight=3.0)
    student, teacher = tiny.cnn(), tiny.cnn()
    assert link.name == "block1-norm1"
    distiller = tiny.compiled(kd.Distiller(student, teacher, links=[link]))
    own = run_with_taps(student, x, taps, True)[1]
    known = run_with_taps(teacher, x, taps, False)[1]
    expected = kd.losses.FlowOfProcedure()(list(known.values()), list(own.values()))
    logs = tiny.history(distiller, x, y)
    value = logs["block1-norm1_loss"][0]
    assert value == pytest.approx(float(expected), rel=1e-4)


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


def test_nothing_is_left_on_a_layer_after_an_error():
    model = tiny.mlp()
    layer = model.get_layer("hidden")
    with pytest.raises(ValueError, match="incompatible"):
        run_with_taps(model, np.zeros((2, 5), "float32"), ["hidden"], False)
    assert "call" not in layer.__dict__
    with pytest.raises(RuntimeError, match="mine"), reading([layer]):
        raise RuntimeError("mine")
    assert "call" not in layer.__dict__


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


# -- adapters --------------------------------------------------------------------------


def test_adapters_are_the_distillers_and_not_the_students():
    x, y = tiny.data(8)
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    distiller = tiny.compiled(tiny.distiller(links=[link]))
    adapter = distiller.links[0].adapter
    ids = {id(v) for v in distiller.trainable_variables}
    assert {id(v) for v in adapter.trainable_variables} <= ids
    students = {id(v) for v in distiller.student.variables}
    assert not students & {id(v) for v in adapter.variables}
    before = tiny.values(adapter.variables)
    tiny.history(distiller, x, y)
    assert not tiny.same(tiny.values(adapter.variables), before)


def test_auto_is_the_identity_where_shapes_agree():
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    distiller = kd.Distiller(tiny.mlp(8), tiny.teacher(8), links=[link])
    assert distiller.links[0].adapter is None


@pytest.mark.parametrize("trainable", [True, False])
def test_a_teacher_adapter_is_trained_if_it_is_trainable(trainable):
    x, y = tiny.data(8)
    adapter = keras.layers.Dense(8, trainable=trainable, name="down")
    link = kd.Link("hidden", "hidden", "mse", teacher_adapter=adapter)
    distiller = tiny.compiled(tiny.distiller(links=[link]))
    before = tiny.values(adapter.variables)
    teacher = tiny.values(distiller.teacher.variables)
    tiny.history(distiller, x, y)
    assert tiny.same(tiny.values(adapter.variables), before) != trainable
    assert tiny.same(tiny.values(distiller.teacher.variables), teacher)


def test_an_adapter_is_told_training_and_gets_lists():
    class Mixed(keras.layers.Layer):
        seen = []

        def build(self, input_shape):
            self.seen.append(("shapes", len(input_shape)))

        def call(self, features, training=None):
            self.seen.append(("training", training))
            return features[0] + features[1]

    x, y = tiny.images()
    link = kd.Link(["block1", "norm1"], "block1", "mse", adapter=Mixed())
    distiller = kd.Distiller(tiny.cnn(), tiny.cnn(), links=[link])
    tiny.compiled(distiller)
    del Mixed.seen[1:]
    tiny.history(distiller, x, y)
    assert Mixed.seen == [("shapes", 2), ("training", True)]


def test_an_adapter_with_match_is_told_both_shapes():
    class Matching(keras.layers.Dense):
        def match(self, student_shape, teacher_shape):
            assert student_shape == (None, 8)
            self.units = teacher_shape[-1]

    link = kd.Link("hidden", "hidden", "mse", adapter=Matching(1))
    distiller = tiny.distiller(links=[link])
    assert distiller.links[0].adapter.units == 12


# -- losses ----------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
def absolute(y_true, y_pred):
    return keras.ops.mean(keras.ops.abs(y_true - y_pred), -1)


@pytest.mark.parametrize(
    "loss",
    ["mse", "mean_absolute_error", keras.losses.Huber(), absolute, kd.losses.Hint()],
    ids=["string", "long string", "instance", "function", "ours"],
)
def test_any_loss_weighted_from_the_left(loss):
    # As many rows as the grid is high and wide: Keras would weight columns here.
    rows = 4
    x, y = tiny.images(rows)
    weight = np.array([0.0, 1.0, 2.0, 5.0], "float32")
    student, teacher = tiny.cnn(), tiny.cnn()
    link = kd.Link("block1", "block1", loss, name="link")
    distiller = kd.Distiller(student, teacher, links=[link])
    tiny.compiled(distiller)
    own, known = (np.asarray(m.get_layer("block1")(x)) for m in (student, teacher))
    function = link.loss.call
    values = np.asarray(function(keras.ops.array(known), keras.ops.array(own)))
    per_row = values.reshape(rows, -1).mean(-1)
    logs = tiny.history(distiller, x, y, sample_weight=weight, batch_size=rows)
    expected = (per_row * weight).mean()
    assert logs["link_loss"][0] == pytest.approx(float(expected), rel=1e-4)


def test_the_arguments_of_a_link_are_its_attributes():
    loss, adapter = kd.losses.Hint(), keras.layers.Dense(3)
    link = kd.Link(
        "a", "b", loss, weight=2.0, adapter=adapter, teacher_adapter=adapter, name="n"
    )
    assert (link.student_layer, link.teacher_layer) == ("a", "b")
    assert (link.loss, link.weight, link.name) == (loss, 2.0, "n")
    assert link.adapter is link.teacher_adapter is adapter


def test_a_tap_in_a_list_of_teachers():
    x, y = tiny.data(8)
    teachers = [tiny.mlp(8), tiny.mlp(8)]
    links = [
        kd.Link("hidden", "1/hidden", "mse"),
        kd.Link("logits", teachers[0].get_layer("logits"), "mse", name="top"),
    ]
    distiller = tiny.compiled(tiny.distiller(known=teachers, links=links))
    assert distiller.links[1].teacher_layer == "0/logits"
    own = distiller.student.get_layer("hidden")(x)
    known = teachers[1].get_layer("hidden")(x)
    expected = float(np.mean((np.asarray(own) - np.asarray(known)) ** 2))
    logs = tiny.history(distiller, x, y)
    assert logs["hidden_loss"][0] == pytest.approx(expected, rel=1e-5)
