"""Students and teachers of every make, and of other inputs than each other's."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd


class Own(keras.Model):
    """Subclassed; with `many` it takes a dict of inputs."""

    def __init__(self, many=False, training_argument=True, **kwargs):
        super().__init__(**kwargs)
        self.many = many
        self.hidden = keras.layers.Dense(8, "relu", name="hidden")
        self.top = keras.layers.Dense(tiny.CLASSES, name="logits")

    def call(self, x, training=None):
        if self.many:
            x = keras.ops.concatenate([x["a"], x["b"]], -1)
        return self.top(self.hidden(x))


class NoTraining(keras.Model):
    def __init__(self):
        super().__init__()
        self.top = keras.layers.Dense(tiny.CLASSES, name="logits")

    def call(self, x):
        return self.top(x)


def called(model, x=None):
    model(np.zeros((1, tiny.FEATURES), "float32") if x is None else x)
    return model


def sequential():
    return keras.Sequential(
        [
            keras.Input((tiny.FEATURES,)),
            keras.layers.Dense(8, "relu", name="hidden"),
            keras.layers.Dense(tiny.CLASSES, name="logits"),
        ]
    )


def deferred():
    """Sequential without an Input, built by a call."""
    return called(
        keras.Sequential(
            [
                keras.layers.Dense(8, "relu", name="hidden"),
                keras.layers.Dense(tiny.CLASSES, name="logits"),
            ]
        )
    )


def nested():
    inputs = keras.Input((tiny.FEATURES,))
    return keras.Model(inputs, sequential()(inputs))


BUILDERS = {
    "functional": tiny.mlp,
    "sequential": sequential,
    "deferred": deferred,
    "subclassed": lambda: called(Own()),
    "no training": lambda: called(NoTraining()),
    "nested": nested,
}


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_models_of_any_make(kind, side):
    x, y = tiny.data(8)
    model = BUILDERS[kind]()
    pair = (model, tiny.teacher()) if side == "student" else (tiny.mlp(), model)
    distiller = tiny.compiled(kd.Distiller(*pair), metrics=["accuracy"])
    expected = kd.losses.SoftTarget()(pair[1](x), pair[0](x))
    logs = tiny.history(distiller, x, y)
    assert logs["soft_loss"][0] == pytest.approx(float(expected), rel=1e-5)
    assert distiller.predict(x, verbose=0).shape == (8, 3)


def test_a_subclassed_student_trains_in_a_graph_with_a_tap():
    x, y = tiny.data(8)
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    distiller = tiny.distiller(called(Own()), links=[link])
    logs = tiny.history(tiny.compiled(distiller, run_eagerly=False), x, y)
    assert logs["hidden_loss"][0] > 0


def test_keras_applications():
    model = keras.applications.MobileNetV2(
        input_shape=(32, 32, 3), alpha=0.35, weights=None, classes=tiny.CLASSES
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    inputs = keras.Input((32, 32, 3))
    z = keras.layers.Conv2D(4, 3, 8, name="stem")(inputs)
    z = keras.layers.GlobalAveragePooling2D()(z)
    student = keras.Model(inputs, keras.layers.Dense(tiny.CLASSES)(z))
    link = kd.Link("stem", "block_6_expand_relu", "mse", adapter="auto")
    distiller = tiny.compiled(kd.Distiller(student, model, links=[link]))
    logs = tiny.history(distiller, x, np.array([0, 1]))
    assert np.isfinite(logs["stem_loss"][0])
    assert 0 < logs["soft_loss"][0] < 10  # the softmax head's own logits


def test_a_list_of_models_is_an_ensemble():
    x, y = tiny.data(8)
    teachers = [tiny.teacher(), tiny.mlp()]
    distiller = tiny.compiled(tiny.distiller(known=teachers))
    assert isinstance(distiller.teacher, kd.teachers.Ensemble)
    before = tiny.values(distiller.teacher.variables)
    p = sum(keras.ops.softmax(t(x) / 4.0) for t in teachers) / 2
    expected = kd.losses.SoftTarget()(4.0 * keras.ops.log(p), distiller.student(x))
    logs = tiny.history(distiller, x, y)
    assert logs["soft_loss"][0] == pytest.approx(float(expected), rel=1e-4)
    assert tiny.same(tiny.values(distiller.teacher.variables), before)
    assert len(distiller.weights) == 4 + 4


# -- inputs ----------------------------------------------------------------------------


def views(rows=8):
    """Two views of the same rows; the student sees the small one."""
    rng = np.random.default_rng(0)
    x = {
        "large": rng.normal(size=(rows, 12)).astype("float32"),
        "small": rng.normal(size=(rows, tiny.FEATURES)).astype("float32"),
    }
    return x, tiny.data(rows)[1]


def large_teacher():
    inputs = keras.Input((12,))
    return keras.Model(inputs, keras.layers.Dense(tiny.CLASSES, name="logits")(inputs))


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_student_and_teacher_see_other_inputs(run_eagerly):
    x, y = views()
    teacher = kd.teachers.Model(large_teacher(), inputs="large")
    distiller = tiny.distiller(known=teacher, student_inputs="small")
    tiny.compiled(distiller, run_eagerly=run_eagerly)
    expected = kd.losses.SoftTarget()(
        teacher.model(x["large"]), distiller.student(x["small"])
    )
    logs = tiny.history(distiller, x, y)
    assert logs["soft_loss"][0] == pytest.approx(float(expected), rel=1e-5)
    # `evaluate` and `predict` need no more than the student's keys.
    small = {"small": x["small"]}
    found = distiller.evaluate(small, y, verbose=0, return_dict=True)
    assert set(found) == {"loss", "hard_loss"}
    np.testing.assert_allclose(
        distiller.predict(small, verbose=0), distiller.student(x["small"]), rtol=1e-5
    )


def test_a_list_of_keys_keeps_its_order():
    x, y = tiny.data(8)
    inputs = [keras.Input((2,)), keras.Input((4,))]
    joined = keras.layers.Concatenate()(inputs)
    student = keras.Model(inputs, keras.layers.Dense(3, name="logits")(joined))
    data = {"z": x[:, :2], "a": x[:, 2:], "all": x}
    teacher = kd.teachers.Model(tiny.teacher(), inputs="all")
    distiller = kd.Distiller(student, teacher, student_inputs=["z", "a"])
    tiny.history(tiny.compiled(distiller), data, y)
    np.testing.assert_allclose(
        distiller.predict(data, verbose=0), student([x[:, :2], x[:, 2:]]), rtol=1e-5
    )


def test_a_function_of_the_inputs():
    x, y = tiny.data(8)
    teacher = kd.teachers.Model(tiny.teacher(), inputs=lambda x: x * 2)
    distiller = tiny.distiller(known=teacher, student_inputs=lambda x: x + 1)
    expected = kd.losses.SoftTarget()(teacher.model(x * 2), distiller.student(x + 1))
    logs = tiny.history(tiny.compiled(distiller), x, y)
    assert logs["soft_loss"][0] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
def test_dict_inputs_of_both(kind):
    x, y = tiny.data(8)
    data = {"a": x[:, :2], "b": x[:, 2:]}

    def build():
        if kind == "subclassed":
            return called(Own(many=True), data)
        inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((4,), name="b")}
        joined = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
        return keras.Model(inputs, keras.layers.Dense(3, name="logits")(joined))

    student, teacher = build(), build()
    distiller = tiny.compiled(kd.Distiller(student, teacher))
    expected = kd.losses.SoftTarget()(teacher(data), student(data))
    logs = tiny.history(distiller, data, y)
    assert logs["soft_loss"][0] == pytest.approx(float(expected), rel=1e-5)


def test_unlabelled_data_of_several_inputs():
    x, _ = tiny.data(8)
    inputs = [keras.Input((2,)), keras.Input((4,))]

    def build():
        joined = keras.layers.Concatenate()(inputs)
        return keras.Model(inputs, keras.layers.Dense(3, name="logits")(joined))

    distiller = tiny.compiled(kd.Distiller(build(), build()))
    pairs = tf.data.Dataset.from_tensors(((x[:, :2], x[:, 2:]),))
    logs = tiny.history(distiller, pairs)
    assert set(logs) == {"loss", "soft_loss", "agreement"}


def test_integer_inputs():
    def build():
        return keras.Sequential(
            [
                keras.Input((4,), dtype="int32"),
                keras.layers.Embedding(5, 3, name="embedding"),
                keras.layers.GlobalAveragePooling1D(),
                keras.layers.Dense(3, name="logits"),
            ]
        )

    x = np.random.default_rng(0).integers(0, 5, (8, 4))
    link = kd.Link("embedding", "embedding", "mse")
    distiller = kd.Distiller(build(), build(), links=[link])
    tiny.compiled(distiller, skip_nonfinite=True, log_gradient_share=1)
    before = tiny.values(distiller.student.weights)
    tiny.history(distiller, x, tiny.data(8)[1])  # gradients are IndexedSlices
    assert not tiny.same(tiny.values(distiller.student.weights)[:1], before[:1])


def test_stateful_models_of_a_fixed_batch_size():
    """They remember the last batch, and nothing of what was tried beforehand."""

    def net(width):
        inputs = keras.Input(batch_shape=(8, 5, 3))
        x = keras.layers.GRU(width, stateful=True, name="gru")(inputs)
        outputs = keras.layers.Dense(tiny.CLASSES, "softmax", name="classes")(x)
        return keras.Model(inputs, outputs)

    generator = np.random.default_rng(0)
    x = generator.normal(size=(16, 5, 3)).astype("float32")
    student, teacher = net(4), net(6)
    link = kd.Link("gru", "gru", "mse", adapter="auto")
    distiller = kd.Distiller(student, teacher, links=[link])
    tiny.compiled(distiller, "sparse_categorical_crossentropy")
    grus = [model.get_layer("gru") for model in (student, teacher)]
    assert not any(np.any(gru.states[0].numpy()) for gru in grus)
    logs = tiny.history(distiller, x, np.zeros(16, "int32"), batch_size=8)
    assert all(np.isfinite(value[0]) for value in logs.values())
    teacher_state = grus[1].states[0].numpy()
    grus[1].reset_state()
    for batch in (x[:8], x[8:]):
        teacher(batch)
    np.testing.assert_allclose(grus[1].states[0].numpy(), teacher_state, rtol=1e-5)
