"""Learning from labels alone: the virtual teacher and its relatives."""

from __future__ import annotations

import json
import pathlib

import keras
import numpy as np
import pytest

import keras_distill as kd
from keras_distill import losses

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    return golden, json.loads(str(golden["meta"]))["hyperparameters"]


def _holding(logits):
    """A model whose outputs for the unit vectors are these logits."""
    rows, classes = logits.shape
    model = keras.Sequential(
        [keras.Input((rows,)), keras.layers.Dense(classes, use_bias=False)]
    )
    model.set_weights([logits])
    return model


def _check(golden, trainable, student, multiplier=1.0):
    """Trains one step with rate 1 and compares value and gradient."""
    rows = len(golden["labels"])
    logs = trainable.fit(
        np.eye(rows, dtype="float32"), golden["labels"], rows, verbose=0
    ).history
    value = float(golden["loss"])
    assert logs["loss"][0] == pytest.approx(value, rel=2e-5, abs=1e-6)
    gradient = golden["student_logits"] - student.get_weights()[0]
    expected = golden["grad_student_logits"]
    error = np.linalg.norm(gradient - expected)
    assert error <= 2e-3 * np.linalg.norm(expected) + 1e-6
    return logs


def _step(distiller, loss=SPARSE):
    distiller.compile(keras.optimizers.SGD(1.0), loss, run_eagerly=True)
    return distiller


@keras.saving.register_keras_serializable(package="tests")
class _Released(losses.VirtualTeacher):
    """The released code's: the student at temperature 1, a mean over classes.

    Dividing T times the logits by T leaves the logits.
    """

    def call(self, y_true, y_pred):
        return super().call(y_true, self.temperature * y_pred) / y_pred.shape[-1]


def test_golden_virtual_teacher_of_the_paper():
    golden, hyper = _golden("tfkd_reg_paper")
    student = _holding(golden["student_logits"])
    teacher = losses.VirtualTeacher(hyper["correct_prob"], hyper["temperature"])
    alpha = hyper["alpha"]
    distiller = kd.TeacherFree(student, teacher, alpha=1 - alpha, beta=alpha)
    logs = _check(golden, _step(distiller), student)
    assert logs["soft_loss"][0] == pytest.approx(float(golden["out_kl"]), rel=1e-4)


def test_golden_virtual_teacher_of_the_released_code():
    golden, hyper = _golden("tfkd_reg")
    student = _holding(golden["student_logits"])
    teacher = _Released(hyper["correct_prob"], hyper["temperature"])
    alpha = hyper["alpha"]
    distiller = kd.TeacherFree(
        student, teacher, alpha=1 - alpha, beta=alpha * hyper["multiplier"]
    )
    _check(golden, _step(distiller), student)


def test_golden_label_smoothing_is_kerass():
    golden, hyper = _golden("label_smoothing")
    classes = golden["student_logits"].shape[1]
    one_hot = keras.utils.to_categorical(golden["labels"], classes)
    smoothed = keras.losses.CategoricalCrossentropy(True, hyper["epsilon"])
    student = _holding(golden["student_logits"])
    student.compile(keras.optimizers.SGD(1.0), smoothed, run_eagerly=True)
    _check(golden | {"labels": one_hot}, student, student)
    # The other definition in use is the same with another epsilon.
    epsilon = hyper["tfkd_variant_alpha"] * classes / (classes - 1)
    found = keras.losses.CategoricalCrossentropy(True, epsilon)(
        one_hot, golden["student_logits"]
    )
    assert float(found) == pytest.approx(float(golden["loss_tfkd_variant"]), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["confidence_penalty", "confidence_penalty__edge_large_logits"]
)
def test_golden_confidence_penalty_is_a_compiled_loss(name):
    golden, hyper = _golden(name)
    student = _holding(golden["student_logits"])
    loss = losses.ConfidencePenalty(hyper["beta"])
    student.compile(keras.optimizers.SGD(1.0), loss, run_eagerly=True)
    _check(golden, student, student)


def _student(head=None):
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, "relu"),
            keras.layers.Dense(3, activation=head),
        ]
    )


def _data(rows=12):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(rows, 4)).astype("float32")
    return x, generator.integers(0, 3, rows).astype("int32")


def _fit(distiller, x, y, **kwargs):
    kwargs = {"verbose": 0, "shuffle": False} | kwargs
    return distiller.fit(x, y, **kwargs).history


def _still(distiller, loss=SPARSE, **kwargs):
    return distiller.compile(
        keras.optimizers.SGD(0.0), loss, run_eagerly=True, **kwargs
    )


def test_the_default_is_the_papers_virtual_teacher():
    x, y = _data()
    distiller = _still(kd.TeacherFree(_student()), metrics=["accuracy"])
    logs = _fit(distiller, x, y, validation_data=(x, y))
    z = distiller.student(x)
    soft = float(losses.VirtualTeacher(0.99, 20.0)(y, z))
    assert logs["soft_loss"][0] == pytest.approx(soft, rel=1e-4)
    hard = float(SPARSE(y, z))
    assert logs["hard_loss"][0] == pytest.approx(hard, rel=1e-5)
    assert logs["loss"][0] == pytest.approx(0.9 * hard + 0.1 * soft, rel=1e-5)
    # Evaluation is the student's alone.
    assert logs["val_loss"][0] == pytest.approx(hard, rel=1e-5)
    assert "val_soft_loss" not in logs


def test_one_hot_labels_and_probabilities():
    x, y = _data()
    distiller = kd.TeacherFree(_student("softmax"))
    _still(distiller, "categorical_crossentropy")
    logs = _fit(distiller, x, keras.utils.to_categorical(y, 3))
    z = np.log(np.asarray(distiller.student(x)))
    soft = float(losses.VirtualTeacher()(y, z))
    assert logs["soft_loss"][0] == pytest.approx(soft, rel=1e-3)


def test_rows_without_a_label_and_weights():
    x, y = _data()
    half = np.where(np.arange(12) < 5, y, -1)
    distiller = _still(kd.TeacherFree(_student()))
    logs = _fit(distiller, x, half)
    z = np.asarray(distiller.student(x))
    soft = float(losses.VirtualTeacher()(y[:5], z[:5]))
    assert logs["soft_loss"][0] == pytest.approx(soft, rel=1e-4)
    weight = np.arange(12.0)
    logs = _fit(distiller, x, y, sample_weight=weight)
    soft = float(losses.VirtualTeacher()(y, z, weight.astype("float32")))
    assert logs["soft_loss"][0] == pytest.approx(soft, rel=1e-4)


def test_temperature_and_weights_are_live():
    x, y = _data()
    regularizer = losses.VirtualTeacher()
    distiller = _still(kd.TeacherFree(_student(), regularizer))
    before = _fit(distiller, x, y)
    distiller.temperature = 1.0
    distiller.beta = 2.0
    after = _fit(distiller, x, y)
    soft = float(losses.VirtualTeacher(temperature=1.0)(y, distiller.student(x)))
    assert after["soft_loss"][0] == pytest.approx(soft, rel=1e-5)
    assert after["loss"][0] == pytest.approx(
        0.9 * before["hard_loss"][0] + 2 * soft, rel=1e-5
    )
    assert regularizer.temperature == 20.0


def test_saved_and_loaded_it_goes_on_as_before(tmp_path):
    x, y = _data()
    distiller = kd.TeacherFree(_student(), losses.VirtualTeacher(0.9), beta=0.5)
    distiller.compile(keras.optimizers.Adam(0.01), SPARSE, run_eagerly=True)
    _fit(distiller, x, y)
    distiller.temperature = 3.0
    distiller.save(tmp_path / "free.keras")
    loaded = keras.saving.load_model(tmp_path / "free.keras")
    assert loaded.regularizer.correct == 0.9
    loaded.run_eagerly = True
    assert _fit(distiller, x, y) == _fit(loaded, x, y)


def test_bad_input():
    with pytest.raises(TypeError, match="must be a loss of keras_distill.losses"):
        kd.TeacherFree(_student(), "mse")
    with pytest.raises(
        ValueError, match="must be a loss without a teacher.*SoftTarget"
    ):
        kd.TeacherFree(_student(), losses.SoftTarget())
    with pytest.raises(ValueError, match="at least 0"):
        kd.TeacherFree(_student(), beta=-1)
    distiller = kd.TeacherFree(_student(), losses.ConfidencePenalty())
    with pytest.raises(AttributeError, match="no temperature"):
        distiller.temperature = 2.0
