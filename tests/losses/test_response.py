"""Losses on logits: response.py, classes.py, regularization.py."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
from losses import golden
from losses.checklist import CHECKS, Subject, run

from keras_distill import losses

METHODS = (
    "kd_kl_t2",
    "kd_hinton_combined",
    "kd_ce_form",
    "kd_ce_form_t2",
    "ls_kd",
    "logit_mse",
    "dkd",
    "dist",
    "mlld",
    "confidence_penalty",
    "tfkd_reg_paper",
)
FILES = [name for method in METHODS for name in golden.files(method)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", FILES)
def test_golden(name, dtype):
    golden.check(name, dtype)


def logits(rng, batch):
    teacher, student = (3 * rng.normal(size=(2, batch, 5))).astype("float32")
    return teacher, student


def logits_and_labels(rng, batch):
    teacher, student = logits(rng, batch)
    return [teacher, rng.integers(0, 5, batch).astype("int32")], student


def labels(rng, batch):
    (_, label), student = logits_and_labels(rng, batch)
    return label, student


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


# A row of huge teacher logits needs equally huge student logits to be answered.
LARGE = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], "float32")
CLASSES = (zeros(4, 3), zeros(4, 5))
SINGLE = (zeros(4, 1), zeros(4, 1))
SUBJECTS = (
    Subject(losses.SoftTarget, logits, (CLASSES, SINGLE), ((LARGE, -LARGE),)),
    Subject(
        functools.partial(losses.SoftTarget, 2.0, False, "cross_entropy"),
        logits,
        (CLASSES, SINGLE),
        name="SoftTarget-cross_entropy",
    ),
    Subject(
        functools.partial(losses.SoftTarget, standardize=True),
        logits,
        (CLASSES, SINGLE),
        name="SoftTarget-standardize",
    ),
    Subject(losses.LogitMSE, logits, (CLASSES, (zeros(4), zeros(4, 3)))),
    Subject(
        losses.DecoupledKD,
        logits_and_labels,
        (
            CLASSES,
            (zeros(4, 5), zeros(4, 5)),
            ([zeros(4, 3), zeros(4, dtype="int32")], zeros(4, 5)),
            ([zeros(4, 5), zeros(3, dtype="int32")], zeros(4, 5)),
            ([zeros(4, 5), zeros(4, 2, dtype="int32")], zeros(4, 5)),
        ),
        (([LARGE, np.array([0, 0], "int32")], -LARGE),),
    ),
    Subject(
        losses.DIST,
        logits,
        (CLASSES, SINGLE, (zeros(1, 5), zeros(1, 5)), (zeros(4, 2, 5),) * 2),
        ((LARGE, -LARGE),),
        rtol=1e-3,
    ),
    Subject(
        losses.MultiLevelLogit,
        logits,
        (CLASSES, SINGLE, (zeros(4, 2, 5),) * 2),
        ((LARGE, -LARGE),),
    ),
    Subject(
        losses.ConfidencePenalty,
        labels,
        ((zeros(3, dtype="int32"), zeros(4, 5)), (zeros(4, dtype="int32"), SINGLE[0])),
    ),
    Subject(
        losses.VirtualTeacher,
        labels,
        ((zeros(3, dtype="int32"), zeros(4, 5)), (zeros(4, dtype="int32"), SINGLE[0])),
    ),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_checklist(subject, check):
    check(subject)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: losses.SoftTarget(temperature=0.0), "temperature"),
        (lambda: losses.SoftTarget(temperature=float("nan")), "temperature"),
        (lambda: losses.SoftTarget(divergence="js"), "divergence"),
        (lambda: losses.DecoupledKD(temperature=-1.0), "temperature"),
        (lambda: losses.DecoupledKD(alpha=-1.0), "alpha"),
        (lambda: losses.DecoupledKD(beta=float("inf")), "beta"),
        (lambda: losses.DIST(gamma=-0.1), "gamma"),
        (lambda: losses.DIST(temperature=float("inf")), "temperature"),
        (lambda: losses.MultiLevelLogit(temperatures=()), "temperatures"),
        (lambda: losses.MultiLevelLogit(temperatures=(1.0, 0.0)), "temperatures"),
        (lambda: losses.ConfidencePenalty(beta=-0.1), "beta"),
        (lambda: losses.VirtualTeacher(correct=1.0), "correct"),
        (lambda: losses.VirtualTeacher(temperature=0), "temperature"),
    ],
)
def test_bad_arguments(make, argument):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        make()


@pytest.mark.parametrize(
    "make", [losses.SoftTarget, losses.DecoupledKD, losses.DIST, losses.VirtualTeacher]
)
def test_temperature_is_live(make):
    loss = make(temperature=2.0)
    teacher, student = logits(np.random.default_rng(1), 4)
    label = np.array([0, 1, 2, 3], "int32")
    if loss.needs_labels:
        teacher = [teacher, label]
    elif not loss.needs_teacher:
        teacher = label
    loss.temperature = variable = keras.Variable(2.0, trainable=False)
    before = float(loss(teacher, student))
    variable.assign(3.0)
    assert float(loss(teacher, student)) == float(
        make(temperature=3.0)(teacher, student)
    )
    assert float(loss(teacher, student)) != before
    assert loss.get_config()["temperature"] == 3.0


def wrap(loss, teacher, label):
    return [teacher, label] if loss.needs_labels else label


@pytest.mark.parametrize(
    "make", [losses.DecoupledKD, losses.ConfidencePenalty, losses.VirtualTeacher]
)
def test_forms_of_labels(make):
    teacher, student = logits(np.random.default_rng(2), 3)
    label = np.array([4, 0, 2], "int32")
    loss = make(reduction=None)
    values, _ = run(loss, wrap(loss, teacher, label), student)
    for form in (
        label[:, None],
        label.astype("int64"),
        label.astype("uint8"),
        np.eye(5, dtype="float32")[label],
        np.eye(5, dtype="int32")[label],
    ):
        again, _ = run(loss, wrap(loss, teacher, form), student)
        np.testing.assert_array_equal(again, values)


@pytest.mark.parametrize(
    "make", [losses.DecoupledKD, losses.ConfidencePenalty, losses.VirtualTeacher]
)
def test_missing_labels_contribute_nothing(make):
    teacher, student = logits(np.random.default_rng(3), 3)
    loss = make(reduction=None)
    label = np.array([4, -1, 2], "int32")
    hot = np.eye(5, dtype="float32")[np.maximum(label, 0)] * (label >= 0)[:, None]
    for form in (label, hot):
        values, gradients = run(loss, wrap(loss, teacher, form), student)
        assert values[1] == 0
        assert np.all(gradients[0][1] == 0)
        assert np.all(values[[0, 2]] != 0)


def test_labels_stay_integers():
    # 2049 is 2048 in float16, 257 is 256 in bfloat16.
    student = np.zeros((1, 3000), "float16")
    student[0, 2049] = 5.0
    loss = losses.ConfidencePenalty(beta=0.0)
    found = float(loss(np.array([2049]), student))
    assert found == pytest.approx(np.log(np.exp(5.0) + 2999) - 5.0, rel=1e-5)


def test_needs():
    assert losses.DecoupledKD.needs_labels
    assert not losses.SoftTarget.needs_labels
    assert not losses.ConfidencePenalty.needs_teacher
    assert not losses.VirtualTeacher.needs_teacher
    assert losses.DIST.across_batch
    assert losses.MultiLevelLogit.across_batch


def test_two_classes():
    # Nothing is left beside the label and one other: the second part is 0.
    rng = np.random.default_rng(4)
    teacher, student = rng.normal(size=(2, 3, 2)).astype("float32")
    label = np.array([0, 1, 1], "int32")
    both = losses.DecoupledKD(1.0, 8.0, 2.0)([teacher, label], student)
    soft = losses.SoftTarget(2.0)(teacher, student)
    assert float(both) == pytest.approx(float(soft), rel=1e-5)


def test_multi_level_of_one_row():
    teacher, student = logits(np.random.default_rng(5), 1)
    value, gradients = run(losses.MultiLevelLogit(), teacher, student)
    assert value > 0
    assert np.isfinite(gradients[0]).all()


def test_numpy_formula_of_dist():
    teacher, student = logits(np.random.default_rng(6), 6)

    def softmax(z):
        e = np.exp(z.astype("float64") / 2.0)
        return e / e.sum(-1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    inter = np.array([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = np.mean(
        [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)]
    )
    loss = losses.DIST(2.0, 3.0, 2.0, reduction=None)
    values, _ = run(loss, teacher, student)
    np.testing.assert_allclose(values, 4.0 * (2.0 * inter + 3.0 * intra), rtol=1e-4)
