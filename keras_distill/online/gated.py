"""A gated ensemble of branches on a shared stem, as a Keras model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill.copies import clone
from keras_distill.heads import Head, example_rows, find_heads
from keras_distill.losses.base import PACKAGE
from keras_distill.specs import input_spec, output_spec, symbolic_run
from keras_distill.taps import call_model


@keras.saving.register_keras_serializable(package=PACKAGE)
class GatedEnsemble(keras.Model):
    r"""Branches on one stem, mixed by a gate.

    With branch logits `z_i` and gate weights `g_i` of a row the output is
    `Σ_i g_i z_i`, behind a softmax (one unit: a sigmoid) if the branches end in one.

    Args:
        stem: The shared part, a built model with one output.
        branches: Models that take the stem's output, with equal outputs.
        gate: Layer from the stem's output `(B, ...)` to weights `(B, branches)`; None
            for the paper's.
        name: Name of the model.

    Raises:
        TypeError: If a part is not of its kind.
        ValueError: If there is no branch, or shapes do not fit.
    """

    def __init__(
        self,
        stem: keras.Model,
        branches: Sequence[keras.Model],
        gate: keras.Layer | None = None,
        name: str | None = None,
    ) -> None:
        branches = list(branches)
        if not branches:
            raise ValueError("`branches` must hold at least one model. Received none.")
        for part in (stem, *branches):
            if not isinstance(part, keras.Model):
                raise TypeError(
                    f"`stem` and `branches` must be Keras models. Received: {part!r}"
                )
        if len({id(branch) for branch in branches}) < len(branches):
            raise ValueError(
                "`branches` holds the same model twice. Make copies of it."
            )
        spec = input_spec(stem)
        shared = output_spec(stem, spec)
        if not isinstance(shared, keras.KerasTensor):
            raise ValueError(
                f"`stem` must have one output. {stem.name!r} has "
                f"{len(keras.tree.flatten(shared))}."
            )
        super().__init__(name=name, autocast=False)
        self.stem = stem
        self.branches = branches
        gate = default_gate(shared.shape, len(branches)) if gate is None else gate
        if not isinstance(gate, keras.Layer):
            raise TypeError(f"`gate` must be a keras.Layer. Received: {gate!r}")
        self.gate = gate
        self._head = self._find_head(spec, self._check_branches(shared))
        self._check_gate(shared)
        self.built = True

    def _check_branches(self, shared: Any) -> Any:
        shapes = []
        for branch in self.branches:
            output = output_spec(branch, shared)
            if not isinstance(output, keras.KerasTensor):
                raise ValueError(f"The branch {branch.name!r} must have one output.")
            shapes.append(tuple(output.shape)[1:])
        if len(set(shapes)) > 1:
            raise ValueError(
                "The branches must have outputs of one shape, with the same classes. "
                f"Received: {shapes}"
            )
        return output

    def _check_gate(self, shared: Any) -> None:
        weights = symbolic_run(lambda x: call_model(self.gate, x, False), shared)
        count = len(self.branches)
        if len(weights.shape) != 2 or weights.shape[-1] != count:
            raise ValueError(
                f"`gate` must give weights of shape (batch, {count}), one per branch. "
                f"Received: {tuple(weights.shape)}"
            )

    def _find_head(self, spec: Any, output: Any) -> Head:
        def run() -> Any:
            shared = call_model(self.stem, example_rows(spec), False)
            return call_model(self.branches[0], shared, False)

        return find_heads(self.branches[0], output, None, "branches", run)[0]

    # -- what other parts of the package ask a model --------------------------------

    @property
    def _functional(self) -> keras.Model:
        """The model whose inputs these are."""
        return self.stem

    @property
    def output_names(self) -> list[str]:
        """The names of a branch's outputs."""
        return list(getattr(self.branches[0], "output_names", ["output"]))

    # -- running --------------------------------------------------------------------

    def parts(self, x: Any, training: bool) -> tuple[list[Any], Any]:
        """The branches' outputs, and the gate's weights `(B, branches)`."""
        shared = call_model(self.stem, x, training)
        outputs = [call_model(branch, shared, training) for branch in self.branches]
        return outputs, call_model(self.gate, shared, training)

    def logits(self, output: Any) -> Any:
        """Logits `(B, ..., classes)` of a branch's or the ensemble's output."""
        return self._head.logits(output)

    def mix(self, outputs: Sequence[Any], weights: Any) -> Any:
        """The ensemble's output, of the branches' kind."""
        logits = [ops.cast(self.logits(output), "float32") for output in outputs]
        shape = (-1, len(outputs), *[1] * (len(logits[0].shape) - 1))
        weights = ops.reshape(ops.cast(weights, "float32"), shape)
        mixed = ops.sum(weights * ops.stack(logits, 1), 1)
        single = outputs[0].shape[-1] == 1
        if single:  # the logits 0 and z of two classes back to z
            mixed = mixed[..., 1:] - mixed[..., :1]
        if self._head.kind != "logits":
            mixed = (
                keras.activations.sigmoid if single else keras.activations.softmax
            )(mixed)
        mask = getattr(outputs[0], "_keras_mask", None)
        if mask is not None:
            mixed._keras_mask = mask
        return mixed

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.mix(*self.parts(x, bool(training)))

    def plain(self) -> keras.Model:
        """A copy of Keras's own layers alone."""
        copies = GatedEnsemble(
            clone(self.stem, "stem"),
            [clone(branch, f"branch_{i}") for i, branch in enumerate(self.branches)],
            clone(self.gate, "gate"),
        )
        inputs = symbolic_inputs(copies.stem)
        return keras.Model(inputs, copies.call(inputs), name=self.name)

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            "stem": serialize(self.stem),
            "branches": [serialize(branch) for branch in self.branches],
            "gate": serialize(self.gate),
            "name": self.name,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> GatedEnsemble:
        return cls(**keras.saving.deserialize_keras_object(config, custom_objects))


def default_gate(shape: Sequence[int | None], count: int) -> keras.Model:
    """The paper's gate: pooling, Dense, BatchNormalization, ReLU and softmax.

    Args:
        shape: Of the shared tensor, `(None, ..., channels)`.
        count: Number of branches.
    """
    # In float32: it is small, and its statistics and softmax decide for everything.
    x = inputs = keras.Input(shape[1:], dtype="float32")
    x = pooled(x)
    x = keras.layers.Dense(count, dtype="float32")(x)
    # The statistics move as fast as in the official code (there: 0.1 of the new).
    x = keras.layers.BatchNormalization(
        momentum=0.9, epsilon=1e-5, synchronized=True, dtype="float32"
    )(x)
    x = keras.layers.ReLU(dtype="float32")(x)
    x = keras.layers.Softmax(dtype="float32")(x)
    return keras.Model(inputs, x, name="gate")


def pooled(x: Any) -> Any:
    """The mean over all positions: `(B, ..., C)` to `(B, C)`."""
    pooling = {
        3: keras.layers.GlobalAveragePooling1D,
        4: keras.layers.GlobalAveragePooling2D,
        5: keras.layers.GlobalAveragePooling3D,
    }
    rank = len(x.shape)
    if rank == 2:
        return x
    if rank not in pooling:
        raise ValueError(
            "A shared tensor must have 2 to 5 axes, the batch first. "
            f"Received: shape {tuple(x.shape)}"
        )
    return pooling[rank](dtype="float32")(x)


def symbolic_inputs(model: keras.Layer) -> Any:
    """New Keras inputs for a built model."""
    return keras.tree.map_structure(
        lambda t: keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.name),
        input_spec(model),
    )
