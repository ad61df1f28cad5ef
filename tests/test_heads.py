"""Heads: logits from whatever a model gives out."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tiny
from keras import ops

import keras_distill as kd


def with_head(kind: str, units: int = tiny.CLASSES, width: int = 8) -> keras.Model:
    """`tiny.mlp` with another head, always with the same weights."""
    inputs = keras.Input((tiny.FEATURES,))
    x = keras.layers.Dense(width, "relu", name="hidden")(inputs)
    activation = {"dense": "softmax", "sigmoid": "sigmoid"}.get(kind)
    x = keras.layers.Dense(units, activation, name="top")(x)
    if kind == "activation":
        x = keras.layers.Activation("softmax", name="out")(x)
    elif kind == "softmax":
        x = keras.layers.Softmax(name="out")(x)
    elif kind == "nested":
        inner = keras.Sequential([keras.Input((units,)), keras.layers.Softmax()])
        x = inner(x)
    elif kind == "bare":
        x = keras.layers.Rescaling(1.0)(keras.layers.Softmax()(x))
    model = keras.Model(inputs, x)
    rng = np.random.default_rng(5)
    model.set_weights([rng.normal(size=w.shape) for w in model.weights])
    return model


class SubclassedSoftmax(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = with_head("dense")

    def call(self, x):
        return self.inner(x)


def subclassed():
    model = SubclassedSoftmax()
    model(np.zeros((1, tiny.FEATURES), "float32"))
    return model


def soft_loss(teacher, student=None, **kwargs):
    x, _ = tiny.data(8)
    student = student or tiny.teacher(8)
    distiller = kd.Distiller(student, teacher, temperature=2.0, **kwargs)
    tiny.compiled(distiller, loss=None)
    return tiny.history(distiller, x)


@pytest.mark.parametrize(
    "kind", ["dense", "activation", "softmax", "nested", "subclassed"]
)
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_attached_logits_are_used(kind, side):
    model = subclassed() if kind == "subclassed" else with_head(kind)
    reference, plain = with_head("logits"), tiny.teacher(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if side == "teacher":
            logs, expected = soft_loss(model), soft_loss(reference, tiny.teacher(8))
        else:
            logs, expected = soft_loss(plain, model), soft_loss(plain, reference)
    for name in ("soft_loss", "agreement"):
        assert logs[name][0] == pytest.approx(expected[name][0], rel=1e-5)


def test_attached_logits_survive_saving(tmp_path):
    with_head("dense").save(tmp_path / "t.keras")
    loaded = keras.saving.load_model(tmp_path / "t.keras")
    expected = soft_loss(with_head("logits"))
    value = soft_loss(loaded)["soft_loss"][0]
    assert value == pytest.approx(expected["soft_loss"][0], rel=1e-5)


def test_attached_logits_are_exact_where_probabilities_are_not():
    # exp(-200) is 0 in float32: from the probabilities the loss would be finite noise.
    model = with_head("dense")
    model.get_layer("top").bias.assign([0.0, 200.0, 0.0])
    reference = with_head("logits")
    reference.get_layer("top").bias.assign([0.0, 200.0, 0.0])
    logs, expected = soft_loss(model), soft_loss(reference)
    value = expected["soft_loss"][0]
    assert logs["soft_loss"][0] == pytest.approx(value, rel=1e-5)


def test_bare_probabilities_are_used_by_their_logarithm_with_one_warning():
    with pytest.warns(UserWarning, match="gives probabilities without") as caught:
        logs = soft_loss(with_head("bare"))
    assert len([w for w in caught if "probabilities" in str(w.message)]) == 1
    expected = soft_loss(with_head("logits"))
    value = expected["soft_loss"][0]
    assert logs["soft_loss"][0] == pytest.approx(value, rel=1e-3)


def test_declared_probabilities_warn_no_more():
    teacher = kd.teachers.Model(with_head("bare"), from_logits=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logs = soft_loss(teacher)
    value = soft_loss(with_head("logits"))["soft_loss"][0]
    assert logs["soft_loss"][0] == pytest.approx(value, rel=1e-3)


def test_declared_logits_are_not_looked_at():
    # Without the declaration rows that sum to 1 pass for probabilities.
    student = with_head("bare")
    logs = soft_loss(tiny.teacher(), student, student_from_logits=True)
    x, _ = tiny.data(8)
    loss = kd.losses.SoftTarget(2.0)
    expected = float(loss(tiny.teacher()(x), with_head("bare")(x)))
    assert logs["soft_loss"][0] == pytest.approx(expected, rel=1e-5)


def test_regression_of_logits_needs_logits():
    with (
        pytest.warns(UserWarning, match="probabilities"),
        pytest.raises(ValueError, match="LogitMSE needs real logits"),
    ):
        tiny.distiller(known=with_head("bare"), soft_loss=kd.losses.LogitMSE())
    tiny.distiller(known=with_head("dense"), soft_loss=kd.losses.LogitMSE())


@pytest.mark.parametrize("student_kind", ["logits", "sigmoid"])
@pytest.mark.parametrize("teacher_kind", ["logits", "sigmoid"])
def test_one_unit_is_two_classes(student_kind, teacher_kind):
    x, y = tiny.data(8)
    student, teacher = with_head(student_kind, 1), with_head(teacher_kind, 1, 5)
    distiller = kd.Distiller(student, teacher, temperature=2.0)
    loss = keras.losses.BinaryCrossentropy(from_logits=student_kind == "logits")
    tiny.compiled(distiller, loss=loss)
    pairs = []
    for build, width in ((with_head, 5), (with_head, 8)):
        z = build("logits", 1, width)(x)
        pairs.append(ops.concatenate([ops.zeros_like(z), z], -1))
    expected = float(kd.losses.SoftTarget(2.0)(*pairs))
    logs = tiny.history(distiller, x, (y > 0).astype("float32"))
    assert expected > 1e-3
    assert logs["soft_loss"][0] == pytest.approx(expected, rel=1e-4)
    same = np.sign(pairs[0][:, 1]) == np.sign(pairs[1][:, 1])
    assert logs["agreement"][0] == pytest.approx(np.mean(same))


def test_one_unit_against_two_classes():
    logs = soft_loss(with_head("logits", 2), with_head("sigmoid", 1))
    assert np.isfinite(logs["soft_loss"][0])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_several_sigmoid_units_are_refused(side):
    pair = [tiny.teacher(), with_head("sigmoid")]
    student, teacher = pair if side == "teacher" else reversed(pair)
    with pytest.raises(ValueError, match=r"sigmoid units \(multi-label\)"):
        kd.Distiller(student, teacher)
    kd.Distiller(
        with_head("sigmoid"),
        with_head("sigmoid"),
        soft_loss=None,
        links=[kd.Link("hidden", "hidden", "mse")],
    )


def test_the_compiled_loss_keeps_its_exactness_for_unlabelled_rows():
    # Handing a softmax output on must not lose the logits attached to it.
    x, y = tiny.data(8)
    y[:4] = -1
    student = with_head("dense")
    student.get_layer("top").bias.assign([0.0, 200.0, 0.0])
    distiller = tiny.compiled(
        kd.Distiller(student, tiny.teacher()), loss="sparse_categorical_crossentropy"
    )
    logits = with_head("logits")
    logits.get_layer("top").bias.assign([0.0, 200.0, 0.0])
    expected = float(tiny.SPARSE(y[4:], logits(x[4:])))
    logs = tiny.history(distiller, x, y)
    assert logs["hard_loss"][0] == pytest.approx(expected, rel=1e-4)
