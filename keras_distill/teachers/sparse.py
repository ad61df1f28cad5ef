"""Sparse targets: k classes, and one ghost class for all others together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_distill.heads import Head, with_mask_of

# Below any logit, and still finite after a division by a small temperature.
NOWHERE = -1e30


def select(logits: Any, indices: Any, temperature: Any) -> Any:
    r"""The logits of k classes, and of a ghost class that stands for the others.

    The ghost's logit is `T log Σ exp(z_j / T)` over the classes j that were not
    selected: the softmax at T then gives it exactly their probability. (At another
    temperature it is another number.) With all classes selected there is no ghost.

    Args:
        logits: Float `(..., C)`.
        indices: Integers `(..., k)`, different ones in each row.
        temperature: T.

    Returns:
        Logits `(..., k + 1)`, or `(..., C)` if k = C.
    """
    classes, k = logits.shape[-1], indices.shape[-1]
    chosen = ops.take_along_axis(logits, indices, -1)
    if k == classes:
        return chosen
    rows = ops.reshape(logits, (-1, classes))
    places = ops.reshape(ops.cast(indices, "int32"), (-1, k))
    count = ops.shape(rows)[0]
    row = ops.broadcast_to(ops.expand_dims(ops.arange(count), -1), (count, k))
    where = ops.stack([ops.reshape(row, (-1,)), ops.reshape(places, (-1,))], -1)
    nowhere = ops.full((count * k,), NOWHERE, dtype=rows.dtype)
    rest = ops.scatter_update(rows, where, nowhere)
    temperature = ops.cast(temperature, rows.dtype)
    ghost = temperature * ops.logsumexp(rest / temperature, -1)
    ghost = ops.reshape(ghost, (*ops.shape(chosen)[:-1], 1))
    return ops.concatenate([chosen, ghost], -1)


def top(logits: Any, k: int, temperatures: Any, relative: bool) -> tuple[Any, Any, Any]:
    """What is kept of the teacher's logits.

    Args:
        logits: Float `(..., C)`.
        k: How many classes.
        temperatures: At which the ghost is wanted.
        relative: Whether to shift each row so that its largest logit is 0, which a
            softmax does not notice. Small numbers lose least in float16.

    Returns:
        The k largest logits in falling order, their classes, and the ghost's logit at
        each temperature, `(..., len(temperatures))`, with no entries if k = C.
    """
    logits = ops.cast(logits, "float32")
    if relative:
        logits = logits - ops.max(logits, -1, keepdims=True)
    values, indices = ops.top_k(logits, k, sorted=True)
    if k == logits.shape[-1]:
        return values, indices, values[..., :0]
    ghosts = [select(logits, indices, t)[..., -1:] for t in temperatures]
    return values, indices, ops.concatenate(ghosts, -1)


@dataclass(frozen=True)
class SparseHead(Head):
    """An output of which k logits, their classes and ghosts are known.

    The output is one float32 tensor `(..., k + k + number of ghosts)`, in this order.

    Attributes:
        k: How many classes are kept.
        temperatures: Those of the ghosts.
    """

    k: int = 1
    temperatures: tuple[float, ...] = ()

    def indices(self, output: Any) -> Any:
        """The classes, integers of shape `(..., k)`."""
        # Integers up to 2 ** 24 are exact in float32.
        return ops.cast(ops.round(output[..., self.k : 2 * self.k]), "int32")

    def logits(self, output: Any) -> Any:
        raise ValueError(
            f"Of the output {self.name!r} only {self.k} of {self.classes} logits are "
            "in the cache (`top_k`): only SoftTarget can use them."
        )

    def chosen(self, output: Any) -> Any:
        return self.indices(output)[..., 0]

    def against(self, output: Any, student: Any, temperature: Any) -> tuple[Any, Any]:
        dtype = keras.backend.standardize_dtype(student.dtype)
        precise = ops.cast(student, "float64" if dtype == "float64" else "float32")
        known = output[..., : self.k]
        if self.k < self.classes:
            known = ops.concatenate([known, self._ghost(output, temperature)], -1)
        own = select(precise, self.indices(output), temperature)
        return known, with_mask_of(student, own)

    def _ghost(self, output: Any, temperature: Any) -> Any:
        """The ghost's logit at T; NaN at a temperature that nobody allowed."""
        ghosts = output[..., 2 * self.k :]
        stored = ops.convert_to_tensor(self.temperatures, "float32")
        gap = ops.abs(stored - ops.cast(temperature, "float32")) / stored
        nearest = ops.take(ghosts, ops.argmin(gap), -1)
        known = ops.where(ops.min(gap) < 1e-6, nearest, float("nan"))
        return ops.expand_dims(known, -1)
