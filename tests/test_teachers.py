"""Teachers: the contract, models, ensembles, what is left of an absent one."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import ops
from losses import golden

import keras_distill as kd
from keras_distill.identity import fingerprint
from keras_distill.teachers.base import Absent
from keras_distill.teachers.ensemble import as_teacher


class Fixed(kd.teachers.Teacher):
    """Says the same whatever it sees."""

    names = ("logits",)

    def __init__(self, logits):
        self.value = np.asarray(logits, "float32")
        self.outputs = keras.KerasTensor((None, self.value.shape[-1]))

    def __call__(self, x, taps, temperature):
        return ops.convert_to_tensor(self.value), {}

    def fingerprint(self):
        return str(self.value.sum())

    def tap_specs(self, taps):
        return {}


@pytest.mark.parametrize("combine", ["arithmetic", "geometric"])
def test_golden_ensembles(combine):
    case = golden.load(f"kd_ensemble_{combine}")
    temperature = case.meta["hyperparameters"]["temperature"]
    members = case.arrays["teacher_logits_stack"]
    teacher = kd.teachers.Ensemble([Fixed(z) for z in members], combine=combine)
    z = ops.convert_to_tensor(case.inputs["student_logits"])
    loss = kd.losses.SoftTarget(temperature)
    with tf.GradientTape() as tape:
        tape.watch(z)
        target, _ = teacher(z, (), temperature)
        value = loss(target, z)
    p = ops.softmax(target / temperature)
    np.testing.assert_allclose(p, case.arrays["out_target"], rtol=1e-4, atol=1e-6)
    assert float(value) == pytest.approx(float(case.loss), rel=2e-4)
    gradient = case.arrays["grad_student_logits"]
    np.testing.assert_allclose(tape.gradient(value, z), gradient, rtol=2e-3, atol=1e-6)


def test_weights_of_an_ensemble_are_shares():
    x, _ = tiny.data(8)
    models = [tiny.teacher(), tiny.mlp()]
    first = kd.teachers.Ensemble(models, weights=[5.0, 0.0])
    logits, _ = first(x, (), 2.0)
    np.testing.assert_allclose(
        ops.softmax(logits / 2), ops.softmax(models[0](x) / 2), rtol=1e-4, atol=1e-6
    )
    mean = kd.teachers.Ensemble(models, "geometric", [3.0, 1.0])
    logits, _ = mean(x, (), 2.0)
    expected = 0.75 * models[0](x) + 0.25 * models[1](x)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
    assert mean.weights == [0.75, 0.25]


def test_an_ensemble_of_teachers_of_every_kind():
    x, _ = tiny.data(8)
    inner = kd.teachers.Ensemble([tiny.mlp(), tiny.mlp()])
    outer = kd.teachers.Ensemble([inner, kd.teachers.Model(tiny.mlp()), tiny.mlp()])
    taps = ["0/1/hidden", "1/hidden"]
    assert outer.resolve(taps) == taps
    logits, features = outer(x, taps, 1.0)
    assert logits.shape == (8, 3)
    assert {name: f.shape for name, f in features.items()} == dict.fromkeys(
        taps, (8, 8)
    )
    assert set(outer.tap_specs(taps)) == set(taps)
    assert len(outer.variables) == 16


def test_the_temperature_of_the_distiller_reaches_an_ensemble_live():
    x, y = tiny.data(8)
    models = [tiny.teacher(), tiny.mlp()]
    distiller = tiny.distiller(known=models, temperature=2.0)
    tiny.compiled(distiller, run_eagerly=False, optimizer=keras.optimizers.SGD(0.0))
    for temperature in (2.0, 7.0):
        distiller.temperature = temperature
        p = sum(ops.softmax(m(x) / temperature) for m in models) / 2
        log_q = ops.log_softmax(distiller.student(x) / temperature)
        kl = ops.mean(ops.sum(p * (ops.log(p) - log_q), -1)) * temperature**2
        logs = tiny.history(distiller, x, y)
        assert logs["soft_loss"][0] == pytest.approx(float(kl), rel=1e-4)


def test_an_own_teacher():
    x, y = tiny.data(8)
    logits = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    distiller = tiny.compiled(tiny.distiller(known=Fixed(logits)))
    expected = kd.losses.SoftTarget()(logits, distiller.student(x))
    logs = tiny.history(distiller, x, y, batch_size=8)
    assert logs["soft_loss"][0] == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="has no layers to read"):
        tiny.distiller(known=Fixed(logits), links=[kd.Link("hidden", "hidden", "mse")])


def test_as_teacher():
    model = tiny.mlp()
    teacher = as_teacher(model)
    assert isinstance(teacher, kd.teachers.Model)
    assert teacher.model is model
    assert as_teacher(teacher) is teacher
    assert isinstance(as_teacher((model,)), kd.teachers.Ensemble)
    with pytest.raises(TypeError, match="`teacher` must be a keras.Model, a list"):
        as_teacher(None)


def test_the_teacher_of_a_distiller_is_never_a_keras_model():
    model = tiny.teacher()
    distiller = tiny.distiller(known=model)
    assert not isinstance(distiller.teacher, keras.Model)
    assert distiller.teacher.model is model
    other = tiny.mlp(5)
    distiller.teacher = other
    assert distiller.teacher.model is other
    assert not {id(v) for v in other.variables} & {id(v) for v in distiller.variables}


def test_a_new_teacher_is_used_at_once():
    x, y = tiny.data(8)
    distiller = tiny.distiller()
    tiny.compiled(distiller, run_eagerly=False, optimizer=keras.optimizers.SGD(0.0))
    tiny.history(distiller, x, y)
    distiller.teacher = tiny.mlp(5)
    expected = kd.losses.SoftTarget()(distiller.teacher.model(x), distiller.student(x))
    logs = tiny.history(distiller, x, y)
    assert logs["soft_loss"][0] == pytest.approx(float(expected), rel=1e-5)


# -- lower precision -------------------------------------------------------------------


def nested_teacher():
    inner = keras.Sequential(
        [keras.Input((tiny.FEATURES,)), keras.layers.Dense(8, "relu", name="hidden")],
        name="backbone",
    )
    inputs = keras.Input((tiny.FEATURES,), name="x")
    z = keras.layers.BatchNormalization()(inner(inputs))
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(z))


@pytest.mark.parametrize("build", [tiny.teacher, nested_teacher, tiny.linear])
def test_a_copy_in_lower_precision(build):
    x, y = tiny.data(8)
    model = build()
    before = tiny.values(model.variables)
    teacher = kd.teachers.Model(model, dtype="bfloat16")
    assert teacher.model is not model
    dense = [
        layer
        for layer in teacher.model._flatten_layers()
        if isinstance(layer, keras.layers.Dense)
    ]
    assert {layer.compute_dtype for layer in dense} == {"bfloat16"}
    outputs, _ = teacher(x, (), 1.0)
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    scale = np.abs(np.asarray(model(x))).max()
    np.testing.assert_allclose(
        np.asarray(ops.cast(outputs, "float32")), model(x), atol=0.05 * scale
    )
    distiller = tiny.compiled(tiny.distiller(known=teacher))
    logs = tiny.history(distiller, x, y)
    assert np.isfinite(logs["soft_loss"][0])
    assert tiny.same(tiny.values(model.variables), before)
    assert model.dtype_policy.name == "float32"


# -- fingerprints, and what is left ----------------------------------------------------


def test_a_fingerprint_is_of_weights_and_architecture():
    assert fingerprint(tiny.teacher()) == fingerprint(tiny.teacher())
    changed = tiny.teacher()
    changed.layers[-1].bias.assign_add([0.0, 0.0, 1e-6])
    assert fingerprint(changed) != fingerprint(tiny.teacher())
    other = tiny.mlp(12, activity_regularizer="l2")
    other.set_weights(tiny.teacher().get_weights())
    assert fingerprint(other) != fingerprint(tiny.teacher())
    ensembles = [
        kd.teachers.Ensemble([tiny.teacher()], weights=w, combine=c).fingerprint()
        for w, c in (([1.0], "arithmetic"), ([1.0], "geometric"))
    ]
    assert ensembles[0] != ensembles[1]
    readers = [
        kd.teachers.Model(tiny.teacher(), inputs=inputs).fingerprint()
        for inputs in (None, "left", "right", np.negative)
    ]
    assert len(set(readers)) == 4


def test_an_absent_teacher_remembers_what_is_needed():
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    distiller = tiny.distiller(links=[link])
    memory = distiller.get_config()["teacher"]
    absent = Absent(json.loads(json.dumps(memory)))
    assert absent.names == ["logits"]
    assert absent.fingerprint() == distiller.teacher.fingerprint()
    assert absent.tap_specs(["hidden"])["hidden"].shape == (None, 12)
    (head,) = absent.heads()
    assert (head.classes, head.shape, head.kind) == (3, (None, 3), "logits")
    assert absent.variables == []
    with pytest.raises(ValueError, match="loaded without its teacher"):
        absent(np.zeros((1, 6)), (), 1.0)


def test_an_ensemble_comes_back_to_a_loaded_distiller(tmp_path):
    x, y = tiny.data(8)
    models = [tiny.teacher(), tiny.mlp()]
    link = kd.Link("hidden", "0/hidden", "mse", adapter="auto")
    distiller = tiny.compiled(tiny.distiller(known=models, links=[link]))
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    with pytest.raises(ValueError, match="not the teacher"):
        loaded.teacher = models[::-1]
    loaded.teacher = models
    logs = [tiny.history(d, x, y) for d in (distiller, loaded)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("kind", ["softmax", "one unit"])
def test_the_kind_of_the_teachers_head_is_remembered(kind, tmp_path):
    x, y = tiny.data(8)

    def net(width):
        inputs = keras.Input((6,))
        z = keras.layers.Dense(width, "relu")(inputs)
        units, activation = (3, "softmax") if kind == "softmax" else (1, "sigmoid")
        return keras.Model(inputs, keras.layers.Dense(units, activation)(z))

    distiller = kd.Distiller(net(4), net(5))
    loss = "sparse_categorical_crossentropy"
    tiny.compiled(distiller, loss if kind == "softmax" else "binary_crossentropy")
    y = y if kind == "softmax" else (y > 0).astype("float32")
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    loaded.teacher = distiller.teacher
    logs = [tiny.history(d, x, y) for d in (distiller, loaded)]
    assert logs[0] == logs[1]


def test_an_ensemble_asks_its_members_what_they_refuse(tmp_path):
    x, _ = tiny.data()
    rows = tf.data.Dataset.from_tensor_slices(x)
    both = [tiny.mlp(), tiny.mlp()]
    cache = kd.teachers.Cache.build(both, rows, tmp_path / "c", temperatures=[4.0])
    ensemble = kd.teachers.Ensemble([cache, tiny.mlp()])
    with pytest.raises(ValueError, match=r"one of \[4.0\]"):
        tiny.distiller(known=ensemble, temperature=2.0)
    tiny.distiller(known=ensemble, temperature=4.0)


def test_an_ensemble_does_not_mix_outputs():
    def named(names):
        inputs = keras.Input((tiny.FEATURES,))
        outputs = [keras.layers.Dense(3, name=n)(inputs) for n in names]
        return keras.Model(inputs, outputs)

    with pytest.raises(ValueError, match="different orders"):
        kd.teachers.Ensemble([named("ab"), named("ba")])
    kd.teachers.Ensemble([named("ab"), named("cd")])


def test_logits_of_a_geometric_ensemble_are_as_exact_as_its_members():
    inputs = keras.Input((tiny.FEATURES,))
    z = keras.layers.Dense(tiny.CLASSES)(inputs)
    bare = keras.Model(inputs, keras.ops.exp(keras.ops.log_softmax(z)))
    known = kd.teachers.Model(bare, from_logits=False)
    mean = kd.teachers.Ensemble([known, tiny.mlp()], combine="geometric")
    for teacher in (known, mean):
        with pytest.raises(ValueError, match="unknown constant"):
            tiny.distiller(known=teacher, soft_loss=kd.losses.LogitMSE())


def test_sigmoid_units_are_no_classes_whatever_is_declared():
    inputs = keras.Input((tiny.FEATURES,))
    units = keras.layers.Dense(tiny.CLASSES, "sigmoid")(inputs)
    known = kd.teachers.Model(keras.Model(inputs, units), from_logits=False)
    with pytest.raises(ValueError, match="multi-label"):
        tiny.distiller(known=known)


def test_what_is_declared_is_part_of_the_fingerprint():
    model = tiny.mlp()
    found = {
        kd.teachers.Model(model, from_logits=f).fingerprint() for f in (None, True)
    }
    assert len(found) == 2


def test_what_is_trainable_is_no_part_of_the_fingerprint():
    model = tiny.mlp()
    before = fingerprint(model)
    model.trainable = False
    assert fingerprint(model) == before
