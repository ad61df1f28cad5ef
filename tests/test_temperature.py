"""LearnedTemperature: its gradient, its curriculum, and its life in a distiller."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd


def made(soft_loss="auto", known=None, **arguments):
    arguments = {"initial": 4.0, "ramp_up": 0} | arguments
    temperature = kd.LearnedTemperature(**arguments)
    if soft_loss == "auto":
        return tiny.distiller(known=known, temperature=temperature)
    return tiny.distiller(known=known, soft_loss=soft_loss(temperature=temperature))


def soft_value(teacher, student, position, low, high):
    """T² KL at the temperature that `position` stands for, in float64."""
    t = low + (high - low) / (1 + np.exp(-position))

    def log_softmax(z):
        z = np.asarray(z, "float64") / t
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(teacher), log_softmax(student)
    return t**2 * np.sum(np.exp(log_p) * (log_p - log_q), -1).mean()


def test_a_step_climbs_by_the_slope_of_the_soft_loss():
    x, y = tiny.data(16)
    distiller = made(low=2.0, high=9.0, initial=3.0, strength=0.5)
    logits = distiller.teacher.model(x), distiller.student(x)
    before = float(distiller.temperature.position.numpy())
    numbered = tiny.distiller(keras.models.clone_model(distiller.student), None)
    numbered.student.set_weights(distiller.student.get_weights())
    numbered.temperature = distiller.temperature.numpy()
    for each in (distiller, numbered):
        tiny.compiled(each, optimizer=keras.optimizers.SGD(0.2))
        logs = tiny.history(each, x, y, batch_size=16)

    ends = [
        soft_value(*logits, before + step, low=2.0, high=9.0) for step in (1e-5, -1e-5)
    ]
    slope = (ends[0] - ends[1]) / 2e-5
    assert abs(slope) > 1e-2
    after = float(distiller.temperature.position.numpy())
    assert after - before == pytest.approx(0.2 * 0.9 * 0.5 * slope, rel=1e-3)
    # The student descends as at a temperature that is a number.
    value = soft_value(*logits, before, low=2.0, high=9.0)
    assert logs["soft_loss"][0] == pytest.approx(value, rel=1e-5)
    for own, other in zip(
        distiller.student.weights, numbered.student.weights, strict=True
    ):
        np.testing.assert_allclose(own.numpy(), other.numpy(), rtol=1e-5, atol=1e-7)


def test_the_start_and_the_range_are_those_of_the_released_code():
    distiller = tiny.distiller(temperature=kd.LearnedTemperature())
    expected = 1 + 20 / (1 + np.exp(-1.0))
    assert distiller.temperature.numpy() == pytest.approx(expected)
    for position, end in ((60.0, 21.0), (-60.0, 1.0)):
        distiller.temperature.position.assign(position)
        assert distiller.temperature.numpy() == pytest.approx(end)


@pytest.mark.parametrize(("ramp_up", "epoch"), [(10, 0), (10, 4), (10, 9), (4, 7)])
def test_the_strength_follows_half_a_cosine(ramp_up, epoch):
    layer = kd.LearnedTemperature(strength=2.0, ramp_up=ramp_up)
    # The paper's: from 0 to the highest, epochs counted from 1.
    part = min(epoch + 1, ramp_up) / ramp_up
    paper = 0.0 + 0.5 * (2.0 - 0.0) * (1 + np.cos((1 + part) * np.pi))
    assert layer.strength_in(epoch) == pytest.approx(paper)


def test_epochs_set_the_strength_and_nothing_is_traced_anew():
    x, y = tiny.data(8)
    distiller = made(ramp_up=4)
    tiny.compiled(distiller, run_eagerly=False)
    traces, seen, temperatures = [], [], []
    step = distiller.train_step
    distiller.train_step = lambda data: traces.append(1) or step(data)

    def look(epoch, logs):
        seen.append(float(distiller.temperature.reversal.numpy()))
        temperatures.append(float(distiller.temperature.numpy()))

    watch = keras.callbacks.LambdaCallback(on_epoch_end=look)
    before = float(distiller.temperature.numpy())
    logs = tiny.history(
        distiller, x, y, batch_size=8, epochs=5, initial_epoch=1, callbacks=[watch]
    )
    assert seen == pytest.approx([0.5, 0.5 + np.sqrt(0.125), 1.0, 1.0])
    assert len(traces) == 1
    # One step an epoch: the log is the temperature of that step, before its update.
    assert logs["temperature"] == pytest.approx([before, *temperatures[:-1]])
    assert len(set(logs["temperature"])) == 4


def test_the_teacher_is_asked_at_the_live_temperature():
    class Noting(kd.teachers.Model):
        def __call__(self, x, taps, temperature):
            asked.append(float(temperature))
            return super().__call__(x, taps, temperature)

    asked = []
    x, y = tiny.data(16)
    distiller = made(known=Noting(tiny.teacher()), initial=7.0)
    logs = tiny.history(tiny.compiled(distiller), x, y, batch_size=8)
    assert asked[0] == pytest.approx(7.0, rel=1e-6)
    assert asked[1] != asked[0]
    assert logs["temperature"][0] == pytest.approx(np.mean(asked), rel=1e-6)


@pytest.mark.parametrize("soft_loss", ["auto", kd.losses.DecoupledKD])
def test_saved_and_loaded_it_goes_on(soft_loss, tmp_path):
    x, y = tiny.data()
    distiller = made(soft_loss, ramp_up=3, strength=0.5, low=2.0)
    tiny.compiled(distiller, optimizer=keras.optimizers.Adam(0.1))
    tiny.history(distiller, x, y, batch_size=12)
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    assert loaded.temperature.get_config() == distiller.temperature.get_config()
    assert loaded.soft_loss.temperature is loaded.temperature
    assert loaded.temperature.numpy() == distiller.temperature.numpy()
    loaded.teacher = distiller.teacher.model
    logs = [
        tiny.history(d, x, y, batch_size=12, epochs=2, initial_epoch=1)
        for d in (distiller, loaded)
    ]
    assert logs[0] == logs[1]
    assert tiny.same(tiny.values(loaded.weights), tiny.values(distiller.weights))
    assert len(loaded.trainable_variables) == 5


def test_a_checkpoint_restores_it(tmp_path):
    x, y = tiny.data()
    distiller = tiny.compiled(made())
    before = distiller.temperature.numpy()
    distiller.save_weights(tmp_path / "d.weights.h5")
    tiny.history(distiller, x, y)
    assert distiller.temperature.numpy() != before
    distiller.load_weights(tmp_path / "d.weights.h5")
    assert distiller.temperature.numpy() == before


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("mixed_float16", {}), ("mixed_bfloat16", {}), ("float32", {"jit_compile": True})],
)
def test_precision_and_xla(dtype, options):
    x, y = tiny.data()
    keras.config.set_dtype_policy(dtype)
    try:
        distiller = tiny.distiller(
            tiny.mlp(), temperature=kd.LearnedTemperature(initial=4.0, ramp_up=0)
        )
    finally:
        keras.config.set_dtype_policy("float32")
    before = distiller.temperature.numpy()
    tiny.compiled(distiller, run_eagerly=not options, log_gradient_share=1, **options)
    logs = tiny.history(distiller, x, y, batch_size=12)
    assert all(np.isfinite(values).all() for values in logs.values())
    assert distiller.temperature.position.dtype == "float32"
    assert 0 < abs(distiller.temperature.numpy() - before) < 1


def test_it_can_be_neither_set_nor_scheduled():
    distiller = tiny.compiled(made())
    with pytest.raises(ValueError, match="The temperature is learned"):
        distiller.temperature = 2.0
    schedule = kd.schedules.Schedule("temperature", lambda epoch: 2.0)
    steps = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: steps.append(batch)
    )
    with pytest.raises(ValueError, match="neither set nor scheduled"):
        tiny.history(distiller, *tiny.data(), callbacks=[schedule, note])
    assert not steps


def test_other_weights_are_scheduled_as_ever():
    x, y = tiny.data(8)
    distiller = tiny.compiled(made())
    before = distiller.temperature.numpy()
    stop = kd.schedules.StopTeacher(0)
    logs = tiny.history(distiller, x, y, callbacks=[stop])
    assert distiller.temperature.numpy() == before
    assert "soft_loss" not in logs


@pytest.mark.parametrize(
    "make",
    [
        lambda t: kd.MutualLearning([tiny.mlp(), tiny.mlp(4)], temperature=t),
        lambda t: kd.TeacherFree(tiny.mlp(), kd.losses.VirtualTeacher(temperature=t)),
        lambda t: tiny.distiller(
            links=[kd.Link("logits", "logits", kd.losses.SoftTarget(t), name="link")]
        ),
    ],
)
def test_elsewhere_it_is_refused(make):
    with pytest.raises(ValueError, match=r"is trained by kd\.Distiller"):
        make(kd.LearnedTemperature())


def test_a_search_does_not_overwrite_it():
    with pytest.raises(ValueError, match="LearnedTemperature cannot be searched"):
        kd.tuning.DistillationHyperModel(
            tiny.mlp,
            tiny.teacher(),
            soft_loss=kd.losses.SoftTarget(kd.LearnedTemperature()),
            optimizer="sgd",
            loss=tiny.SPARSE,
        )


def test_a_cache_of_some_temperatures_is_refused(tmp_path):
    x, y = tiny.data()
    rows = tf.data.Dataset.from_tensor_slices((x, y))
    cache = kd.teachers.Cache.build(
        tiny.teacher(), rows, tmp_path / "cache", top_k=2, temperatures=[4.0]
    )
    with pytest.raises(ValueError, match=r"`temperature` must be one of \[4\.0\]"):
        made(known=cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0.0}, "`low` must be above 0"),
        ({"low": 4.0, "high": 4.0}, "`high` must be above `low`"),
        ({"initial": 30.0}, "`initial` must be between 1.0 and 21.0"),
        ({"strength": 0.0}, "`strength` must be above 0"),
        ({"ramp_up": -1}, "`ramp_up` must be finite and at least 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        kd.LearnedTemperature(**arguments)


def test_its_repr_is_one_line():
    distiller = made()
    assert repr(distiller.soft_loss).startswith(
        "SoftTarget(temperature=LearnedTemperature(1.0, 21.0, initial=4.0, "
    )
