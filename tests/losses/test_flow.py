"""Losses on the flow between layers."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf

from keras_distill import losses
from tests.losses import golden
from tests.losses.checklist import CHECKS, Subject, assert_close, run

METHODS = ("fsp", "fsp_repdistiller", "kdsvd")
FILES = [name for method in METHODS for name in golden.files(method)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", FILES)
def test_golden(name, dtype):
    golden.check(name, dtype)


def pairs(*shapes):
    """Makes inputs: a list of features for the teacher, one for the student."""

    def inputs(rng, batch):
        return tuple(
            [rng.normal(size=(batch, *s)).astype("float32") for s in shapes]
            for _ in range(2)
        )

    return inputs


def zeros(*shape):
    return np.zeros(shape, "float32")


TALL_AND_WIDE = pairs((4, 4, 3), (2, 2, 6))
WRONG = (
    (zeros(2, 4, 4, 3), zeros(2, 4, 4, 3)),
    ([zeros(2, 4, 4, 3)] * 2, [zeros(2, 4, 4, 3)] * 3),
    ([zeros(2, 4, 4, 3)] * 2, [zeros(2, 4, 4, 3), zeros(2, 4, 4, 5)]),
    ([zeros(2, 4, 3)] * 2, [zeros(2, 4, 3)] * 2),
)
SUBJECTS = [
    Subject(
        losses.FlowOfProcedure,
        TALL_AND_WIDE,
        (*WRONG, ([zeros(2, 3, 3, 1), zeros(2, 2, 2, 1)],) * 2),
    ),
    Subject(
        functools.partial(losses.FlowOfProcedure, variant="repdistiller"),
        pairs((3, 3, 3), (2, 2, 6), (1, 2, 2)),
        WRONG,
        name="FlowOfProcedure-repdistiller",
    ),
    Subject(
        losses.SingularValue,
        TALL_AND_WIDE,
        WRONG,
        rtol=1e-3,
    ),
    Subject(
        functools.partial(losses.SingularValue, rank=2, beta=2.0),
        TALL_AND_WIDE,
        (*WRONG, ([zeros(2, 1, 1, 3), zeros(2, 2, 2, 3)],) * 2),
        rtol=1e-3,
        name="SingularValue-rank2",
    ),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_checklist(subject, check):
    check(subject)


def test_flow_takes_consecutive_pairs():
    teacher, student = pairs((4, 4, 3), (4, 4, 2), (2, 2, 5))(
        np.random.default_rng(0), 4
    )
    for make in (losses.FlowOfProcedure, losses.SingularValue):
        loss = make(dtype="float64")
        parts = [float(loss(teacher[i : i + 2], student[i : i + 2])) for i in (0, 1)]
        assert float(loss(teacher, student)) == pytest.approx(sum(parts))


def test_flow_max_pools_whichever_grid_is_larger():
    teacher, student = pairs((6, 2, 3), (2, 2, 4))(np.random.default_rng(1), 4)
    pooled = [x[0].reshape(4, 2, 3, 2, 3).max(2) for x in (teacher, student)]
    flows = [
        np.einsum("bhwi,bhwj->bij", first, x[1]) / 4
        for first, x in zip(pooled, (teacher, student), strict=True)
    ]
    wanted = np.sum((flows[0] - flows[1]) ** 2, (1, 2))
    loss = losses.FlowOfProcedure(reduction=None)
    assert_close(loss(teacher, student), wanted, 1e-5)
    assert_close(loss(teacher[::-1], student[::-1]), wanted, 1e-5)


def published_formula(teacher, student, rank, beta):
    """KD-SVD with an SVD of the features and its derivative."""
    flows = []
    for t, s in zip(teacher, student, strict=True):
        positions, channels = t.shape[1] * t.shape[2], t.shape[3]
        t = tf.reshape(t, (-1, positions, channels))
        s = tf.reshape(s, (-1, positions, channels))
        values, _, v = tf.linalg.svd(t)
        _, _, u = tf.linalg.svd(s)
        v, u, values = v[..., :rank], u[..., : rank + 3], values[..., :rank]
        largest = tf.one_hot(tf.argmax(tf.abs(v), 1), channels, axis=1, dtype=v.dtype)
        v *= tf.sign(tf.reduce_sum(v * largest, 1, keepdims=True))
        cosine = tf.matmul(u, v, transpose_a=True)
        chosen = tf.one_hot(
            tf.argmax(tf.abs(cosine), 1), u.shape[-1], axis=1, dtype=v.dtype
        )
        u = tf.matmul(u, tf.stop_gradient(chosen * tf.sign(cosine)))
        weight = (values / tf.norm(values, axis=-1, keepdims=True))[:, None]
        flows.append((v * weight, u * weight))
    total = 0.0
    for (v1, u1), (v2, u2) in zip(flows[:-1], flows[1:], strict=True):
        r = [
            tf.exp(-((b[:, :, None] - a[:, None]) ** 2) / beta)
            for a, b in ((v1, v2), (u1, u2))
        ]
        total += tf.reduce_sum((r[0] - r[1]) ** 2) / v1.shape[0]
    return total


@pytest.mark.parametrize("rank", [1, 3])
def test_singular_value_is_the_published_formula(rank):
    """Also for rank above 1, tall and wide features, and a related student."""
    rng = np.random.default_rng(2)
    shapes = ((4, 4, 6), (2, 2, 6))
    teacher = [tf.constant(rng.normal(size=(5, *s))) for s in shapes]
    student = [x + 0.3 * rng.normal(size=x.shape) for x in teacher]
    loss = losses.SingularValue(rank=rank, dtype="float64")
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(student)
        value = loss(teacher, student)
        wanted = published_formula(teacher, student, rank, 8.0)
    assert float(value) == pytest.approx(float(wanted), rel=1e-9)
    for found, slope in zip(
        tape.gradient(value, student), tape.gradient(wanted, student), strict=True
    ):
        assert_close(found, slope, 1e-7)


def test_singular_value_has_a_gradient_for_the_teacher():
    """By differences: the derivative holds on the teacher's side as well."""
    rng = np.random.default_rng(3)
    teacher, student = (
        [tf.constant(rng.normal(size=(2, *s))) for s in ((3, 3, 4), (2, 2, 5))]
        for _ in range(2)
    )
    loss = losses.SingularValue(dtype="float64")
    with tf.GradientTape() as tape:
        tape.watch(teacher)
        value = loss(teacher, student)
    gradients = tape.gradient(value, teacher)
    steps = [tf.constant(rng.normal(size=x.shape)) for x in teacher]
    slope = sum(
        float(tf.reduce_sum(g * s)) for g, s in zip(gradients, steps, strict=True)
    )
    ends = [
        float(loss([x + e * s for x, s in zip(teacher, steps, strict=True)], student))
        for e in (1e-5, -1e-5)
    ]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_singular_value_does_not_depend_on_the_teachers_signs():
    teacher, student = TALL_AND_WIDE(np.random.default_rng(4), 4)
    loss = losses.SingularValue(dtype="float64")
    value = float(loss(teacher, student))
    assert float(loss([-x for x in teacher], student)) == pytest.approx(value)
    assert float(loss(teacher, [-student[0], student[1]])) == pytest.approx(value)


def test_equal_singular_values_have_finite_gradients():
    """An orthogonal matrix has equal ones; a matrix of ones has many zeros."""
    teacher, student = pairs((2, 2, 4), (2, 2, 4))(np.random.default_rng(5), 3)
    orthogonal = np.tile(np.eye(4, dtype="float32").reshape(2, 2, 4), (3, 1, 1, 1))
    for odd in (orthogonal, np.ones_like(orthogonal)):
        for dtype in ("float32", "float64"):
            loss = losses.SingularValue(rank=2, dtype=dtype)
            value, gradients = run(loss, teacher, [odd, student[1]])
            assert np.isfinite(value)
            assert all(np.isfinite(g).all() for g in gradients)


def test_features_that_are_not_finite_show_in_the_loss():
    teacher, student = TALL_AND_WIDE(np.random.default_rng(6), 4)
    student[0][1, 0, 0, 0] = np.nan
    values = losses.SingularValue(reduction=None)(teacher, student).numpy()
    assert np.isnan(values[1])
    assert np.isfinite(values[[0, 2, 3]]).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.SingularValue(rank=0),
        lambda: losses.SingularValue(rank=1.5),
        lambda: losses.SingularValue(beta=0.0),
        lambda: losses.FlowOfProcedure(variant="paper"),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="Received"):
        make()


def test_rank_above_the_smaller_side():
    teacher, student = TALL_AND_WIDE(np.random.default_rng(7), 2)
    losses.SingularValue(rank=3)(teacher, student)
    with pytest.raises(ValueError, match="`rank` must be at most.*Received: 4"):
        losses.SingularValue(rank=4)(teacher, student)
