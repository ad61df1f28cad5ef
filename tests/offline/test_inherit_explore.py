"""InheritExplore: two halves, one towards and one away."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tiny
from keras import ops
from offline import nets

import keras_distill as kd
from keras_distill.offline.inherit_explore import Exploration, PartTranslator


def test_each_half_of_the_channels_has_its_own_translator():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 5)).astype("float32")
    for part, channels in ((0, slice(2, 5)), (1, slice(0, 2))):
        translator = PartTranslator(part, target_shape=(4, 4, 3))
        other = x.copy()
        other[..., channels] = 9.0  # the half that it does not see
        np.testing.assert_array_equal(translator(x), translator(other))
        assert not np.array_equal(translator(x), translator(x + 1))


def test_exploration_is_the_negative_of_factor_transfer():
    own, known = ops.convert_to_tensor([[3.0, 4.0]]), ops.convert_to_tensor([[1.0, 0]])
    value = float(kd.losses.FactorTransfer()(known, own))
    assert float(Exploration()(known, own)) == pytest.approx(-value)
    assert value == pytest.approx(0.6)


def test_pretraining_lowers_the_paraphrasers_error_and_freezes_it(teacher, digits):
    distiller = kd.InheritExplore(nets.net(3), teacher, features=("relu3", "relu3"))
    logs = distiller.pretrain(digits[0], epochs=3, batch_size=64, verbose=0).history
    assert logs["loss"][-1] < logs["loss"][0]
    frozen = tiny.values(distiller.paraphraser.weights)
    distiller.compile(keras.optimizers.Adam(0.01), nets.SPARSE, run_eagerly=True)
    tiny.history(distiller, *digits, batch_size=64)
    assert tiny.same(frozen, tiny.values(distiller.paraphraser.weights))


def test_a_paraphraser_may_be_given(teacher):
    paraphraser = kd.adapters.Paraphraser(rate=0.25)
    distiller = kd.InheritExplore(
        nets.net(3), teacher, features=("relu3", "relu3"), paraphraser=paraphraser
    )
    assert distiller.paraphraser is paraphraser
    with pytest.raises(TypeError, match="`paraphraser` must be"):
        kd.InheritExplore(
            nets.net(3),
            teacher,
            features=("relu3", "relu3"),
            paraphraser=keras.layers.Dense(2),
        )
