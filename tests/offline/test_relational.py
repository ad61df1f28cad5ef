"""RelationalDistiller: the paper's combination, and learning without labels."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tiny
from losses import golden
from offline import nets

import keras_distill as kd


def linear(size: int, width: int) -> keras.Model:
    """A model whose embedding is its input."""
    inputs = keras.Input((size,))
    embedding = keras.layers.Identity(name="embedding")(inputs)
    return keras.Model(inputs, keras.layers.Dense(width)(embedding))


def test_its_two_terms_are_the_papers():
    file = golden.load("rkd")
    own, known = file.inputs["student_embedding"], file.inputs["teacher_embedding"]
    h = file.meta["hyperparameters"]
    distiller = kd.RelationalDistiller(
        linear(own.shape[1], 2),
        kd.teachers.Model(linear(known.shape[1], 3), inputs="teacher"),
        embedding=("embedding", "embedding"),
        distance_weight=h["distance_weight"],
        angle_weight=h["angle_weight"],
        student_inputs="student",
    )
    distiller.compile("sgd", run_eagerly=True)
    terms = nets.terms(distiller, ({"student": own, "teacher": known},))
    total = sum(float(distiller.term_weights[n].numpy()) * v for n, v in terms.items())
    assert set(terms) == {"distance", "angle"}
    assert total == pytest.approx(file.loss, rel=2e-4)


def test_an_embedding_learns_without_labels_and_across_classes(teacher, digits):
    student = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(5)]
    )
    distiller = kd.RelationalDistiller(
        student, teacher, embedding=(student.layers[-1], "embedding")
    )
    distiller.compile(keras.optimizers.Adam(0.01), run_eagerly=True)
    logs = tiny.history(distiller, digits[0], batch_size=64, epochs=2)
    assert set(logs) == {"loss", "distance_loss", "angle_loss"}
    assert logs["loss"][1] < logs["loss"][0]


def test_terms_of_weight_0_are_left_out(teacher):
    distiller = kd.RelationalDistiller(
        nets.net(2),
        teacher,
        embedding=("embedding", "embedding"),
        angle_weight=0.0,
        congruence_weight=0.5,
    )
    assert [link.name for link in distiller.links] == ["distance", "congruence"]
    assert np.isclose(distiller.term_weights["congruence"].numpy(), 0.5)
