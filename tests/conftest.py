"""What all tests share."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The models are tiny: two processes with one thread each are faster than with two.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is compiled here runs a few times: compile in a hurry.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

import keras
import pytest
import tensorflow as tf
from tensorflow.python import pywrap_tfe
from tensorflow.python.framework import ops

collect_ignore = ["tuning_workers.py"]  # a script

# Two replicas on one CPU, for tests/distribution: this must come before all else.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
# Every new seed makes TensorFlow forget the kernels of all operations, so that each
# test would make them anew: a quarter of its time. Keras's random numbers have seeds
# of their own, which do not need that.
pywrap_tfe.TFE_ContextClearCaches = lambda context: None


@pytest.fixture(autouse=True, scope="module")
def _frozen_garbage():
    """What outlives a module is not looked through at every collection after it.

    Little does, but TensorFlow would keep the graph of every step: the sum over the
    replicas in it has a gradient of its own, and these it never forgets.
    """
    gc.freeze()
    yield
    gradients = ops.gradient_registry._registry
    for name in [name for name in gradients if name.startswith("CustomGradient-")]:
        del gradients[name]
    gc.collect()


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Initial weights and dropout do not depend on which tests ran before."""
    keras.utils.set_random_seed(0)
