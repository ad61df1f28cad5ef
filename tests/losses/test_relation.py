"""Losses on the relations within a batch: relation.py, angles.py, batch.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf
from losses import golden
from losses.checklist import CHECKS, Subject, assert_close, run

from keras_distill import losses
from keras_distill.losses import angles

METHODS = ("rkd_distance", "rkd_angle", "rkd", "pkt", "sp", "cc_gaussian")
FILES = [name for method in METHODS for name in golden.files(method)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", FILES)
def test_golden(name, dtype):
    golden.check(name, dtype)


def embeddings(rng, batch):
    teacher = rng.normal(size=(batch, 7)).astype("float32")
    return teacher, rng.normal(size=(batch, 4)).astype("float32")


def features(rng, batch):
    teacher = rng.normal(size=(batch, 3, 3, 4)).astype("float32")
    return teacher, rng.normal(size=(batch, 2, 2, 5)).astype("float32")


def unit_embeddings(rng, batch):
    teacher, student = embeddings(rng, batch)
    return tuple(
        x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (teacher, student)
    )


def zeros(*shape):
    return np.zeros(shape, "float32")


# One row is not compared with anything; batches differ; a wrong rank.
ROWS = ((zeros(1, 3), zeros(1, 3)), (zeros(4, 3), zeros(5, 3)))
RANK = ((zeros(4, 3, 3), zeros(4, 3)), (zeros(4, 3), zeros(4, 2, 2)))
CLOSE = np.float32(1e4) + np.arange(24, dtype="float32").reshape(6, 4)
SUBJECTS = (
    Subject(
        losses.RelationalDistance, embeddings, ROWS + RANK, ((CLOSE, CLOSE),), rtol=2e-4
    ),
    Subject(
        losses.RelationalAngle, embeddings, ROWS + RANK, ((CLOSE, CLOSE),), rtol=2e-4
    ),
    Subject(losses.ProbabilisticTransfer, embeddings, ROWS + RANK, rtol=5e-4),
    Subject(losses.SimilarityPreserving, features, (*ROWS, (zeros(4), zeros(4)))),
    Subject(losses.CorrelationCongruence, unit_embeddings, ROWS + RANK),
)
ALL = pytest.mark.parametrize("subject", SUBJECTS, ids=str)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@ALL
def test_checklist(subject, check):
    check(subject)


@ALL
def test_lone_row_has_no_relations(subject):
    """A batch that happens to have one row: value and gradient are 0."""
    teacher, student = subject.batch(1)
    loss = subject.make()

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, *x.shape[1:]), x.dtype) for x in (teacher, student)
        ]
    )
    def step(teacher, student):
        with tf.GradientTape() as tape:
            tape.watch(student)
            value = loss(teacher, student)
        return value, tape.gradient(value, student)

    value, gradient = step(teacher, student)
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, np.zeros(student.shape))

    # Likewise if only one row has a weight, or none has.
    teacher, student = subject.batch(3)
    for weight in ([0.0, 2.0, 0.0], [0.0, 0.0, 0.0]):
        value, gradients = run(loss, teacher, student, np.array(weight, "float32"))
        assert value == 0
        np.testing.assert_array_equal(gradients[0], np.zeros(student.shape))


@ALL
def test_equal_and_zero_rows(subject):
    """Rows that are equal or 0, in the student alone or in both."""
    teacher, student = subject.batch(5)
    for where, what in (([1], student[0]), ([1, 2], 0.0)):
        spoilt = student.copy()
        spoilt[where] = what
        for known in (teacher, spoilt):
            value, gradients = run(subject.make(), known, spoilt)
            assert np.isfinite(value)
            assert np.isfinite(gradients[0]).all()
            assert np.linalg.norm(gradients[0]) < 1e3


@ALL
def test_gradient_reaches_the_teacher(subject):
    """No loss stops gradients; a teacher's adapter may be trainable."""
    teacher, student = subject.batch(5)
    loss = subject.make(dtype="float64")
    teacher, student = (tf.constant(x, "float64") for x in (teacher, student))
    with tf.GradientTape() as tape:
        tape.watch(teacher)
        value = loss(teacher, student)
    gradient = tape.gradient(value, teacher)
    direction = np.random.default_rng(9).normal(size=teacher.shape)
    step = 1e-6
    slope = (
        loss(teacher + step * direction, student)
        - loss(teacher - step * direction, student)
    ) / (2 * step)
    assert float(tf.reduce_sum(gradient * direction)) == pytest.approx(
        float(slope), rel=1e-5
    )


def plain_angle(teacher, student):
    """The formula as it stands, all triplets at once, in numpy."""

    def cosines(x):
        gap = x[None] - x[:, None]
        length = np.linalg.norm(gap, axis=-1, keepdims=True)
        unit = gap / np.maximum(length, 1e-12)
        return unit @ unit.transpose(0, 2, 1)

    gap = np.abs(cosines(student) - cosines(teacher))
    return np.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean((1, 2))


@pytest.mark.parametrize(
    "batch", [2, angles.BLOCK - 1, angles.BLOCK, angles.BLOCK + 1, 3 * angles.BLOCK]
)
def test_blocks_of_vertices(batch):
    """Whatever the last block holds, each row's value is the formula's."""
    rng = np.random.default_rng(batch)
    teacher, student = rng.normal(size=(2, batch, 6))
    loss = losses.RelationalAngle(reduction=None, dtype="float64")
    values, _ = run(loss, teacher, student)
    assert_close(values, plain_angle(teacher, student), 1e-9)


def test_far_from_the_origin():
    """Only differences count: a common offset does not eat up the digits."""
    teacher, student = embeddings(np.random.default_rng(3), 8)
    for make in (losses.RelationalAngle, losses.RelationalDistance):
        near, _ = run(make(), teacher, student)
        moved, _ = run(make(), teacher + 100.0, student - 100.0)
        assert_close(moved, near, 1e-3)


def test_opposite_angles_pass_the_bend_of_huber():
    teacher = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.1]])
    student = np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.1]])
    loss = losses.RelationalAngle(reduction=None, dtype="float64")
    values, gradients = run(loss, teacher, student)
    assert_close(values, plain_angle(teacher, student), 1e-9)
    step = np.zeros_like(student)
    step[2, 1] = 1e-6
    slope = (
        plain_angle(teacher, student + step) - plain_angle(teacher, student - step)
    ).sum() / 2e-6
    assert gradients[0][2, 1] == pytest.approx(slope, rel=1e-5)


def test_gradient_with_weights():
    """The hand-written gradient honours a different weight for every row."""
    teacher, student = embeddings(np.random.default_rng(4), 11)
    weight = np.linspace(0.0, 2.0, 11)
    loss = losses.RelationalAngle(dtype="float64", reduction="sum")
    student = student.astype("float64")
    _, gradients = run(loss, teacher, student, weight)
    direction = np.random.default_rng(5).normal(size=student.shape)
    step = 1e-6 * direction
    ahead, _ = run(loss, teacher, student + step, weight)
    behind, _ = run(loss, teacher, student - step, weight)
    slope = (ahead - behind) / 2e-6
    assert (gradients[0] * direction).sum() == pytest.approx(slope, rel=1e-5)


def test_expansion_of_the_kernel():
    teacher, student = unit_embeddings(np.random.default_rng(6), 5)

    def kernel(x):
        products = (x @ x.T).astype("float64")
        powers = [1.4**p / math.factorial(p) * products**p for p in range(4)]
        return math.exp(-1.4) * sum(powers)

    loss = losses.CorrelationCongruence(gamma=0.7, order=3, reduction=None)
    values, _ = run(loss, teacher, student)
    wanted = np.mean((kernel(student) - kernel(teacher)) ** 2, axis=1)
    assert_close(values, wanted, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"gamma": 0.0}, "gamma"), ({"order": 0}, "order"), ({"order": 1.5}, "order")],
)
def test_bad_arguments(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        losses.CorrelationCongruence(**arguments)
