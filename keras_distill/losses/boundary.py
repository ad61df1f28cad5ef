"""Knowledge in pre-activation features: on which side of zero neurons are."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill.losses.base import (
    PACKAGE,
    DistillationLoss,
    check_positive,
    check_same_shape,
)


@keras.saving.register_keras_serializable(package=PACKAGE)
class ActivationBoundary(DistillationLoss):
    r"""Activation boundaries: the student's neurons take the teacher's side of zero.

    On features before the ReLU, with margin μ, each sample gets the sum over all
    elements of

    $$(s + \mu)^2\,[s > -\mu,\ t \le 0] + (s - \mu)^2\,[s \le \mu,\ t > 0]$$

    as in the official code, which then weights layer i of L by `2^(i - L + 1)` (the
    last one by 1) and multiplies by 0.003: that is the link's weight.

    Args:
        margin: μ, above 0.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher features before the ReLU, float `(B, ..., C)`.
        y_pred: Student features of the same shape, from a `Connector` where the
            channels differ.

    Raises:
        ValueError: If the shapes differ, or the margin is not above 0.

    Example:

    >>> import numpy as np
    >>> teacher, student = np.array([[0.5, -2.0]]), np.array([[-1.0, -3.0]])
    >>> print(float(ActivationBoundary()(teacher, student)))
    4.0

    References:
        Heo et al., Knowledge Transfer via Distillation of Activation Boundaries
        Formed by Hidden Neurons, AAAI 2019 (arXiv 1811.03233).
    """

    def __init__(self, margin: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("margin", margin)
        self.margin = float(margin)

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_same_shape(self, y_true, y_pred)
        active = y_true > 0
        too_low = ops.logical_and(active, y_pred <= self.margin)
        too_high = ops.logical_and(ops.logical_not(active), y_pred > -self.margin)
        error = ops.where(active, y_pred - self.margin, y_pred + self.margin)
        error = ops.where(ops.logical_or(too_low, too_high), error, 0.0)
        return sum_per_sample(ops.square(error))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin}


@keras.saving.register_keras_serializable(package=PACKAGE)
class MarginReLU(DistillationLoss):
    r"""The overhaul's partial distance to the teacher behind a margin ReLU.

    On features before the ReLU, with `t' = max(t, m)`, each sample gets the sum over
    all elements of

    $$(s - t')^2\,[s > t' \text{ or } t' > 0]$$

    Where the teacher is negative the student need only be below its margin. The
    official code then weights layer i of L by `2^(i - L + 1)` and divides by 1000
    (CIFAR) or 10000 (ImageNet): that is the link's weight.

    Args:
        margin: m, one number (at most 0) per channel of the teacher, see
            `keras_distill.adapters.margins`; or a number for all channels.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher features before the ReLU, float `(B, ..., C)`.
        y_pred: Student features of the same shape, from a `Connector`.

    Raises:
        ValueError: If the shapes differ, or the margins are not as many as the
            channels, or not finite.

    Example:

    >>> import numpy as np
    >>> loss = MarginReLU(margin=[-1.0, -1.0])
    >>> print(float(loss(np.array([[2.0, -3.0]]), np.array([[0.0, -2.0]]))))
    4.0

    References:
        Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019
        (arXiv 1904.01866).
    """

    def __init__(self, margin: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        values = keras.tree.flatten(
            margin.tolist() if hasattr(margin, "tolist") else margin
        )
        self.margin = [float(value) for value in values]
        if not self.margin or not all(abs(m) < float("inf") for m in self.margin):
            raise ValueError(
                "`margin` must hold one finite number per channel. "
                f"Received: {self.margin}"
            )

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_same_shape(self, y_true, y_pred)
        if len(self.margin) not in (1, y_true.shape[-1]):
            raise ValueError(
                "`margin` must hold one number per channel of the teacher, "
                f"{y_true.shape[-1]}. Received: {len(self.margin)} numbers."
            )
        target = ops.maximum(y_true, ops.convert_to_tensor(self.margin, self.dtype))
        counts = ops.logical_or(y_pred > target, target > 0)
        error = ops.where(counts, y_pred - target, 0.0)
        return sum_per_sample(ops.square(error))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "margin": self.margin}


def sum_per_sample(values: Any) -> Any:
    """The sum over every axis but the first."""
    return ops.sum(values, tuple(range(1, len(values.shape))))
