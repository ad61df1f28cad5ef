"""What makes a network the one it is, in every process."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import keras
import numpy as np
from keras import ops


def architecture(model: keras.Model) -> str:
    """A model's config, with what it is made of.

    Names are left out: Keras numbers them anew in every process.
    """
    return _text(model, _PASSING)


def fingerprint(model: keras.Model) -> str:
    """A hash of a model's config and weights.

    Neither what is trainable nor the states of random generators are part of it: a
    teacher uses neither, and Keras makes new states whenever it loads a model.
    """
    digest = hashlib.sha256(_text(model, (*_PASSING, "trainable")).encode())
    for variable in model.weights:
        value = np.asarray(ops.convert_to_numpy(variable.value))
        digest.update(f"{value.shape}{value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _text(model: keras.Model, left_out: tuple[str, ...]) -> str:
    return json.dumps(_without(_config(model), left_out), sort_keys=True)


def _config(model: keras.Model) -> Any:
    try:
        return keras.saving.serialize_keras_object(model)["config"]
    except (NotImplementedError, TypeError, ValueError):
        return type(model).__name__  # a subclassed model without get_config


# Numbered anew in every process, or only there while a file is being written.
_PASSING = (
    "name",
    "keras_history",
    "input_layers",
    "output_layers",
    "inbound_nodes",
    "shared_object_id",
)


def _without(config: Any, left_out: tuple[str, ...]) -> Any:
    if isinstance(config, dict):
        return {
            k: _without(v, left_out) for k, v in config.items() if k not in left_out
        }
    if isinstance(config, (list, tuple)):
        return [_without(item, left_out) for item in config]
    return config if isinstance(config, (str, int, float, bool)) else str(type(config))
