"""Schedules: values by epoch or step, without tracing anew."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd
from keras_distill.schedules import Schedule, StopTeacher, cosine, linear


class Watch(keras.callbacks.Callback):
    """Writes down a value at every step."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(round(float(self.read(self.model).numpy()), 5))


def counted(model, calls):
    """A model that also counts how often its graph is run."""

    def count(x):
        calls.append(len(x))
        return x

    inputs = keras.Input(model.input_shape[1:])
    x = keras.layers.Lambda(
        lambda x: tf.ensure_shape(tf.numpy_function(count, [x], x.dtype), x.shape),
        output_shape=model.input_shape[1:],
    )(inputs)
    return keras.Model(inputs, model(x))


@pytest.fixture
def distiller():
    made = kd.Distiller(tiny.mlp(4), tiny.teacher(), temperature=2.0)
    return tiny.compiled(made, run_eagerly=False)


def test_values_of_epochs_and_steps_without_retracing(distiller):
    x, y = tiny.data(24)
    traces = []
    step = distiller.train_step
    distiller.train_step = lambda data: traces.append(1) or step(data)
    temperature = Watch(lambda d: d.temperature)
    beta = Watch(lambda d: d.beta)
    distiller.fit(
        x,
        y,
        batch_size=12,
        epochs=3,
        verbose=0,
        callbacks=[
            Schedule("temperature", linear(8.0, 2.0, over=2)),
            Schedule(
                "beta",
                keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.5, 0.25]),
                every="step",
            ),
            temperature,
            beta,
        ],
    )
    assert temperature.values == [8.0, 8.0, 5.0, 5.0, 2.0, 2.0]
    assert beta.values == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert len(traces) == 1


class Killed(BaseException):
    """Ends a run where it stands: `fit` must not catch it."""


@pytest.mark.parametrize("learned", [False, True])
def test_a_killed_run_goes_on_with_the_values_it_would_have_had(learned, tmp_path):
    x, y = tiny.data(12)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)

    def run(path, kill_after=None):
        keras.utils.set_random_seed(0)
        temperature = kd.LearnedTemperature(initial=4.0, ramp_up=3) if learned else 2.0
        made = tiny.compiled(tiny.distiller(temperature=temperature))
        watch = Watch(lambda d: d.beta)
        callbacks = [Schedule("beta", lambda step: 1 / (1 + step), every="step"), watch]
        if not learned:
            callbacks.append(Schedule("temperature", linear(8.0, 2.0, over=2)))
        if kill_after is not None:

            def kill(batch, logs):
                if len(watch.values) == kill_after:
                    raise Killed

            callbacks.append(keras.callbacks.LambdaCallback(on_train_batch_end=kill))
        callbacks.append(kd.callbacks.Backup(path, save_freq=2))
        try:
            made.fit(data, epochs=3, verbose=0, shuffle=False, callbacks=callbacks)
        except Killed:
            assert kill_after is not None
        return made, watch.values

    whole, expected = run(tmp_path / "whole")
    run(tmp_path / "backup", kill_after=6)  # the last backup is two batches back
    resumed, values = run(tmp_path / "backup")
    assert values == expected[5:]
    assert resumed.temperature.numpy() == whole.temperature.numpy()
    assert tiny.same(tiny.values(resumed.weights), tiny.values(whole.weights))


def test_a_link_is_scheduled_by_its_name():
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    made = kd.Distiller(tiny.mlp(4), tiny.teacher(), links=[link])
    x, y = tiny.data(8)
    ramp = Schedule("hidden", kd.schedules.sigmoid_ramp_up(over=4, scale=2.0))
    tiny.compiled(made).fit(x, y, epochs=1, verbose=0, callbacks=[ramp])
    assert made.term_weights["hidden"].numpy() == pytest.approx(2 * np.exp(-5))


def test_the_teacher_stops():
    calls = []
    teacher = counted(tiny.teacher(), calls)
    made = kd.Distiller(tiny.mlp(4), teacher)
    tiny.compiled(made, run_eagerly=False)
    calls.clear()
    x, y = tiny.data(24)
    history = made.fit(
        x, y, batch_size=12, epochs=3, verbose=0, callbacks=[StopTeacher(1)]
    ).history
    assert len(calls) == 2
    assert len(history["loss"]) == 3
    assert len(history["soft_loss"]) == len(history["agreement"]) == 1


def test_there_must_be_a_teacher_to_stop():
    made = tiny.compiled(kd.BaseDistiller(tiny.mlp()))
    with pytest.raises(ValueError, match="needs a distiller with a teacher"):
        made.fit(*tiny.data(), verbose=0, callbacks=[StopTeacher(1)])


def test_presets_end_where_they_should():
    assert cosine(4.0, 1.0, over=3)(0) == 4.0
    assert cosine(4.0, 1.0, over=3)(3) == pytest.approx(1.0)
    assert linear(1.0, 3.0, over=2)(7) == 3.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Schedule("beta", 3.0), TypeError, "`values` must be a function"),
        (lambda: Schedule("beta", abs, every="week"), ValueError, "`every` must be"),
        (lambda: StopTeacher(-1), ValueError, "at least 0"),
        (lambda: linear(0.0, 1.0, over=0), ValueError, "at least 1"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_unknown_term_is_named_before_training(distiller):
    x, y = tiny.data(8)
    with pytest.raises(ValueError, match="no term 'hint' to schedule"):
        distiller.fit(x, y, verbose=0, callbacks=[Schedule("hint", abs)])
