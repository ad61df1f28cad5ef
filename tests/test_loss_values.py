"""Compiled losses that have no value per position, with weights and masks."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tiny
from keras import layers

import keras_distill as kd

GENERATOR = np.random.default_rng(0)
WEIGHTS = np.array([1, 2, 3, 0, 1, 5], "float32")
IMAGES = GENERATOR.normal(size=(6, 4, 4, 3)).astype("float32")
CLASSES = keras.utils.to_categorical(GENERATOR.integers(0, 2, (6, 4, 4)), 2)
# As many steps as rows: aligned from the right, a row's weight would be a step's.
SPEECH = GENERATOR.normal(size=(6, 6, 3)).astype("float32")
LETTERS = GENERATOR.integers(1, 5, (6, 3))


def segmenter():
    inputs = keras.Input((4, 4, 3))
    outputs = layers.Conv2D(2, 1, activation="softmax", name="pixels")(inputs)
    return keras.Model(inputs, outputs)


def reader(mask=None):
    x = inputs = keras.Input((6, 3))
    if mask is not None:
        x = layers.Masking(mask)(x)
    return keras.Model(inputs, layers.Dense(5, name="letters")(x))


def hard_loss(student, loss, x, y, weight=None):
    distiller = kd.Distiller(student, keras.models.clone_model(student))
    tiny.compiled(distiller, loss, keras.optimizers.SGD(0.0))
    logs = tiny.history(distiller, x, y, sample_weight=weight, batch_size=6)
    return logs["hard_loss"][0]


@pytest.mark.parametrize(
    ("make", "loss", "x", "y"),
    [
        (segmenter, keras.losses.Dice(axis=(1, 2, 3)), IMAGES, CLASSES),
        (segmenter, keras.losses.Dice(axis=(1, 2)), IMAGES, CLASSES),
        (segmenter, keras.losses.Tversky(axis=(1, 2, 3)), IMAGES, CLASSES),
        (segmenter, keras.losses.MeanSquaredError(), IMAGES, CLASSES),
        (reader, keras.losses.CTC(), SPEECH, LETTERS),
    ],
)
def test_weights_are_of_rows_whatever_the_loss_has_a_value_for(make, loss, x, y):
    student = make()
    values = np.array(loss.call(y, student(x)))  # before any reduction
    weights = WEIGHTS.reshape(6, *[1] * (values.ndim - 1))
    assert hard_loss(student, loss, x, y, WEIGHTS) == pytest.approx(
        (values * weights).mean(), rel=1e-5
    )
    assert hard_loss(student, loss, x, y) == pytest.approx(values.mean(), rel=1e-5)


def test_names_and_functions():
    student = reader()
    expected = hard_loss(student, keras.losses.CTC(), SPEECH, LETTERS, WEIGHTS)
    for loss in ("ctc", keras.losses.ctc):
        assert hard_loss(student, loss, SPEECH, LETTERS, WEIGHTS) == pytest.approx(
            expected, rel=1e-6
        )


def test_a_row_counts_where_any_of_its_steps_does():
    student, x = reader(mask=9.0), SPEECH.copy()
    x[0, 3:] = 9.0
    x[1] = 9.0
    values = np.array(keras.losses.CTC().call(LETTERS, student(x)))
    counted = [0, 2, 3, 4, 5]
    assert hard_loss(student, "ctc", x, LETTERS) == pytest.approx(
        values[counted].mean(), rel=1e-5
    )


def test_losses_of_one_output_that_share_no_weights():
    losses = [["mse", keras.losses.Dice(axis=(1, 2, 3))]]
    student = segmenter()
    assert np.isfinite(hard_loss(student, losses, IMAGES, CLASSES))
    with pytest.raises(ValueError, match=r"one output.*share.*one function"):
        hard_loss(student, losses, IMAGES, CLASSES, WEIGHTS)


def test_an_output_with_labels_and_no_loss():
    inputs = keras.Input((4, 4, 3))
    outputs = [layers.Conv2D(2, 1, name=name)(inputs) for name in "ab"]
    student = keras.Model(inputs, outputs)
    losses = ["mse", None]
    found = hard_loss(student, losses, IMAGES, [CLASSES, CLASSES], WEIGHTS)
    assert np.isfinite(found)


def test_one_number_for_the_batch_is_weighted_by_the_mean():
    student = segmenter()
    dice = keras.losses.Dice()
    whole = float(dice(CLASSES, student(IMAGES)))
    weighted = hard_loss(student, dice, IMAGES, CLASSES, WEIGHTS)
    assert hard_loss(student, dice, IMAGES, CLASSES) == pytest.approx(whole, rel=1e-5)
    assert weighted == pytest.approx(whole * WEIGHTS.mean(), rel=1e-5)
