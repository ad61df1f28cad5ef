"""Several models as one: the mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill.heads import (
    Head,
    example_rows,
    find_heads,
    output_names,
    with_mask_of,
)
from keras_distill.losses.base import PACKAGE
from keras_distill.specs import input_spec, output_spec
from keras_distill.taps import call_model


@keras.saving.register_keras_serializable(package=PACKAGE)
class AveragedModels(keras.Model):
    r"""A model that answers with the mean of several models' probabilities.

    With logits `z_m` of M models the mean is `p = (1 / M) Σ_m softmax(z_m)`. Models
    with logits get `log p`, which a loss with `from_logits=True` takes as it is; models
    with a softmax or sigmoid get `p`. One unit stands for two classes: its logit is
    `log p_1 - log p_0`. The models are not copied.

    Args:
        models: Built Keras models with the same inputs and outputs.
        name: Name of the model.

    Call arguments:
        inputs: What each of the models takes.
        training: Passed on to each of them.

    Raises:
        TypeError: If an item is not a Keras model.
        ValueError: If there are no models, one was never built, or their outputs
            differ in shape or in being logits.

    Example:

    >>> import keras
    >>> from keras_distill.averaging import AveragedModels
    >>> def net():
    ...     return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> AveragedModels([net(), net()]).output_shape
    (None, 3)
    """

    def __init__(self, models: Sequence[keras.Model], name: str | None = None) -> None:
        if not models:
            raise ValueError("`models` must hold at least one model. Received none.")
        for model in models:
            if not isinstance(model, keras.Model):
                raise TypeError(f"`models` must hold keras.Models. Received: {model!r}")
        super().__init__(name=name, dtype="float32")
        self.models = list(models)
        self._heads = [_heads(model) for model in models]
        first = self._heads[0]
        for index, heads in enumerate(self._heads[1:], 1):
            if [h.shape for h in heads] != [h.shape for h in first]:
                raise ValueError(
                    "The models must have the same outputs and classes. Model 0 has "
                    f"outputs of shape {[h.shape for h in first]}, model {index} of "
                    f"{[h.shape for h in heads]}."
                )
            if [_is_logits(h) for h in heads] != [_is_logits(h) for h in first]:
                raise ValueError(
                    "The models must all give logits or all give probabilities. Model "
                    f"0 gives {first[0].kind}, model {index} {heads[0].kind}."
                )
        # What a functional model has too: it makes this one's inputs known.
        self._inputs_struct = input_spec(models[0])
        self._names = output_names(models[0], keras.tree.flatten(self._symbolic()))
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        outputs = [call_model(model, inputs, bool(training)) for model in self.models]
        return self.combine(outputs)

    def combine(self, outputs: Sequence[Any]) -> Any:
        """The mean of outputs that the models have given, one after the other."""
        flat = [keras.tree.flatten(output) for output in outputs]
        combined = [
            _mean(heads, values)
            for heads, values in zip(
                zip(*self._heads, strict=True), zip(*flat, strict=True), strict=True
            )
        ]
        return keras.tree.pack_sequence_as(outputs[0], combined)

    def logits(self, outputs: Sequence[Any]) -> list[list[Any]]:
        """Per model the logits of each of its outputs, for given outputs."""
        return [
            [h.logits(o) for h, o in zip(heads, keras.tree.flatten(own), strict=True)]
            for heads, own in zip(self._heads, outputs, strict=True)
        ]

    @property
    def output_names(self) -> list[str]:
        """The first model's."""
        return self._names

    @property
    def output_shape(self) -> Any:
        """Shapes of the outputs, in the models' structure."""
        return keras.tree.map_structure(lambda t: tuple(t.shape), self._symbolic())

    def _symbolic(self) -> Any:
        return output_spec(self.models[0], self._inputs_struct)

    def get_config(self) -> dict[str, Any]:
        models = [keras.saving.serialize_keras_object(model) for model in self.models]
        return {"models": models, "name": self.name}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> AveragedModels:
        models = [
            keras.saving.deserialize_keras_object(model, custom_objects=custom_objects)
            for model in config["models"]
        ]
        return cls(models, name=config["name"])


def _heads(model: keras.Model) -> list[Head]:
    spec = input_spec(model)
    return find_heads(
        model,
        output_spec(model, spec),
        None,
        "a softmax as the last layer",
        lambda: call_model(model, example_rows(spec), False),
    )


def _is_logits(head: Head) -> bool:
    return head.kind == "logits"


def _mean(heads: Sequence[Head], outputs: Sequence[Any]) -> Any:
    """The mean of one output of every model, in the form of that output."""
    log_p = [
        ops.log_softmax(ops.cast(head.logits(output), "float32"))
        for head, output in zip(heads, outputs, strict=True)
    ]
    mean = ops.logsumexp(ops.stack(log_p), 0) - math.log(len(log_p))
    single = outputs[0].shape[-1] == 1
    logits = mean[..., 1:] - mean[..., :1] if single else mean
    if _is_logits(heads[0]):
        return with_mask_of(outputs[0], logits)
    p = ops.sigmoid(logits) if single else ops.exp(mean)
    p._keras_logits = logits  # losses take these instead of the logarithm of p
    return with_mask_of(outputs[0], p)
