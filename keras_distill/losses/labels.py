"""Logits and labels as the losses take them."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


def check_classes(loss: keras.losses.Loss, logits: Any) -> None:
    """Raises ValueError unless these are logits of two or more classes."""
    if len(logits.shape) < 2 or logits.shape[-1] == 1:
        raise ValueError(
            f"{type(loss).__name__} needs logits of shape (..., classes) with at least "
            f"two classes. Received: {tuple(logits.shape)}. A single unit z stands "
            "for the two classes with logits (0, z)."
        )


def read_labels(loss: keras.losses.Loss, labels: Any, logits: Any) -> tuple[Any, Any]:
    """Turns labels into a mask over the classes.

    Args:
        loss: Named in errors.
        labels: Integers of shape `(B,)` or `(B, 1)` (in general the shape of the
            logits without the classes, or with 1 in their place), or one-hot rows of
            the logits' shape. An integer below 0, or a row without a positive entry,
            means that there is no label.
        logits: `(B, C)`, in general `(..., C)`.

    Returns:
        Booleans `(..., C)`, True at the label (class 0 where there is none), and floats
        `(...)`: 1 with a label, 0 without.

    Raises:
        ValueError: If the shapes do not fit.
    """
    shape, wanted = tuple(labels.shape), tuple(logits.shape)
    classes = wanted[-1]

    def fits(found: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
        return len(found) == len(other) and all(
            a == b or None in (a, b) for a, b in zip(found, other, strict=True)
        )

    if fits(shape, (*wanted[:-1], 1)) and shape[-1] == 1:
        labels = ops.squeeze(labels, -1)
    elif fits(shape, wanted):
        known = ops.max(labels, -1) > 0
        labels = ops.where(known, ops.cast(ops.argmax(labels, -1), "int32"), -1)
    elif not fits(shape, wanted[:-1]):
        raise ValueError(
            f"{type(loss).__name__} needs integer labels of shape {wanted[:-1]} or one-"
            f"hot labels of shape {wanted}. Received: labels of shape {shape}"
        )
    labels = ops.cast(labels, "int32")
    known = ops.cast(labels >= 0, logits.dtype)
    target = ops.one_hot(ops.maximum(labels, 0), classes, dtype="bool")
    return target, known


def pick(values: Any, target: Any) -> Any:
    """The value at the label, `(..., C)` to `(...)`."""
    return ops.sum(ops.where(target, values, 0.0), -1)
