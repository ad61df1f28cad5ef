"""One strategy for all tests: a process must not have several."""

from __future__ import annotations

import pytest
import tensorflow as tf


@pytest.fixture(scope="session")
def strategy():
    """Two replicas on two logical devices of the CPU."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
