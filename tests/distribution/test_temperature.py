"""A learned temperature on two replicas of one process."""

from __future__ import annotations

import numpy as np
import tensorflow as tf
import tiny

import keras_distill as kd


def trained(temperature, data):
    distiller = kd.Distiller(tiny.mlp(), tiny.teacher(), temperature=temperature)
    for own, value in zip(
        distiller.student.weights, tiny.values(tiny.teacher(8).weights), strict=True
    ):
        own.assign(0.3 * value)
    tiny.compiled(distiller, run_eagerly=not tf.distribute.has_strategy())
    logs = distiller.fit(data, epochs=2, verbose=0).history
    return distiller, logs


def test_two_replicas_learn_the_temperature_of_one_device(strategy):
    x, y = tiny.data(26)  # the last batch has 10 rows
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    made = [kd.LearnedTemperature(initial=5.0, ramp_up=0) for _ in range(2)]
    one, expected = trained(made[0], data)
    with strategy.scope():
        two, found = trained(made[1], data)
    assert abs(one.temperature.numpy() - 5.0) > 1e-2
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)
    for variable, other in zip(two.variables, one.variables, strict=True):
        np.testing.assert_allclose(
            variable.numpy(), other.numpy(), rtol=1e-5, atol=1e-6
        )
