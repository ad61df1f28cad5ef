"""A teacher that knows digits."""

from __future__ import annotations

import keras
import pytest
from offline import nets

import keras_distill as kd


@pytest.fixture(scope="session")
def digits():
    """256 digits and their labels."""
    data = kd.datasets.load("digits")
    x, y = data.train
    return x[:256], y[:256]


@pytest.fixture(scope="session")
def teacher(digits):
    """A network trained on them. It is the same in all tests, and is never changed."""
    keras.utils.set_random_seed(1)
    model = nets.net(6, name="teacher")
    model.compile(keras.optimizers.Adam(0.01), nets.SPARSE)
    model.fit(*digits, batch_size=32, epochs=6, verbose=0)
    return model
