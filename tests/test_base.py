"""BaseDistiller: a subclass of one's own by the one hook."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tiny
from keras import ops

import keras_distill as kd


@keras.saving.register_keras_serializable(package="tests")
class Confident(kd.BaseDistiller):
    """Adds the entropy of the outputs, and watches the largest probability."""

    def __init__(self, student, *, weight=0.5, **kwargs):
        super().__init__(student, **kwargs)
        self.add_term("entropy", weight=weight)
        self.add_log("confidence")

    def compute_terms(self, x, y, sample_weight, training):
        outputs = self.run_student(x, training)
        log_p = ops.log_softmax(outputs)
        entropy = -ops.sum(ops.exp(log_p) * log_p, -1)
        self.log_metric("confidence", ops.exp(ops.max(log_p, -1)), sample_weight)
        return outputs, {"entropy": self.mean(entropy, sample_weight)}

    def get_config(self):
        weight = float(self.term_weights["entropy"].numpy())
        return super().get_config() | {"weight": weight}


def probabilities(student, x):
    return np.asarray(ops.softmax(student(x)), "float64")


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_a_subclass_adds_a_term_and_a_log(run_eagerly):
    x, y = tiny.data(10)
    weight = np.linspace(0, 2, 10).astype("float32")
    distiller = Confident(tiny.mlp(), alpha=0.5, weight=0.25)
    optimizer = keras.optimizers.SGD(0.0)
    tiny.compiled(distiller, optimizer=optimizer, run_eagerly=run_eagerly)
    p = probabilities(distiller.student, x)
    entropy = -(p * np.log(p)).sum(-1)
    logs = tiny.history(distiller, x, y, validation_data=(x, y), batch_size=4)
    assert logs["entropy_loss"][0] == pytest.approx(entropy.mean(), rel=1e-5)
    assert logs["confidence"][0] == pytest.approx(p.max(-1).mean(), rel=1e-5)
    hard = logs["hard_loss"][0]
    total = 0.5 * hard + 0.25 * entropy.mean()
    assert logs["loss"][0] == pytest.approx(total, rel=1e-5)
    # In evaluation the compiled loss counts with weight 1; the term keeps its weight.
    assert logs["val_entropy_loss"][0] == pytest.approx(entropy.mean(), rel=1e-5)
    total = hard + 0.25 * entropy.mean()
    assert logs["val_loss"][0] == pytest.approx(total, rel=1e-5)
    weighted = tiny.history(distiller, x, y, sample_weight=weight)
    expected = (entropy * weight).mean()
    assert weighted["entropy_loss"][0] == pytest.approx(expected, rel=1e-5)
    expected = (p.max(-1) * weight).sum() / weight.sum()
    assert weighted["confidence"][0] == pytest.approx(expected, rel=1e-5)


def test_a_subclass_saves_and_goes_on(tmp_path):
    x, y = tiny.data(8)
    distiller = tiny.compiled(Confident(tiny.mlp(), alpha=0.3), optimizer="adam")
    tiny.history(distiller, x, y)
    distiller.term_weights["entropy"] = 0.125
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    assert isinstance(loaded, Confident)
    assert loaded.alpha.numpy() == pytest.approx(0.3)
    logs = [tiny.history(d, x, y) for d in (distiller, loaded)]
    assert logs[0] == logs[1]
    assert tiny.same(tiny.values(loaded.weights), tiny.values(distiller.weights))


def test_the_plain_base_is_the_compiled_loss():
    x, y = tiny.data(8)
    distiller = tiny.compiled(kd.BaseDistiller(tiny.mlp()))
    plain = keras.models.clone_model(distiller.student)
    plain.set_weights(distiller.student.get_weights())
    plain.compile(keras.optimizers.SGD(0.1), tiny.SPARSE, run_eagerly=True)
    logs = tiny.history(distiller, x, y)
    expected = plain.fit(x, y, verbose=0, shuffle=False).history
    assert logs["loss"] == pytest.approx(expected["loss"])
    for a, b in zip(distiller.student.weights, plain.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-6)


def test_without_alpha_the_terms_replace_the_compiled_loss():
    x, y = tiny.data(8)

    class Own(kd.BaseDistiller):
        def __init__(self, student):
            super().__init__(student, alpha=None)
            self.add_term("square", 2.0)

        def compute_terms(self, x, y, sample_weight, training):
            outputs = self.run_student(x, training)
            square = ops.mean(outputs**2, -1)
            return outputs, {"square": self.mean(square, sample_weight)}

    distiller = tiny.compiled(Own(tiny.mlp()), metrics=["accuracy"])
    assert list(distiller.term_weights) == ["square"]
    with pytest.raises(AttributeError, match="has no `alpha`"):
        distiller.alpha.numpy()
    logs = {k: v[0] for k, v in tiny.history(distiller, x, y).items()}
    assert logs["loss"] == pytest.approx(2 * logs["square_loss"], rel=1e-5)
    assert {"hard_loss", "accuracy"} <= set(logs)  # still watched


def test_features_are_read_by_run_student():
    x, y = tiny.data(8)
    seen = []

    class Reading(kd.BaseDistiller):
        def compute_terms(self, x, y, sample_weight, training):
            outputs, features = self.run_student(x, training, taps=["hidden"])
            seen.append(features["hidden"].shape)
            return outputs, {}

    tiny.history(tiny.compiled(Reading(tiny.mlp())), x, y)
    assert seen[-1] == (8, 8)


def test_the_epoch_is_a_variable():
    epochs = []

    class Late(Confident):
        def compute_terms(self, x, y, sample_weight, training):
            epochs.append(float(self._epoch.numpy()))
            return super().compute_terms(x, y, sample_weight, training)

    x, y = tiny.data(8)
    tiny.history(tiny.compiled(Late(tiny.mlp())), x, y, epochs=3, batch_size=8)
    assert epochs[-3:] == [0.0, 1.0, 2.0]
