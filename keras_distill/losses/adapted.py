"""Knowledge in what trained adapters make of features: guesses and factors."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill.grids import normalize
from keras_distill.losses.base import (
    PACKAGE,
    DistillationLoss,
    check_positive,
    check_same_shape,
)
from keras_distill.losses.feature import check_power, check_variant, power


@keras.saving.register_keras_serializable(package=PACKAGE)
class VariationalInformation(DistillationLoss):
    r"""Variational information distillation: a Gaussian guess of the teacher.

    The adapter `VariationalHead` turns the student's features into a mean μ and one
    ρ per channel, the variance is `v = softplus(ρ) + ε`. Each position gets

    $$\frac{1}{C} \sum_c \frac12 \Big[\frac{(\mu_c - t_c)^2}{v_c} + \log v_c\Big]$$

    which, up to a constant, is the negative logarithm of the likelihood.

    Args:
        epsilon: Smallest variance, above 0.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher features, float `(B, ..., C)`.
        y_pred: A list of two: the mean, float `(B, ..., C)`, and ρ, float `(C,)`, or of
            any shape that broadcasts with the mean.

    Raises:
        ValueError: If `y_pred` is not a pair, if the shapes do not fit, or if epsilon
            is not above 0.

    Example:

    >>> import numpy as np
    >>> loss = VariationalInformation(epsilon=1.0)
    >>> mean, rho = np.array([[3.0]]), np.array([-100.0])
    >>> print(f"{float(loss(np.array([[1.0]]), [mean, rho])):.1f}")
    2.0

    References:
        Ahn et al., Variational Information Distillation for Knowledge Transfer,
        CVPR 2019 (arXiv 1904.05835).
    """

    def __init__(self, epsilon: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("epsilon", epsilon)
        self.epsilon = float(epsilon)

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        if not isinstance(y_pred, (list, tuple)) or len(y_pred) != 2:
            raise ValueError(
                "VariationalInformation needs `y_pred` to be [mean, rho], what the "
                f"adapter VariationalHead returns. Received: {_shapes(y_pred)}"
            )
        mean, rho = y_pred
        check_same_shape(self, y_true, mean)
        if len(rho.shape) > 0 and rho.shape[-1] not in (1, mean.shape[-1], None):
            raise ValueError(
                f"`rho` must hold one number per channel, {mean.shape[-1]}. "
                f"Received: shape {tuple(rho.shape)}"
            )
        variance = ops.softplus(rho) + self.epsilon
        error = ops.square(mean - y_true) / variance + ops.log(variance)
        return ops.mean(error, -1) / 2

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}


@keras.saving.register_keras_serializable(package=PACKAGE)
class FactorTransfer(DistillationLoss):
    r"""Factor transfer: the distance of two normalised factors.

    The adapters `Paraphraser` (teacher) and `Translator` (student) make the factors.
    Each is flattened and divided by its norm; each sample gets the mean of
    `|student - teacher|^p`. `variant="repdistiller"` first averages the squares over
    the channels, a different loss that goes by the same name.

    Args:
        p: Power of the difference, at least 1.
        variant: None (the official code), or `"repdistiller"`.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher factor, float `(B, ..., K)`.
        y_pred: Student factor, float `(B, ..., K)`.

    Raises:
        ValueError: If the shapes differ, `p` is below 1, or the variant is unknown.

    Example:

    >>> import numpy as np
    >>> teacher, student = np.array([[3.0, 4.0]]), np.array([[1.0, 0.0]])
    >>> print(f"{float(FactorTransfer()(teacher, student)):.1f}")
    0.6

    References:
        Kim, Park, Kwak, Paraphrasing Complex Network: Network Compression via Factor
        Transfer, NeurIPS 2018 (arXiv 1802.04977).
    """

    def __init__(self, p: float = 1, variant: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_power(p)
        check_variant(variant, "repdistiller")
        self.p = p
        self.variant = variant

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_same_shape(self, y_true, y_pred)
        difference = self._normalized(y_pred) - self._normalized(y_true)
        axes = tuple(range(1, len(difference.shape)))
        return ops.mean(power(difference, self.p), axes)

    def _normalized(self, factor: Any) -> Any:
        if self.variant == "repdistiller":
            factor = ops.mean(ops.square(factor), -1, keepdims=True)
        return normalize(factor, axis=tuple(range(1, len(factor.shape))))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "p": self.p, "variant": self.variant}


def _shapes(features: Any) -> Any:
    return keras.tree.map_structure(lambda x: tuple(x.shape), features)
