"""What all tests share."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Initial weights and dropout do not depend on which tests ran before."""
    keras.utils.set_random_seed(0)
