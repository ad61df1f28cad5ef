"""Copies of networks, and weights on their way between a network and its parts."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from keras_distill.specs import functional_of
from keras_distill.taps import children, find_layer


def configuration(model: keras.Layer) -> dict[str, Any]:
    """A model's configuration, without how it was compiled."""
    config = keras.saving.serialize_keras_object(model)
    config.pop("compile_config", None)
    return config


def clone(model: keras.Layer, name: str | None = None) -> Any:
    """A copy of a model that shares nothing with it, perhaps under another name."""
    config = configuration(model)
    if name is not None:
        config["config"]["name"] = name
    new = keras.saving.deserialize_keras_object(config)
    copy_weights(model, new)
    return new


def copy_weights(source: keras.Layer, target: keras.Layer) -> None:
    """Copies weights between a layer and its copy, in functional models by name."""
    if functional_of(source) is not None:
        named = {child.name: child for child in children(target)}
        for child in children(source):
            copy_weights(child, named[child.name])
        return
    for variable, own in zip(source.weights, target.weights, strict=True):
        own.assign(variable)


@dataclass(frozen=True)
class Origin:
    """What a model was before it was cut: enough to put it together again.

    Attributes:
        config: The model's configuration.
        names: For each part the layer's name by its path in the model.
    """

    config: dict[str, Any]
    names: list[dict[str, str]]

    @classmethod
    def of(cls, model: keras.Model, names: list[dict[str, str]]) -> Origin:
        """Remembers a model, whose parts have these names."""
        return cls(configuration(model), names)

    def to_json(self) -> str:
        """All of it as a text: inside a configuration Keras would rewrite it."""
        return json.dumps([self.config, self.names])

    @classmethod
    def from_json(cls, text: str) -> Origin:
        return cls(*json.loads(text))

    def assemble(self, parts: Sequence[keras.Model]) -> keras.Model:
        """The original model with the weights of parts."""
        # Keras takes the configuration apart while it reads it.
        model = keras.saving.deserialize_keras_object(copy.deepcopy(self.config))
        for part, names in zip(parts, self.names, strict=True):
            for path, name in names.items():
                copy_weights(part.get_layer(name), find_layer(model, path, "path"))
        return model

    def scatter(self, model: keras.Model, part: keras.Model, number: int) -> None:
        """Copies the original's weights into one of its parts."""
        for path, name in self.names[number].items():
            copy_weights(find_layer(model, path, "path"), part.get_layer(name))
