"""What a network takes and gives, without computing anything."""

from __future__ import annotations

from typing import Any

import keras
from keras.src.models.functional import Functional

from keras_distill.taps import call_model


def functional_of(layer: Any) -> Any:
    """The functional model behind a layer, None if it computes in another way."""
    call = getattr(type(layer), "call", None)
    if isinstance(layer, keras.Sequential) and call is keras.Sequential.call:
        return layer._functional
    if isinstance(layer, Functional) and call is Functional.call:
        return layer
    return None


def output_spec(model: keras.Layer, inputs: Any) -> Any:
    """Symbolic outputs of a built model; without running a functional one."""
    functional = functional_of(model)
    if functional is not None:
        return functional._outputs_struct
    return symbolic_run(lambda x: call_model(model, x, False), inputs)


def input_spec(model: keras.Layer) -> Any:
    """Symbolic inputs of a built model.

    Raises:
        ValueError: If the model was never built.
    """
    inputs = getattr(model, "_inputs_struct", None)
    if inputs is not None:  # functional, and sequential once built
        return keras.tree.map_structure(
            lambda t: keras.KerasTensor(t.shape, t.dtype, name=t.name), inputs
        )
    functional = getattr(model, "_functional", None)
    if functional is not None:
        return input_spec(functional)
    config = model.get_build_config() if model.built else None
    if not config:
        raise ValueError(
            f"The model {model.name!r} was never built: its input shape is unknown. "
            "Call it once on a batch of data, or give it an Input."
        )
    shape = config.get("input_shape")
    if shape is None:
        shapes = list(config["shapes_dict"].values())
        shape = shapes[0] if len(shapes) == 1 else shapes

    def tensor(shape: Any) -> Any:
        if isinstance(shape, dict):
            return {key: tensor(value) for key, value in shape.items()}
        if shape and isinstance(shape[0], (list, tuple)):
            return [tensor(item) for item in shape]
        return keras.KerasTensor((None, *shape[1:]), model.input_dtype)

    return tensor(shape)


class _Symbolic(keras.Operation):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.call = fn


def symbolic_run(fn: Any, *args: Any) -> Any:
    """What a function returns for symbolic tensors: shapes, without computing."""
    failed: list[Exception] = []

    def call(*args: Any) -> Any:
        try:
            return fn(*args)
        except Exception as error:
            failed.append(error)
            raise

    try:
        return _Symbolic(call).compute_output_spec(*args)
    except Exception:
        if failed:  # its own message: Keras would wrap it in one about itself
            raise failed[0] from None
        raise
