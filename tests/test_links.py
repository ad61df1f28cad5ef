"""Links: which layers they compare, with which adapters and losses."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tiny

import keras_distill as kd
from keras_distill.taps import run_with_taps


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


def test_a_loss_of_keras_on_several_taps_is_the_mean_of_the_pairs():
    # As many rows as taps, and grids of two sizes: nothing can be stacked here.
    x, y = tiny.images(2)
    weight = np.array([1.0, 0.0], "float32")
    student, teacher = tiny.cnn(), tiny.cnn()
    taps = ["block1", "block2"]
    link = kd.Link(taps, taps, "mse", name="link")
    distiller = tiny.compiled(kd.Distiller(student, teacher, links=[link]))
    own = run_with_taps(student, x, taps, True)[1]
    known = run_with_taps(teacher, x, taps, False)[1]
    of_row_0 = [np.mean(np.square((own[t] - known[t])[0])) for t in taps]
    logs = tiny.history(distiller, x, y, sample_weight=weight)
    expected = np.mean(of_row_0) / 2
    assert logs["link_loss"][0] == pytest.approx(float(expected), rel=1e-4)
