"""Our losses inside Keras's own distiller."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_distill import losses


def network(width):
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(width, activation="relu", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(hidden))


def train(distillation_loss):
    keras.utils.set_random_seed(0)
    teacher, student = network(8), network(5)
    distiller = keras.distillation.Distiller(
        teacher=teacher,
        student=student,
        distillation_losses=distillation_loss,
        student_loss_weight=0.0,
    )
    distiller.compile(
        optimizer=keras.optimizers.SGD(0.05),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=True,
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 6)).astype("float32"), rng.integers(0, 3, 32)
    history = distiller.fit(x, y, batch_size=16, epochs=4, verbose=0)
    return history.history["distillation_loss"]


@pytest.mark.parametrize(
    "loss",
    [
        losses.SoftTarget(temperature=2.0),
        losses.LogitMSE(),
        losses.DIST(),
        losses.MultiLevelLogit(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_logits(loss):
    values = train(keras.distillation.LogitsDistillation(temperature=1.0, loss=loss))
    assert np.isfinite(values).all()
    assert values[-1] < values[0]


@pytest.mark.parametrize(
    "loss",
    [
        losses.RelationalDistance(),
        losses.RelationalAngle(),
        losses.ProbabilisticTransfer(),
        losses.SimilarityPreserving(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_features(loss):
    values = train(
        keras.distillation.FeatureDistillation(
            loss=loss,
            teacher_layer_name="hidden",
            student_layer_name="hidden",
        )
    )
    assert np.isfinite(values).all()
    assert values[-1] < values[0]
