"""A generalist and specialists teach replicas what they teach one device."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
import tiny

import keras_distill as kd


def test_replicas_learn_from_specialists_as_one_device_does(strategy):
    x, y = tiny.data(24)
    models = [tiny.linear(), tiny.linear()]
    teacher = kd.teachers.Specialists(tiny.teacher(), models, [[0, 1], [1, 2]], top=2)
    start = tiny.linear().get_weights()
    results = []
    for scope in (contextlib.nullcontext(), strategy.scope()):
        with scope:
            student = tiny.linear()
            student.set_weights(start)
            distiller = tiny.distiller(student, teacher)
            optimizer = keras.optimizers.SGD(0.1)
            tiny.compiled(distiller, optimizer=optimizer, run_eagerly=False)
        logs = tiny.history(distiller, x, y, batch_size=10)
        results.append((logs["soft_loss"][0], student.get_weights()))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-5)
    for one, two in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)
