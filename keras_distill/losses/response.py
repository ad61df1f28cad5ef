"""Knowledge in the logits."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill.losses.base import (
    PACKAGE,
    DistillationLoss,
    check_same_shape,
    check_weight,
)
from keras_distill.losses.labels import check_classes, pick, read_labels
from keras_distill.losses.tempered import TemperedLoss


@keras.saving.register_keras_serializable(package=PACKAGE)
class SoftTarget(TemperedLoss):
    r"""Soft targets: the temperature-scaled divergence of two sets of logits.

    With `p = softmax(teacher / T)` and `q = softmax(student / T)` each position gets

    $$T^2 \sum_k p_k (\log p_k - \log q_k)$$

    or, with `divergence="cross_entropy"`, `-T² Σ p log q`: the same gradient, a value
    that is larger by the teacher's entropy. `T²` keeps the size of the gradient
    independent of the temperature. Sums run over classes, the mean over positions.

    Args:
        temperature: T, above 0. May be a variable: changes take effect at once;
            or a `kd.LearnedTemperature`.
        scale_by_temperature: Whether to multiply by T².
        divergence: `"kl"` or `"cross_entropy"`.
        standardize: Whether each row of logits is first shifted to mean 0 and divided
            by its (unbiased) standard deviation, as in logit standardization.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher logits, float `(..., C)`, C of at least 2.
        y_pred: Student logits, float `(..., C)`.

    Raises:
        ValueError: If the temperature is not above 0, the divergence is unknown, or
            the shapes differ.

    Example:

    >>> loss = SoftTarget(temperature=2.0)
    >>> print(f"{float(loss([[4.0, 0.0]], [[0.0, 0.0]])):.4f}")
    1.3113

    References:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015
        (arXiv 1503.02531). Sun et al., Logit Standardization in Knowledge
        Distillation, CVPR 2024 (arXiv 2403.01427).
    """

    def __init__(
        self,
        temperature: Any = 4.0,
        scale_by_temperature: bool = True,
        divergence: str = "kl",
        standardize: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(temperature, **kwargs)
        if divergence not in ("kl", "cross_entropy"):
            raise ValueError(
                "`divergence` must be 'kl' or 'cross_entropy'. "
                f"Received: {divergence!r}"
            )
        self.scale_by_temperature = scale_by_temperature
        self.divergence = divergence
        self.standardize = standardize

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_logits(self, y_true, y_pred)
        temperature = self.current_temperature()
        if self.standardize:
            y_true, y_pred = standardize_logits(y_true), standardize_logits(y_pred)
        log_p = ops.log_softmax(y_true / temperature)
        log_q = ops.log_softmax(y_pred / temperature)
        gap = log_p - log_q if self.divergence == "kl" else -log_q
        values = ops.sum(ops.exp(log_p) * gap, -1)
        return values * temperature**2 if self.scale_by_temperature else values

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "scale_by_temperature": self.scale_by_temperature,
            "divergence": self.divergence,
            "standardize": self.standardize,
        }


@keras.saving.register_keras_serializable(package=PACKAGE)
class LogitMSE(DistillationLoss):
    r"""Logit regression: the mean squared difference of the logits.

    Each position gets `(1 / C) Σ_k (student_k - teacher_k)²`. The paper writes
    `½ Σ_k`, which is `C / 2` times as much.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher logits, float `(..., C)`.
        y_pred: Student logits, float `(..., C)`.

    Raises:
        ValueError: If the shapes differ.

    Example:

    >>> print(float(LogitMSE()([[3.0, 0.0]], [[1.0, 0.0]])))
    2.0

    References:
        Ba, Caruana, Do Deep Nets Really Need to be Deep?, NIPS 2014
        (arXiv 1312.6184).
    """

    shift_invariant = False

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_same_shape(self, y_true, y_pred)
        return ops.mean(ops.square(y_pred - y_true), -1)


@keras.saving.register_keras_serializable(package=PACKAGE)
class DecoupledKD(TemperedLoss):
    r"""Decoupled distillation: the label's probability, and the rest among itself.

    With label y, `b = (p_y, 1 - p_y)` and the softmax `r` over the classes other than
    y, all at temperature T, each row gets

    $$T^2 (\alpha\, KL(b^t | b^s) + \beta\, KL(r^t | r^s))$$

    `log(1 - p_y)` is the difference of two log-sum-exps: the value stays exact where
    the logarithm of a rounded probability, as in the released code, is infinite. The
    code's warm-up of the weight over the first 20 epochs is a schedule, not a part of
    the loss. Rows without a label get 0.

    Args:
        alpha: Weight of the label's part, at least 0.
        beta: Weight of the part of the other classes, at least 0.
        temperature: T, above 0. May be a variable: changes take effect at once;
            or a `kd.LearnedTemperature`.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: `[teacher logits, labels]`: float `(B, C)` and integers `(B,)` or
            `(B, 1)`, below 0 for none, or one-hot rows `(B, C)`.
        y_pred: Student logits, float `(B, C)`.

    Raises:
        ValueError: If an argument is out of its range, the labels are missing, or the
            shapes do not fit.

    Example:

    >>> import numpy as np
    >>> loss = DecoupledKD(temperature=1.0)
    >>> teacher, labels = np.array([[2.0, 1.0, 0.0]]), np.array([0])
    >>> print(f"{float(loss([teacher, labels], np.zeros((1, 3)))):.4f}")
    1.1166

    References:
        Zhao et al., Decoupled Knowledge Distillation, CVPR 2022 (arXiv 2203.08679).
    """

    needs_labels = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: Any = 4.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(temperature, **kwargs)
        check_weight("alpha", alpha)
        check_weight("beta", beta)
        self.alpha = alpha
        self.beta = beta

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        if not isinstance(y_true, list | tuple) or len(y_true) != 2:
            raise ValueError(
                "DecoupledKD needs y_true=[teacher logits, labels]. Received: "
                f"{keras.tree.map_structure(lambda x: tuple(x.shape), y_true)}"
            )
        teacher, labels = y_true
        check_logits(self, teacher, y_pred)
        target, known = read_labels(self, labels, y_pred)
        temperature = self.current_temperature()
        p = _Decoupled(teacher / temperature, target)
        q = _Decoupled(y_pred / temperature, target)

        def divergence(log_p: Any, log_q: Any) -> Any:
            return ops.exp(log_p) * (log_p - log_q)

        label = divergence(p.label, q.label) + divergence(p.others, q.others)
        # At the label both logarithms are 0, and so is their part of the sum.
        within = ops.sum(divergence(p.within, q.within), -1)
        return known * temperature**2 * (self.alpha * label + self.beta * within)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "beta": self.beta,
        }


class _Decoupled:
    """Log-probabilities of the label, of all others, and of each among the others."""

    def __init__(self, logits: Any, target: Any) -> None:
        total = ops.logsumexp(logits, -1)
        others = ops.logsumexp(ops.where(target, -1e30, logits), -1)
        self.label = pick(logits, target) - total
        self.others = others - total
        self.within = ops.where(target, 0.0, logits - ops.expand_dims(others, -1))


def check_logits(loss: DistillationLoss, teacher: Any, student: Any) -> None:
    """Raises ValueError unless both are logits of the same two or more classes."""
    check_same_shape(loss, teacher, student)
    check_classes(loss, student)


def standardize_logits(logits: Any) -> Any:
    """Shifts every row of logits to mean 0 and unbiased standard deviation 1."""
    classes = logits.shape[-1]
    centred = logits - ops.mean(logits, -1, keepdims=True)
    variance = ops.sum(ops.square(centred), -1, keepdims=True) / (classes - 1)
    # The root has no finite slope at 0; rows of equal logits keep gradient 0.
    positive = variance > 0
    deviation = ops.where(positive, ops.sqrt(ops.where(positive, variance, 1.0)), 0.0)
    return centred / (1e-7 + deviation)
