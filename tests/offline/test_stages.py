"""Stage one: only what the guided layers depend on is trained."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from offline import nets

import keras_distill as kd


def staged(kind, teacher, optimizer=None, **options):
    build, _, width = nets.STAGED[kind]
    distiller = build(nets.net(width), teacher, **options)
    optimizer = optimizer or keras.optimizers.AdamW(0.01, weight_decay=0.1)
    return distiller.compile(optimizer, nets.SPARSE, run_eagerly=True)


@pytest.mark.parametrize("kind", nets.STAGED)
def test_stage_one_lowers_the_hints_and_changes_only_what_they_need(
    kind, teacher, digits
):
    distiller = staged(kind, teacher)
    student = distiller.student
    known = tiny.values(teacher.variables)
    before = {v.path: np.array(v.numpy()) for v in student.variables}
    iterations = int(distiller.optimizer.iterations.numpy())
    history = distiller.fit_hints(
        digits[0], epochs=3, batch_size=64, shuffle=False, verbose=0
    )
    assert isinstance(history, keras.callbacks.History)
    logs = history.history
    names = nets.STAGED[kind][1]
    assert set(logs) == {"loss", *(f"{name}_loss" for name in names)}
    for name in names:
        assert logs[f"{name}_loss"][-1] < logs[f"{name}_loss"][0]
    last = int(names[-1][-1])  # the stage that is guided
    for variable in student.variables:
        same = np.array_equal(before[variable.path], variable.numpy())
        stage = re.fullmatch(r"(conv|norm)(\d)/.*", variable.path)
        below = stage is not None and int(stage[2]) <= last
        assert same is not below, variable.path
    assert tiny.same(known, tiny.values(teacher.variables))
    assert int(distiller.optimizer.iterations.numpy()) == iterations


def test_stage_two_has_no_hints_and_its_own_optimizer(teacher, digits):
    for kind in ("boundary", "fsp"):
        distiller = staged(kind, teacher)
        logs = tiny.history(distiller, *digits, batch_size=128)
        assert set(logs) == {"loss", "hard_loss"}
        assert logs["loss"] == pytest.approx(logs["hard_loss"])


def test_stage_one_in_a_graph_with_a_given_optimizer_and_no_compile(teacher, digits):
    distiller = kd.HintDistiller(nets.net(3), teacher, hints={"relu2": "relu2"})
    before = tiny.values(distiller.student.get_layer("norm3").weights)
    random = tiny.values(distiller.student.get_layer("dropout").variables)
    data = tf.data.Dataset.from_tensor_slices(digits).batch(64)
    history = distiller.fit_hints(
        data, epochs=2, optimizer=keras.optimizers.Adam(0.01), verbose=0
    ).history
    assert history["relu2_loss"][1] < history["relu2_loss"][0]
    student = distiller.student
    assert tiny.same(before, tiny.values(student.get_layer("norm3").weights))
    assert tiny.same(random, tiny.values(student.get_layer("dropout").variables))
    with pytest.raises(ValueError, match="compile first"):
        distiller.fit_hints(data)


def test_a_layer_beside_the_guided_one_does_not_change(teacher, digits):
    inputs = keras.Input((8, 8, 1))
    beside = keras.layers.BatchNormalization(name="beside")(inputs)
    x = keras.layers.Conv2D(6, 3, 2, padding="same", name="guided")(inputs)
    x = keras.layers.Concatenate()(
        [keras.layers.Flatten()(beside), keras.layers.Flatten()(x)]
    )
    student = keras.Model(inputs, keras.layers.Dense(10)(x))
    distiller = kd.HintDistiller(student, teacher, hints={"guided": "relu2"})
    before = tiny.values(student.get_layer("beside").weights)
    distiller.compile("sgd", nets.SPARSE, run_eagerly=True)
    distiller.fit_hints(digits[0][:64], verbose=0)
    assert tiny.same(before, tiny.values(student.get_layer("beside").weights))


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.low = keras.layers.Conv2D(4, 3, 2, padding="same", name="low")
        self.norm = keras.layers.BatchNormalization(name="norm")
        self.high = keras.layers.Conv2D(4, 3, name="high")
        self.top = keras.layers.BatchNormalization(name="top")
        self.head = keras.layers.Dense(10, name="head")
        self.shift = self.add_weight(shape=(1,), initializer="zeros", name="shift")

    def call(self, x, training=None):
        x = self.norm(self.low(x + self.shift), training=training)
        x = self.top(self.high(x), training=training)
        return self.head(keras.ops.mean(x, (1, 2)))


def test_stage_one_of_a_subclassed_student(teacher, digits):
    student = Subclassed()
    student(digits[0][:2])
    distiller = kd.HintDistiller(student, teacher, hints={"norm": "relu2"})
    before = {v.path: np.array(v.numpy()) for v in student.variables}
    distiller.compile("sgd", nets.SPARSE, run_eagerly=True)
    distiller.fit_hints(digits[0][:64], verbose=0)
    changed = {
        v.path.split("/")[-2:][0] if "/" in v.path else v.path
        for v in student.variables
        if not np.array_equal(before[v.path], v.numpy())
    }
    above = {"high", "top", "head"}
    assert not changed & above
    assert {"low", "norm"} <= changed
    assert not np.array_equal(student.shift.numpy(), [0.0])


def test_regularisation_is_not_part_of_stage_one(teacher, digits):
    results = []
    for penalty in (None, keras.regularizers.L2(10.0)):
        keras.utils.set_random_seed(0)
        student = nets.net(3)
        student.get_layer("conv1").kernel_regularizer = penalty
        student.get_layer("conv1")._kernel.regularizer = penalty
        distiller = kd.HintDistiller(student, teacher, hints={"relu2": "relu2"})
        distiller.compile("sgd", nets.SPARSE, run_eagerly=True)
        distiller.fit_hints(digits[0][:64], verbose=0, shuffle=False)
        results.append(tiny.values(student.weights))
    assert tiny.same(*results)


def test_the_weight_of_soft_targets_falls_from_4_to_1(teacher, digits):
    distiller = staged("hint", teacher)
    seen = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: seen.append(float(distiller.beta.numpy()))
    )
    logs = tiny.history(
        distiller, digits[0][:64], digits[1][:64], epochs=4, callbacks=[note]
    )
    assert seen == [4.0, 3.0, 2.0, 1.0]
    assert set(logs) == {"loss", "hard_loss", "soft_loss", "agreement"}
    assert float(distiller.temperature.numpy()) == 3.0
    assert float(distiller.alpha.numpy()) == 1.0
    assert distiller.get_config()["beta"] is None


def test_a_given_weight_of_soft_targets_stays(teacher, digits):
    distiller = staged("hint", teacher, beta=2.5, temperature=5.0)
    tiny.history(distiller, digits[0][:64], digits[1][:64], epochs=2)
    assert float(distiller.beta.numpy()) == 2.5
    assert float(distiller.temperature.numpy()) == 5.0
    assert distiller.get_config()["beta"] == 2.5


def test_joint_hints_are_links_of_constant_weight(teacher, digits):
    distiller = staged("hint", teacher, joint=True, weight=7.0)
    logs = tiny.history(distiller, digits[0][:64], digits[1][:64], epochs=2)
    assert "relu2_loss" in logs
    assert float(distiller.term_weights["relu2"].numpy()) == 7.0
    with pytest.raises(ValueError, match="trains in one stage"):
        distiller.fit_hints(digits[0])


def test_validation_is_refused_in_stage_one(teacher, digits):
    distiller = staged("hint", teacher)
    with pytest.raises(ValueError, match="`validation_data` is not available"):
        distiller.fit_hints(digits[0], validation_data=digits)


@pytest.mark.parametrize("kind", nets.STAGED)
def test_stage_one_goes_on_after_saving(kind, teacher, digits, tmp_path):
    distiller = staged(kind, teacher)
    fit = {"batch_size": 64, "shuffle": False, "verbose": 0}
    distiller.fit_hints(digits[0], **fit)
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    loaded.teacher = teacher
    loaded.run_eagerly = True
    first = distiller.fit_hints(digits[0], **fit).history
    assert first == loaded.fit_hints(digits[0], **fit).history
    assert tiny.same(tiny.values(distiller.weights), tiny.values(loaded.weights))
    assert nets.own_config(loaded) == nets.own_config(distiller)


def test_the_layers_of_boundaries_weigh_half_of_the_next(teacher):
    distiller = kd.ActivationBoundaryDistiller(nets.net(6), teacher, nets.NORMS)
    weights = [hint.weight for hint in distiller.hints]
    assert weights == pytest.approx([0.00075, 0.0015, 0.003])
    assert [hint.adapter for hint in distiller.hints] == [None] * 3
    narrow = kd.ActivationBoundaryDistiller(nets.net(3), teacher, nets.NORMS)
    assert all(isinstance(h.adapter, kd.adapters.Connector) for h in narrow.hints)


def test_averages_of_weights_stay_with_the_weights_that_are_trained(teacher, digits):
    student = nets.net(3)
    distiller = kd.HintDistiller(student, teacher, hints={"relu2": "relu2"})
    optimizer = keras.optimizers.SGD(0.01, use_ema=True)
    distiller.compile(optimizer, nets.SPARSE, run_eagerly=True)
    above = student.layers[-1].kernel.numpy()
    distiller.fit_hints(digits[0][:32], verbose=0)
    np.testing.assert_array_equal(student.layers[-1].kernel, above)
