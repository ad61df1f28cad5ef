"""Dtype policies: mixed precision, half precision, double precision."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tiny

import keras_distill as kd

SCALED = keras.optimizers.LossScaleOptimizer


def distiller_of(dtype, **kwargs):
    link = kd.Link("hidden", "hidden", kd.losses.Hint(), adapter="auto")
    return tiny.distiller(tiny.mlp(dtype=dtype), links=[link], **kwargs)


@pytest.mark.parametrize(
    ("dtype", "run_eagerly"),
    [
        ("mixed_float16", True),
        ("mixed_float16", False),
        ("mixed_bfloat16", True),
        ("bfloat16", True),
    ],
)
def test_a_student_of_lower_precision_learns_from_a_float32_teacher(dtype, run_eagerly):
    x, y = tiny.data()
    distiller = distiller_of(dtype)
    # Not Adam: its 0.999 is 1 in bfloat16, so that it would not move at all.
    tiny.compiled(distiller, optimizer="sgd", run_eagerly=run_eagerly)
    assert isinstance(distiller.optimizer, SCALED) == (dtype == "mixed_float16")
    before = tiny.values(distiller.student.weights)
    logs = tiny.history(distiller, x, y, epochs=2)
    assert all(np.isfinite(values).all() for values in logs.values())
    assert not tiny.same(tiny.values(distiller.student.weights), before)
    assert distiller.temperature.dtype == "float32"


def test_the_scale_of_the_loss_does_not_show_in_logs_or_weights():
    x, y = tiny.data(8)
    keras.utils.set_random_seed(2)
    plain = tiny.compiled(tiny.distiller(tiny.mlp()), log_gradient_share=1)
    keras.utils.set_random_seed(2)
    scaled = tiny.distiller(tiny.mlp())
    optimizer = SCALED(keras.optimizers.SGD(0.1), initial_scale=1024.0)
    tiny.compiled(scaled, optimizer=optimizer, log_gradient_share=1)
    logs = [tiny.history(d, x, y) for d in (plain, scaled)]
    for name, value in logs[0].items():
        assert logs[1][name][0] == pytest.approx(value[0], rel=1e-5), name
    for a, b in zip(plain.student.weights, scaled.student.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-7)


def test_shares_of_gradients_that_float16_cannot_hold():
    student = tiny.mlp(dtype="mixed_float16")
    distiller = tiny.distiller(student, alpha=1e-7, beta=1e-7, temperature=1.0)
    tiny.compiled(distiller, log_gradient_share=1)
    logs = tiny.history(distiller, *tiny.data(8))
    assert 0.01 < logs["soft_gradient_share"][0] < 0.99


def test_shares_leave_out_a_batch_whose_scale_was_too_large():
    student = tiny.mlp(dtype="mixed_float16")
    optimizer = SCALED(keras.optimizers.SGD(0.1), initial_scale=1e30)
    distiller = tiny.distiller(student)
    tiny.compiled(distiller, optimizer=optimizer, log_gradient_share=1)
    logs = tiny.history(distiller, *tiny.data(8))
    assert "soft_gradient_share" not in logs


def test_a_pure_float16_student_is_scaled():
    distiller = distiller_of("float16")
    tiny.compiled(distiller)
    assert isinstance(distiller.optimizer, SCALED)
    logs = tiny.history(distiller, *tiny.data(8))
    assert np.isfinite(logs["loss"][0])


def test_only_an_adapter_in_float16_is_enough():
    adapter = keras.layers.Dense(12, dtype="mixed_float16")
    link = kd.Link("hidden", "hidden", kd.losses.Hint(), adapter=adapter)
    distiller = tiny.compiled(tiny.distiller(links=[link]))
    assert isinstance(distiller.optimizer, SCALED)


def test_scaling_can_be_switched_off_and_is_not_done_twice():
    distiller = distiller_of("mixed_float16")
    tiny.compiled(distiller, auto_scale_loss=False)
    assert not isinstance(distiller.optimizer, SCALED)
    tiny.compiled(distiller, optimizer=SCALED(keras.optimizers.SGD(0.1)))
    assert not isinstance(distiller.optimizer.inner_optimizer, SCALED)


def test_a_reloaded_student_of_mixed_precision_is_scaled_too(tmp_path):
    x, y = tiny.data()
    tiny.mlp(dtype="mixed_float16").save(tmp_path / "s.keras")
    student = keras.saving.load_model(tmp_path / "s.keras")
    distiller = tiny.compiled(tiny.distiller(student))
    assert isinstance(distiller.optimizer, SCALED)
    tiny.history(distiller, x, y)
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    assert isinstance(loaded.optimizer, SCALED)
    assert not isinstance(loaded.optimizer.inner_optimizer, SCALED)
    loaded.teacher = distiller.teacher
    logs = [tiny.history(d, x, y) for d in (distiller, loaded)]
    assert logs[0] == logs[1]


def test_a_teacher_of_lower_precision():
    x, y = tiny.data()
    teacher = tiny.mlp(12, dtype="mixed_float16")
    distiller = tiny.compiled(tiny.distiller(known=teacher))
    assert not isinstance(distiller.optimizer, SCALED)
    expected = float(kd.losses.SoftTarget(4.0)(teacher(x), distiller.student(x)))
    logs = tiny.history(distiller, x, y)
    assert logs["soft_loss"][0] == pytest.approx(expected, rel=1e-3)


def test_many_classes_keep_their_labels_in_low_precision():
    # float16 has no 2049 and bfloat16 no 257: a cast would train on another class.
    classes = 2100
    inputs = keras.Input((4,))
    student, teacher = (
        keras.Model(inputs, keras.layers.Dense(classes, dtype=dtype)(inputs))
        for dtype in ("mixed_bfloat16", "float32")
    )
    x = np.random.default_rng(0).normal(size=(2, 4)).astype("float32")
    y = np.array([257, 2049], "int32")
    distiller = kd.Distiller(student, teacher, soft_loss=kd.losses.DecoupledKD())
    tiny.compiled(distiller)
    expected = float(kd.losses.DecoupledKD()([teacher(x), y], student(x)))
    logs = tiny.history(distiller, x, y)
    assert logs["soft_loss"][0] == pytest.approx(expected, rel=1e-3)


def test_large_logits_in_float16_stay_finite():
    x, y = tiny.data(8)
    student = tiny.mlp(dtype="mixed_float16")
    student.layers[-1].bias.assign([1e4, -1e4, 0.0])
    distiller = tiny.compiled(tiny.distiller(student))
    logs = tiny.history(distiller, x, y)
    assert all(np.isfinite(values).all() for values in logs.values())


def test_the_student_casts_its_inputs_itself():
    """Under a policy of 16 bits a functional model does not, and so a distiller."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        inputs = keras.Input((tiny.FEATURES,))
        x = keras.layers.Rescaling(1e-5, dtype="float32")(inputs)
        student = keras.Model(inputs, keras.layers.Dense(tiny.CLASSES)(x))
        distiller = kd.BaseDistiller(student)
    finally:
        keras.config.set_dtype_policy("float32")
    x = np.full((2, tiny.FEATURES), 1e5, "float32")  # more than float16 holds
    found = distiller.predict(x, verbose=0)
    np.testing.assert_array_equal(found, student.predict(x, verbose=0))
    assert np.isfinite(found).all()


def test_policies_and_shares_in_64_bits():
    student, teacher = (tiny.mlp(dtype="float64") for _ in range(2))
    link = kd.Link("hidden", "hidden", "mse")
    distiller = kd.Distiller(student, teacher, links=[link])
    options = {"gradient_policy": kd.ClipToMain(), "log_gradient_share": 1}
    tiny.compiled(distiller, run_eagerly=False, **options)
    logs = tiny.history(distiller, *tiny.data())
    assert 0 < logs["soft_gradient_share"][0] < 1
