"""Sparse targets: k logits and a ghost class."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from scipy.optimize import minimize

import keras_distill as kd
from keras_distill.losses import SoftTarget
from keras_distill.teachers import Cache
from keras_distill.teachers.sparse import SparseHead, select, top

CLASSES, K = 2000, 20


def teacher_logits(rows=3, classes=CLASSES, scale=2.0):
    return np.random.default_rng(0).normal(0, scale, (rows, classes)).astype("float32")


def sparse(logits, k=K, temperatures=(1.0, 4.0), float16=False):
    """The head, and what the cache gives for these logits."""
    values, indices, ghosts = top(tf.constant(logits), k, temperatures, float16)
    if float16:
        values = tf.cast(values, "float16")
    parts = [tf.cast(part, "float32") for part in (values, indices, ghosts)]
    head = SparseHead("logits", (None, logits.shape[-1]), "logits", k, temperatures)
    return head, tf.concat(parts, -1)


def divergence(head, packed, student, temperature):
    """The loss per row, in float64."""
    student = tf.convert_to_tensor(student, tf.float64)
    known, own = head.against(packed, student, temperature)
    loss = SoftTarget(temperature, False, reduction=None, dtype="float64")
    return loss(known, own)


def dense_divergence(teacher, student, temperature):
    loss = SoftTarget(temperature, False, reduction=None, dtype="float64")
    return loss(teacher, student).numpy()


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_ghost_has_the_probability_of_the_rest(temperature):
    z = teacher_logits().astype("float64")
    indices = np.argsort(-z, -1)[:, :K]
    p = softmax(z / temperature)
    expected = np.take_along_axis(p, indices, -1)
    expected = np.concatenate([expected, 1 - expected.sum(-1, keepdims=True)], -1)
    found = softmax(select(z, indices, temperature).numpy() / temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_positions_and_their_classes():
    z = teacher_logits(6, 11).reshape(2, 3, 11)
    indices = np.argsort(-z, -1)[..., :4]
    found = select(z, indices, 2.0).numpy()
    assert found.shape == (2, 3, 5)
    one_by_one = [select(z[i], indices[i], 2.0).numpy() for i in range(2)]
    np.testing.assert_allclose(found, one_by_one, rtol=1e-6)


@pytest.mark.parametrize("float16", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_optimum_is_the_teacher(temperature, float16):
    z = teacher_logits(1)
    head, packed = sparse(z, float16=float16)

    def value_and_slope(student):
        student = tf.constant(student[None])
        with tf.GradientTape() as tape:
            tape.watch(student)
            value = tf.reduce_sum(divergence(head, packed, student, temperature))
        return value.numpy(), tape.gradient(value, student).numpy()[0]

    start = np.random.default_rng(1).normal(size=CLASSES)
    scaled = lambda s: [part * 1e3 for part in value_and_slope(s)]  # noqa: E731
    best = minimize(
        scaled, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}
    )
    p = softmax(z.astype("float64") / temperature)[0]
    q = softmax(best.x / temperature)
    kept = np.argsort(-z[0])[:K]
    assert abs(q[kept[0]] - p[kept[0]]) < 1e-3
    tail = 1 - p[kept].sum()
    assert tail > 0.3
    assert abs((1 - q[kept].sum()) - tail) < 1e-3
    assert best.fun / 1e3 < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_never_negative_and_never_above_the_dense_divergence(temperature):
    z = teacher_logits(64)
    head, packed = sparse(z)
    generator = np.random.default_rng(2)
    for scale in (0.0, 1.0, 10.0):
        student = z * generator.uniform(0, 2) + generator.normal(0, scale, z.shape)
        found = divergence(head, packed, student, temperature).numpy()
        dense = dense_divergence(z, student, temperature)
        assert found.min() > -1e-6
        assert np.all(found <= dense * (1 + 1e-6) + 1e-6)
        assert found.max() > 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_classes_are_the_dense_loss(temperature):
    z = teacher_logits(16, 10)
    student = np.random.default_rng(3).normal(size=z.shape)
    head, packed = sparse(z, 10, (1.0,))
    found = divergence(head, packed, student, temperature).numpy()
    dense = dense_divergence(z, student, temperature)
    np.testing.assert_allclose(found, dense, atol=1e-7)


def test_gradients_are_those_of_finite_differences():
    z = teacher_logits(2, 30)
    head, packed = sparse(z, 5)
    student = np.random.default_rng(4).normal(size=z.shape)
    x = tf.constant(student)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = tf.reduce_sum(divergence(head, packed, x, 4.0))
    slope = tape.gradient(value, x).numpy()
    step = 1e-5
    for place in [(0, c) for c in range(30)] + [(1, 0)]:
        sides = []
        for sign in (1, -1):
            moved = student.copy()
            moved[place] += sign * step
            sides.append(float(tf.reduce_sum(divergence(head, packed, moved, 4.0))))
        assert abs((sides[0] - sides[1]) / (2 * step) - slope[place]) < 1e-8


def test_extreme_logits_give_finite_losses():
    z = teacher_logits(4, 30) * 1e4
    head, packed = sparse(z, 5)
    student = tf.constant(np.flip(z, -1).copy())
    with tf.GradientTape() as tape:
        tape.watch(student)
        known, own = head.against(packed, student, 4.0)
        value = SoftTarget(4.0)(known, own)
    assert np.isfinite(value)
    assert np.isfinite(tape.gradient(value, student)).all()


def data():
    x, y = tiny.data(24)
    return tf.data.Dataset.from_tensor_slices((x, y))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse")
    return Cache.build(
        tiny.teacher(), data(), path, top_k=2, temperatures=(4.0, 2.0), dtype="float32"
    )


def test_a_sparse_cache_teaches(cache):
    distiller = tiny.compiled(kd.Distiller(tiny.mlp(), cache))
    before = tiny.values(distiller.student.weights)
    x, y = tiny.data(24)
    teacher, student = (np.asarray(m(x)) for m in (tiny.teacher(), distiller.student))
    logs = tiny.history(distiller, cache.attach(data()).batch(24))
    order = np.argsort(-teacher, -1)[:, :2]

    def over_three(z):
        p = softmax(z.astype("float64") / 4)
        kept = np.take_along_axis(p, order, -1)
        return np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], -1)

    p, q = over_three(teacher), over_three(student)
    expected = 16 * np.mean(np.sum(p * np.log(p / q), -1))
    np.testing.assert_allclose(logs["soft_loss"], expected, rtol=1e-5)
    agreement = np.mean(teacher.argmax(-1) == student.argmax(-1))
    np.testing.assert_allclose(logs["agreement"], agreement)
    assert not tiny.same(before, tiny.values(distiller.student.weights))


def test_all_classes_teach_like_the_teacher(tmp_path):
    path = tmp_path / "all"
    cache = Cache.build(
        tiny.teacher(), data(), path, top_k=3, temperatures=[4.0], dtype="float32"
    )
    keras.utils.set_random_seed(0)
    first = tiny.compiled(kd.Distiller(tiny.mlp(), cache))
    expected = tiny.history(first, cache.attach(data()).batch(8))
    keras.utils.set_random_seed(0)
    live = tiny.compiled(kd.Distiller(tiny.mlp(), tiny.teacher()))
    found = tiny.history(live, data().batch(8))
    for name, value in expected.items():
        np.testing.assert_allclose(value, found[name], rtol=1e-6, err_msg=name)


def test_other_temperatures_are_refused(cache):
    with pytest.raises(ValueError, match=r"`temperature` must be one of \[2.0, 4.0\]"):
        kd.Distiller(tiny.mlp(), cache, temperature=3.0)
    distiller = tiny.compiled(kd.Distiller(tiny.mlp(), cache, temperature=2.0))
    with pytest.raises(ValueError, match=r"Received: 3"):
        distiller.temperature = 3.0
    distiller.temperature = 4.0
    attached = cache.attach(data()).batch(24)
    assert np.isfinite(tiny.history(distiller, attached)["loss"]).all()
    # Past the setter there is no number, rather than a wrong one.
    distiller.temperature.assign(3.0)
    assert np.isnan(tiny.history(distiller, attached)["soft_loss"]).all()


@pytest.mark.parametrize(
    "loss",
    [
        kd.losses.LogitMSE(),
        kd.losses.DIST(),
        SoftTarget(4.0, standardize=True),
        kd.losses.MultiLevelLogit(),
        keras.losses.MeanSquaredError(),
    ],
    ids=lambda loss: loss.name,
)
def test_other_losses_are_refused(cache, loss):
    with pytest.raises(ValueError, match="only SoftTarget"):
        kd.Distiller(tiny.mlp(), cache, soft_loss=loss)


def test_without_a_soft_loss_there_is_nothing_to_refuse(tmp_path):
    cache = Cache.build(
        tiny.teacher(), data(), tmp_path, top_k=2, temperatures=[4.0], taps=["hidden"]
    )
    link = kd.Link("hidden", "hidden", "mse")
    distiller = kd.Distiller(tiny.mlp(12), cache, soft_loss=None, links=[link])
    logs = tiny.history(tiny.compiled(distiller), cache.attach(data()).batch(24))
    assert logs["hidden_loss"][0] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 2}, "`top_k` needs the `temperatures`"),
        ({"temperatures": [2.0]}, "no effect without `top_k`"),
        ({"top_k": 4, "temperatures": [2.0]}, "from 1 to the 3 classes"),
        ({"top_k": 0, "temperatures": [2.0]}, "`top_k` must be an integer from 1"),
        ({"top_k": 2, "temperatures": [0.0]}, "`temperatures` must be above 0"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        Cache.build(tiny.teacher(), data(), tmp_path, **arguments)


def test_verify_compares_sparse_rows(cache):
    assert cache.verify(tiny.teacher(), data())["max_difference"] < 1e-5
