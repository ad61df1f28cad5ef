"""The temperature for a given perplexity."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from keras_distill.teachers import Ensemble, suggest_temperature


def perplexity_of(logits, temperature):
    """exp(mean entropy), in float64."""
    z = np.asarray(logits, "float64") / temperature
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0)
    return np.exp(np.mean(-terms.sum(-1)))


@pytest.mark.parametrize("perplexity", [1.1, 2.0, 2.9])
def test_the_targets_have_the_perplexity(perplexity):
    teacher, (x, _) = tiny.teacher(), tiny.data()
    temperature = suggest_temperature(teacher, x, perplexity)
    found = perplexity_of(teacher.predict(x, verbose=0), temperature)
    np.testing.assert_allclose(found, perplexity, rtol=1e-5)


def test_the_form_of_the_data_does_not_matter():
    teacher, (x, y) = tiny.teacher(), tiny.data()
    expected = suggest_temperature(teacher, x)
    rows = tf.data.Dataset.from_tensor_slices((x, y))
    assert suggest_temperature(teacher, rows) == pytest.approx(expected, rel=1e-5)
    assert suggest_temperature(teacher, rows.batch(7)) == pytest.approx(expected, 1e-5)


def test_padding_and_labels_of_positions_do_not_matter():
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(9, 4, mask_zero=True, embeddings_initializer="normal")
    teacher = keras.Model(inputs, keras.layers.Dense(3)(x(inputs)))
    words = np.random.default_rng(0).integers(1, 9, (6, 5))
    words[:, 3:] = 0
    expected = suggest_temperature(teacher, words[:, :3])
    found = suggest_temperature(teacher, (words, np.zeros((6, 5), "int64")))
    assert found == pytest.approx(expected, rel=1e-4)


def test_an_arithmetic_ensemble_is_asked_at_each_temperature():
    models, (x, _) = [tiny.teacher(), tiny.mlp()], tiny.data()
    temperature = suggest_temperature(models, x, 2.0)
    logits = Ensemble(models)(x, [], temperature)[0]
    assert perplexity_of(logits, temperature) == pytest.approx(2.0, rel=1e-4)


def test_the_plot(tmp_path):
    path = tmp_path / "entropy.png"
    suggest_temperature(tiny.teacher(), tiny.data()[0], 2.0, plot=path)
    assert path.stat().st_size > 5000


@pytest.mark.parametrize("perplexity", [1.0, 3.0, float("nan")])
def test_a_perplexity_that_cannot_be(perplexity):
    with pytest.raises(ValueError, match="above 1 and below the number of classes, 3"):
        suggest_temperature(tiny.teacher(), tiny.data()[0], perplexity)


def test_logits_that_are_all_alike():
    teacher = tiny.linear()
    teacher.set_weights([np.zeros((tiny.FEATURES, tiny.CLASSES)), np.zeros(3)])
    with pytest.raises(ValueError, match=r"out of reach: at T = 0\.001 it is 3"):
        suggest_temperature(teacher, tiny.data()[0], 2.0)


def test_several_outputs_are_refused():
    inputs = keras.Input((tiny.FEATURES,))
    outputs = {name: keras.layers.Dense(2, name=name)(inputs) for name in "ab"}
    with pytest.raises(ValueError, match=r"one output.*\['a', 'b'\]"):
        suggest_temperature(keras.Model(inputs, outputs), tiny.data()[0], 1.5)
