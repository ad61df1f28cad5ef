"""A cheaper constant teacher: folded BatchNormalization, frozen graph.

At inference BatchNormalization is a scale and a shift per channel; where it directly
follows a convolution both can go into the convolution's kernel and bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np


def foldable(model: keras.Model) -> dict[str, str]:
    """Convolution to the BatchNormalization that alone reads its output, by name."""
    pairs = {}
    for layer in model.layers:
        if type(layer) is not keras.layers.Conv2D or len(layer._inbound_nodes) != 1:
            continue
        readers = [node.operation for node in layer._outbound_nodes]
        linear = layer.activation is keras.activations.linear
        is_output = any(layer.output is output for output in model.outputs)
        if linear and not is_output and len(readers) == 1:
            (reader,) = readers
            if type(reader) is keras.layers.BatchNormalization and reader.axis in (
                -1,
                len(layer.output.shape) - 1,
            ):
                pairs[layer.name] = reader.name
    return pairs


def fold_batch_normalization(model: keras.Model) -> keras.Model:
    """A copy of a functional model for inference, with what is foldable folded.

    Layers keep their names, so that links find the same taps; a BatchNormalization
    that went into its convolution becomes an identity. Only layers of the model itself
    are looked at, not those of models inside it.
    """
    pairs = foldable(model)
    folded = set(pairs.values())

    def clone(layer: Any) -> Any:
        if layer.name in folded:
            return keras.layers.Identity(name=layer.name)
        config = layer.get_config()
        if layer.name in pairs:
            config["use_bias"] = True
        return type(layer).from_config(config)

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.name in folded:
            kwargs.pop("mask", None)  # BatchNormalization has one, an identity not
        return layer(*args, **kwargs)

    copy = keras.models.clone_model(model, clone_function=clone, call_function=call)
    for layer in model.layers:
        if layer.name in folded or not layer.weights:
            continue
        weights = layer.get_weights()
        if layer.name in pairs:
            weights = _merged(layer, model.get_layer(pairs[layer.name]))
        copy.get_layer(layer.name).set_weights(weights)
    return copy


def _merged(conv: Any, norm: Any) -> list[np.ndarray]:
    values = {weight.name: np.float64(weight.numpy()) for weight in norm.weights}
    scale = values.get("gamma", 1.0) / np.sqrt(values["moving_variance"] + norm.epsilon)
    kernel, *bias = (np.float64(weight.numpy()) for weight in conv.weights)
    shift = (bias[0] if bias else 0.0) - values["moving_mean"]
    return [
        (kernel * scale).astype("float32"),
        (shift * scale + values.get("beta", 0.0)).astype("float32"),
    ]


def freeze(model: keras.Model, shape: tuple[int, ...]) -> Callable[[Any], Any]:
    """The model's inference graph with its weights as constants, as a function."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    function = tf.function(lambda x: model(x, training=False), autograph=False)
    concrete = function.get_concrete_function(tf.TensorSpec(shape, "float32"))
    frozen = convert_variables_to_constants_v2(concrete)
    return lambda x: frozen(x)[0]
