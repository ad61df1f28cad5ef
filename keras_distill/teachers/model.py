"""A Keras model as teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill.heads import Head, example_rows, find_heads, output_names
from keras_distill.identity import fingerprint
from keras_distill.inputs import plain_inputs, select_inputs
from keras_distill.specs import input_spec, output_spec, symbolic_run
from keras_distill.taps import call_model, paths_of, run_with_taps
from keras_distill.teachers.base import Teacher


class Model(Teacher):
    """A Keras model as teacher, with more to say about it.

    It runs with `training=False` and is not changed: not its weights, not its
    statistics, not its `trainable`.

    Args:
        model: Any built Keras model.
        inputs: What of `x` it sees: a key, a list of keys, a function, None for all.
        from_logits: Whether its outputs are logits. None finds out.
        dtype: Lower precision to run in, such as `"bfloat16"`: casts a copy. Only for
            functional and sequential models.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If it was never built, or cannot be copied for `dtype`.

    Example:

    ```python
    teacher = kd.teachers.Model(big, inputs="image_large", from_logits=True)
    distiller = kd.Distiller(student, teacher, student_inputs="image_small")
    ```
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        inputs: Any = None,
        from_logits: bool | None = None,
        dtype: Any = None,
    ) -> None:
        if not isinstance(model, keras.Model):
            raise TypeError(f"A teacher must be a keras.Model. Received: {model!r}")
        self.spec = input_spec(model)
        self.model = model if dtype is None else _in_precision(model, dtype)
        self.inputs = inputs
        self.from_logits = from_logits
        self.dtype = dtype
        self.outputs = output_spec(model, self.spec)
        self.names = output_names(model, self.outputs)

    def __call__(
        self, x: Any, taps: Sequence[str], temperature: Any
    ) -> tuple[Any, dict[str, Any]]:
        x = select_inputs(plain_inputs(x), self.inputs)
        if not taps:
            return call_model(self.model, x, False), {}
        return run_with_taps(self.model, x, taps, False)

    def fingerprint(self) -> str:
        own = fingerprint(self.model)
        if self.inputs is None and self.from_logits is None:
            return own
        read = self.inputs
        if callable(read):
            read = f"{read.__module__}.{read.__qualname__}"
        return hashlib.sha256(f"{own} {read!r} {self.from_logits}".encode()).hexdigest()

    def resolve(self, layer: Any) -> Any:
        return paths_of(self.model, layer, "teacher_layer")

    def tap_specs(self, taps: Sequence[str]) -> dict[str, Any]:
        return symbolic_run(
            lambda x: run_with_taps(self.model, x, taps, False)[1], self.spec
        )

    def heads(self) -> list[Head]:
        return find_heads(
            self.model,
            self.outputs,
            self.from_logits,
            "kd.teachers.Model(model, from_logits=...)",
            lambda: call_model(self.model, example_rows(self.spec), False),
        )

    @property
    def variables(self) -> list[Any]:
        return self.model.variables

    def __repr__(self) -> str:
        return f"teachers.Model({self.model.name!r})"


def _in_precision(model: keras.Model, dtype: Any) -> keras.Model:
    """A copy of a functional or sequential model that computes in another dtype."""
    policy = keras.dtype_policies.get(dtype)
    for layer in model._flatten_layers(include_self=True):
        is_graph = (
            getattr(layer, "_functional", None) is not None
            or hasattr(layer, "_inputs_struct")
            or not isinstance(layer, keras.Model)
        )
        if not is_graph:
            raise ValueError(
                f"`dtype` needs a functional or sequential teacher: {layer.name!r} "
                "is a subclassed model, which cannot be copied."
            )
    config = _with_dtype(keras.saving.serialize_keras_object(model), policy)
    copy = keras.saving.deserialize_keras_object(config)
    for source, target in zip(model.variables, copy.variables, strict=True):
        target.assign(ops.cast(source.value, target.dtype))
    return copy


def _with_dtype(config: Any, policy: Any) -> Any:
    """A model's config with another policy in every layer; tensors keep their dtype."""
    if isinstance(config, dict):
        changed = {key: _with_dtype(value, policy) for key, value in config.items()}
        if isinstance(config.get("dtype"), dict):  # a layer's; a tensor's is a string
            changed["dtype"] = keras.saving.serialize_keras_object(policy)
        return changed
    if isinstance(config, (list, tuple)):
        return type(config)(_with_dtype(item, policy) for item in config)
    return config
