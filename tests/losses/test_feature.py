"""Losses on the features of one layer."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest

from keras_distill import losses
from tests.losses import golden
from tests.losses.checklist import CHECKS, Subject, assert_close, run

METHODS = (
    "fitnet_hint",
    "fitnet_hint_paper",
    "fitnet_hint_conv1x1",
    "simkd",
    "at",
    "at_paper",
    "nst",
    "vid",
    "ft",
    "ft_repdistiller",
    "reviewkd_hcl",
    "mgd",
    "ab",
    "ofd",
)
FILES = [name for method in METHODS for name in golden.files(method)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", FILES)
def test_golden(name, dtype):
    golden.check(name, dtype)


def grids(teacher, student):
    """Makes inputs: one grid for the teacher, one for the student."""

    def inputs(rng, batch):
        return tuple(
            rng.normal(size=(batch, *shape)).astype("float32")
            for shape in (teacher, student)
        )

    return inputs


def variational(rng, batch):
    teacher, mean = grids((3, 2, 4), (3, 2, 4))(rng, batch)
    return teacher, [mean, rng.normal(size=(batch, 1, 1, 4)).astype("float32")]


def zeros(*shape):
    return np.zeros(shape, "float32")


SAME = grids((3, 2, 4), (3, 2, 4))
DIFFERENT_CHANNELS = ((zeros(2, 3, 2, 4), zeros(2, 3, 2, 5)),)
NO_GRID = ((zeros(2, 4), zeros(2, 4)), (zeros(2, 3, 2, 4), zeros(2, 4)))
SUBJECTS = [
    Subject(losses.Hint, SAME, DIFFERENT_CHANNELS),
    Subject(
        functools.partial(losses.Hint, variant="paper"),
        grids((5,), (5,)),
        ((zeros(2, 3, 4), zeros(2, 12)),),
        name="Hint-paper",
    ),
    Subject(losses.AttentionTransfer, grids((4, 4, 5), (3, 2, 4)), NO_GRID),
    Subject(
        functools.partial(losses.AttentionTransfer, p=3, variant="paper"),
        SAME,
        NO_GRID,
        name="AttentionTransfer-paper",
    ),
    Subject(losses.NeuronSelectivity, grids((4, 4, 5), (8, 2, 4)), NO_GRID),
    Subject(
        losses.VariationalInformation,
        variational,
        (
            (zeros(2, 4), zeros(2, 4)),
            (zeros(2, 4), [zeros(2, 5), zeros(4)]),
            (zeros(2, 4), [zeros(2, 4), zeros(3)]),
        ),
    ),
    Subject(losses.FactorTransfer, SAME, DIFFERENT_CHANNELS),
    Subject(
        functools.partial(losses.FactorTransfer, p=2, variant="repdistiller"),
        SAME,
        DIFFERENT_CHANNELS,
        name="FactorTransfer-repdistiller",
    ),
    Subject(
        losses.HierarchicalContext,
        grids((5, 3, 4), (5, 3, 4)),
        (
            *DIFFERENT_CHANNELS,
            (zeros(2, 3, 4), zeros(2, 3, 4)),
            ([zeros(2, 4), zeros(2, 4)], [zeros(2, 4)]),
        ),
    ),
    Subject(losses.ActivationBoundary, SAME, DIFFERENT_CHANNELS),
    Subject(
        functools.partial(losses.MarginReLU, margin=[-1.0, -0.5, -0.2, 0.0]),
        SAME,
        (*DIFFERENT_CHANNELS, (zeros(2, 3), zeros(2, 3))),
        name="MarginReLU",
    ),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_checklist(subject, check):
    check(subject)


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_equal_features_cost_nothing(subject):
    teacher, student = subject.batch()
    if isinstance(student, list) or subject.name == "MarginReLU":
        pytest.skip("equal features are not the minimum")
    if str(subject) == "ActivationBoundary":
        student = np.where(teacher > 0, 1.5, -1.5).astype("float32")
    else:
        student = teacher
    value, gradients = run(subject.make(), teacher, student)
    assert abs(value) < 1e-12
    assert np.abs(gradients[0]).max() < 1e-6


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (losses.Hint, (6, 3, 2)),
        (losses.AttentionTransfer, (6,)),
        (losses.NeuronSelectivity, (6,)),
        (losses.FactorTransfer, (6,)),
        (losses.HierarchicalContext, (6,)),
        (losses.ActivationBoundary, (6,)),
        (functools.partial(losses.MarginReLU, margin=-1.0), (6,)),
    ],
)
def test_values_per_position_or_sample(make, shape):
    teacher, student = SAME(np.random.default_rng(0), 6)
    assert make(reduction=None)(teacher, student).shape == shape


def adaptive_pool(x, size):
    """Average pooling as the formula says, window by window."""
    n = x.shape[1]
    windows = [x[:, i * n // size : -(-(i + 1) * n // size)] for i in range(size)]
    return np.stack([w.mean(1) for w in windows], 1)


def test_attention_pools_the_larger_grid():
    teacher, student = grids((5, 3, 2), (3, 4, 6))(np.random.default_rng(1), 4)
    small_teacher = adaptive_pool(teacher, 3)
    small_student = np.swapaxes(adaptive_pool(np.swapaxes(student, 1, 2), 3), 1, 2)
    maps = []
    for x in (small_teacher, small_student):
        flat = np.mean(x**2, -1).reshape(4, -1)
        maps.append(flat / np.linalg.norm(flat, axis=1, keepdims=True))
    wanted = np.mean((maps[0] - maps[1]) ** 2)
    value, _ = run(losses.AttentionTransfer(dtype="float64"), teacher, student)
    assert value == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 2, 9), (5, 4, 3)])
def test_selectivity_on_small_and_large_grids(shape):
    """The two ways to compute it, by positions and by channels, are the formula."""
    teacher, student = grids(shape, (*shape[:2], 4))(np.random.default_rng(2), 3)
    t, s = (
        x.reshape(3, -1, x.shape[-1])
        / np.linalg.norm(x.reshape(3, -1, x.shape[-1]), axis=1, keepdims=True)
        for x in (teacher, student)
    )

    def kernel(a, b):
        return np.mean(np.einsum("bpi,bpj->bij", a, b) ** 2, (1, 2))

    wanted = kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)
    loss = losses.NeuronSelectivity(reduction=None, dtype="float64")
    assert_close(loss(teacher, student), wanted, 1e-6)


def test_attention_of_odd_power_takes_magnitudes():
    teacher, student = SAME(np.random.default_rng(3), 4)
    loss = losses.AttentionTransfer(p=3)
    value, _ = run(loss, teacher, student)
    assert value == pytest.approx(float(loss(-teacher, np.abs(student))), rel=1e-5)


def test_dead_channels_have_no_gradient():
    teacher, student = SAME(np.random.default_rng(4), 4)
    student[..., 1] = 0
    student[2] = 0
    for loss in (losses.NeuronSelectivity(), losses.FactorTransfer()):
        _, (gradient,) = run(loss, teacher, student)
        assert np.isfinite(gradient).all()
        assert np.all(gradient[2] == 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.Hint(variant="sum"),
        lambda: losses.AttentionTransfer(p=0.5),
        lambda: losses.AttentionTransfer(variant="repdistiller"),
        lambda: losses.FactorTransfer(p=0),
        lambda: losses.FactorTransfer(variant="paper"),
        lambda: losses.VariationalInformation(epsilon=0),
        lambda: losses.HierarchicalContext(levels=(4, 0)),
        lambda: losses.ActivationBoundary(margin=-1),
        lambda: losses.MarginReLU(margin=[]),
        lambda: losses.MarginReLU(margin=[-1.0, float("nan")]),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="Received"):
        make()


def test_inside_keras_feature_distillation():
    """The losses serve Keras's own distiller."""

    def model(width, name):
        inputs = keras.Input((4, 4, 2))
        x = keras.layers.Conv2D(width, 3, padding="same", name=name)(inputs)
        x = keras.layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, keras.layers.Dense(3)(x))

    distiller = keras.distillation.Distiller(
        teacher=model(6, "t"),
        student=model(3, "s"),
        distillation_losses=keras.distillation.FeatureDistillation(
            loss=losses.AttentionTransfer(),
            teacher_layer_name="t",
            student_layer_name="s",
        ),
    )
    distiller.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    x = np.random.default_rng(5).normal(size=(8, 4, 4, 2)).astype("float32")
    history = distiller.fit(x, np.arange(8) % 3, verbose=0)
    assert 0 < history.history["distillation_loss"][0] < 1
