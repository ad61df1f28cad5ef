"""Heads: what a model's outputs are, and how to get logits from them."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

# log(1e-30) = -69: far below any probability float32 softmax gives, and 1 / 1e-30 is
# still a finite slope.
FLOOR = 1e-30


@dataclass(frozen=True)
class Head:
    """One output of a model.

    Attributes:
        name: The output's name.
        shape: Its shape, first axis None.
        kind: `"logits"`, `"attached"` (probabilities that carry the logits they were
            made from), `"probabilities"` (bare ones) or `"log_probabilities"`.
    """

    name: str
    shape: tuple[int | None, ...]
    kind: str = "logits"

    @property
    def classes(self) -> int:
        """Number of classes: one unit stands for two."""
        units = self.shape[-1] if len(self.shape) > 1 else 1
        return 2 if units in (1, None) else units

    @property
    def exact(self) -> bool:
        """Whether the logits are the network's own, not shifted by a constant."""
        return self.kind in ("logits", "attached")

    def logits(self, output: Any) -> Any:
        """Logits of shape `(..., classes)`, with the output's mask."""
        if self.kind == "attached":
            logits = getattr(output, "_keras_logits", None)
            if logits is None:
                return self._from_probabilities(output)
            return self._two_classes(logits, output)
        if self.kind == "probabilities":
            return self._from_probabilities(output)
        return self._two_classes(output, output)

    def chosen(self, output: Any) -> Any:
        """The class with the highest score, of shape `(...)`."""
        return ops.argmax(self.logits(output), -1)

    def against(self, output: Any, student: Any, temperature: Any) -> tuple[Any, Any]:
        """This teacher's logits and the student's, over the classes that both keep.

        Args:
            output: What the teacher said.
            student: The student's logits, `(..., classes)`.
            temperature: At which they will be compared.
        """
        return self.logits(output), student

    def _two_classes(self, logits: Any, output: Any) -> Any:
        if logits.shape[-1] != 1:
            return logits if logits is output else with_mask_of(output, logits)
        pair = ops.concatenate([ops.zeros_like(logits), logits], -1)
        return with_mask_of(output, pair)

    def _from_probabilities(self, output: Any) -> Any:
        p = ops.cast(output, "float32")
        if p.shape[-1] == 1:
            p = ops.concatenate([1 - p, p], -1)
        return with_mask_of(output, ops.log(ops.maximum(p, FLOOR)))


def with_mask_of(source: Any, target: Any) -> Any:
    """Hands a Keras mask on: operations on tensors lose it."""
    mask = getattr(source, "_keras_mask", None)
    if mask is not None:
        target._keras_mask = mask
    return target


def output_names(model: keras.Layer, outputs: Any) -> list[str]:
    """Names of a model's flat outputs: keys of a dict, else Keras's names."""
    if isinstance(outputs, OrderedDict):  # flattened as it is, another dict sorted
        return [str(key) for key in outputs]
    if isinstance(outputs, dict):
        return [str(key) for key in sorted(outputs)]
    count = len(keras.tree.flatten(outputs))
    names = getattr(model, "output_names", None)
    if names is not None and len(names) == count:
        return list(names)
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def find_heads(
    model: keras.Layer, outputs: Any, from_logits: bool | None, argument: str, run: Any
) -> list[Head]:
    """The heads of a model that is going to be compared in its logits.

    Args:
        model: The model.
        outputs: Its symbolic outputs.
        from_logits: What the user declared: True, False, or None to find out.
        argument: The argument with which it is declared, for messages.
        run: Function without arguments that returns the model's outputs for some rows.

    Raises:
        ValueError: If several sigmoid units make a multi-label head.
    """
    names = output_names(model, outputs)
    shapes = [
        (None, *tuple(output.shape)[1:]) for output in keras.tree.flatten(outputs)
    ]
    if from_logits:
        return [Head(n, s) for n, s in zip(names, shapes, strict=True)]
    with keras.StatelessScope():  # stateful layers must not remember these rows
        values = keras.tree.flatten(run())
    declared = from_logits is not None
    return [
        Head(n, s, _kind(n, value, argument, declared))
        for n, s, value in zip(names, shapes, values, strict=True)
    ]


def _kind(name: str, output: Any, argument: str, declared: bool) -> str:
    """What an output is; declared: that it is probabilities."""
    attached = getattr(output, "_keras_logits", None) is not None
    values = np.asarray(ops.convert_to_numpy(ops.cast(output, "float32")))
    if values.ndim < 2 or values.shape[-1] == 1:
        bare = "probabilities" if declared else "logits"
        return "attached" if attached else bare
    sums_to_one = np.all(values >= 0) and np.allclose(values.sum(-1), 1, atol=1e-2)
    if (attached or declared) and not sums_to_one:
        raise ValueError(
            f"The output {name!r} has {values.shape[-1]} sigmoid units (multi-label): "
            "soft targets over classes do not apply to it. Give `soft_loss=None`, or a "
            "loss of your own in a Link."
        )
    if attached:
        return "attached"
    if declared:
        return "probabilities"
    if sums_to_one:
        warnings.warn(
            f"The output {name!r} gives probabilities without their logits; "
            "distillation uses their logarithm, which is less exact. Return logits, or "
            f"declare what the output is with `{argument}`.",
            stacklevel=2,
        )
        return "probabilities"
    return "logits"


def example_rows(spec: Any) -> Any:
    """Rows of input for a dry run: normal numbers, or zeros for integers.

    Two rows, or as many as the model is bound to.
    """
    generator = np.random.default_rng(0)

    def rows(tensor: Any) -> Any:
        shape = [tensor.shape[0] or 2]
        shape += [32 if size is None else size for size in tensor.shape[1:]]
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if "float" not in dtype:
            return ops.zeros(shape, dtype)
        return ops.convert_to_tensor(generator.normal(size=shape), dtype)

    return keras.tree.map_structure(rows, spec)
