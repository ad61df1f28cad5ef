"""Knowledge without a teacher: what the labels alone say about the logits."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill.losses.base import (
    PACKAGE,
    DistillationLoss,
    check_positive,
    check_weight,
    number,
)
from keras_distill.losses.labels import check_classes, pick, read_labels


@keras.saving.register_keras_serializable(package=PACKAGE)
class ConfidencePenalty(DistillationLoss):
    r"""Confidence penalty: cross-entropy less a share of the entropy.

    With `q = softmax(logits)` and label y each row gets

    $$-\log q_y - \beta H(q), \qquad H(q) = -\sum_k q_k \log q_k$$

    in nats. It contains its cross-entropy, so it is the whole loss of a model. Rows
    without a label get 0.

    Args:
        beta: Weight of the entropy, at least 0.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Labels: integers `(B,)` or `(B, 1)`, below 0 for none, or one-hot.
        y_pred: Logits, float `(B, C)`.

    Raises:
        ValueError: If beta is negative, or the shapes do not fit.

    Example:

    >>> loss = ConfidencePenalty(beta=0.5)
    >>> print(f"{float(loss([1], [[0.0, 0.0]])):.4f}")
    0.3466

    References:
        Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output
        Distributions, 2017 (arXiv 1701.06548).
    """

    needs_teacher = False

    def __init__(self, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_weight("beta", beta)
        self.beta = beta

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_classes(self, y_pred)
        target, known = read_labels(self, y_true, y_pred)
        log_q = ops.log_softmax(y_pred)
        negative_entropy = ops.sum(ops.exp(log_q) * log_q, -1)
        return known * (self.beta * negative_entropy - pick(log_q, target))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "beta": self.beta}


@keras.saving.register_keras_serializable(package=PACKAGE)
class VirtualTeacher(DistillationLoss):
    r"""Teacher-free distillation: soft targets of a teacher that is made by hand.

    The virtual teacher gives the label the probability a and every other class
    `(1 - a) / (C - 1)`. With these *probabilities* d, `p = softmax(d / T)` and
    `q = softmax(logits / T)`, each row gets `Σ_k p_k (log p_k - log q_k)`, without a
    factor T². Rows without a label get 0.

    This is the paper's divergence. The released code differs: its student is at
    temperature 1, and its mean runs over classes, too, against which it sets a factor
    for every network.

    Args:
        correct: a, the probability of the label, between 0 and 1.
        temperature: T, above 0. May be a variable: changes take effect at once.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Labels: integers `(B,)` or `(B, 1)`, below 0 for none, or one-hot.
        y_pred: Logits, float `(B, C)`.

    Raises:
        ValueError: If an argument is out of its range, or the shapes do not fit.

    Example:

    >>> loss = VirtualTeacher(correct=0.9, temperature=0.2)
    >>> print(f"{float(loss([0], [[0.4, 0.0]])):.4f}")
    0.0728

    References:
        Yuan et al., Revisiting Knowledge Distillation via Label Smoothing
        Regularization, CVPR 2020 (arXiv 1909.11723).
    """

    needs_teacher = False

    def __init__(
        self, correct: float = 0.99, temperature: Any = 20.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < correct < 1:
            raise ValueError(f"`correct` must be in (0, 1). Received: {correct!r}")
        check_positive("temperature", temperature)
        self.correct = correct
        self.temperature = temperature

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_classes(self, y_pred)
        target, known = read_labels(self, y_true, y_pred)
        temperature = ops.cast(self.temperature, self.dtype)
        wrong = (1 - self.correct) / (y_pred.shape[-1] - 1)
        teacher = wrong + ops.cast(target, self.dtype) * (self.correct - wrong)
        log_p = ops.log_softmax(teacher / temperature)
        log_q = ops.log_softmax(y_pred / temperature)
        return known * ops.sum(ops.exp(log_p) * (log_p - log_q), -1)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "correct": self.correct,
            "temperature": number(self.temperature),
        }
