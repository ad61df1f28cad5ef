"""Comparing what two networks know, on this replica or over the global batch."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_distill.losses.base import DistillationLoss, reduce_values
from keras_distill.weighting import current_rows, current_share, for_masked


def apply_loss(
    loss: Any,
    known: Any,
    own: Any,
    labels: Any = None,
    weight: Any = None,
    across_replicas: bool = False,
) -> Any:
    """The scalar value of any loss, weighted from the left and scaled.

    Args:
        loss: A `keras.losses.Loss`.
        known: The teacher's knowledge: a tensor, or a list for several taps.
        own: The student's.
        labels: For losses that need them.
        weight: The weights that `compute_terms` gets.
        across_replicas: Whether a loss that compares rows sees the global batch.

    Raises:
        ValueError: If the loss needs labels and there are none.
    """
    if isinstance(own, (list, tuple)) and not isinstance(loss, DistillationLoss):
        # A loss of Keras's compares two tensors: its mean over the pairs of taps.
        values = [
            apply_loss(loss, one, other, labels, weight, across_replicas)
            for one, other in zip(known, own, strict=True)
        ]
        return sum(values) / len(values)
    mask = getattr(own, "_keras_mask", None)
    share = current_share()
    if getattr(loss, "needs_labels", False) and labels is None:
        raise ValueError(f"{type(loss).__name__} needs labels; there are none.")
    part = 1.0
    if across_replicas and share is not None and getattr(loss, "across_batch", False):
        # All replicas see all rows, so weights lose this replica's scale; of the one
        # value that all of them compute each takes the part of its own rows.
        part = share.factor
        weight = None if weight is None else ops.divide_no_nan(weight, share.factor)
        known, own, labels, weight, mask = share.gather(
            (known, own, labels, weight, mask)
        )
        if mask is not None:
            own._keras_mask = mask
    else:
        weight = for_masked(weight, mask)
    if isinstance(loss, DistillationLoss):
        known = [known, labels] if loss.needs_labels else known
        return ops.cast(loss(known, own, weight), "float32") * part
    values = loss.call(ops.cast(known, "float32"), ops.cast(own, "float32"))
    return reduce_values(ops.cast(values, "float32"), weight, mask, loss.reduction)


def agreement(chosen: Any, student: Any) -> Any:
    """Share of this replica's valid positions where both choose the same class.

    Args:
        chosen: The teacher's classes.
        student: The student's logits.
    """
    own = ops.argmax(student, -1)
    same = ops.cast(ops.cast(chosen, own.dtype) == own, "float32")
    mask = getattr(student, "_keras_mask", None)
    if mask is None:
        return ops.mean(same)
    mask = ops.cast(mask, "float32")
    return ops.divide_no_nan(ops.sum(same * mask), ops.sum(mask))


def positions(output: Any) -> Any:
    """How much this batch counts in a mean over positions."""
    mask = getattr(output, "_keras_mask", None)
    if mask is None:
        return current_rows()
    share = current_share()
    here = ops.sum(ops.cast(mask, "float32"))
    return here if share is None else share.valid(mask)[0]
