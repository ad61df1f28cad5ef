"""What a generation takes from the one before it, besides its plain soft targets."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill.losses.base import PACKAGE, DistillationLoss
from keras_distill.losses.labels import pick, read_labels
from keras_distill.losses.response import SoftTarget, check_logits


@keras.saving.register_keras_serializable(package=PACKAGE)
class ConfidenceWeighted(DistillationLoss):
    r"""Cross-entropy with the labels, each row weighted by the teacher's confidence.

    With `c_b` the largest of the teacher's probabilities for row b, the loss is
    `Σ_b c_b CE_b / Σ_b c_b`: nothing but its confidence is taken from the teacher
    (CWTM). Rows without a label are in neither sum; like those of any loss they count
    in the batch's mean, with a value of 0.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: `[teacher logits, labels]`: float `(B, C)` and integers `(B,)` or
            `(B, 1)`, below 0 for none, or one-hot rows `(B, C)`.
        y_pred: Student logits, float `(B, C)`.

    Raises:
        ValueError: If the labels are missing, or the shapes do not fit.

    Example:

    >>> import numpy as np
    >>> from keras_distill.generations import ConfidenceWeighted
    >>> teacher, labels = np.array([[9.0, -9.0], [0.0, 0.0]]), np.array([0, 1])
    >>> loss = ConfidenceWeighted()([teacher, labels], [[0.0, 0.0], [9.0, -9.0]])
    >>> print(f"{float(loss):.3f}")
    6.462

    References:
        Furlanello et al., Born-Again Neural Networks, ICML 2018 (arXiv 1805.04770).
    """

    needs_labels = True
    across_batch = True

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        teacher, labels = y_true
        check_logits(self, teacher, y_pred)
        target, known = read_labels(self, labels, y_pred)
        counted = known if rows is None else known * rows
        confidence = ops.max(ops.softmax(teacher), -1) * counted
        mean = ops.divide_no_nan(ops.sum(confidence), ops.sum(counted))
        relative = ops.divide_no_nan(confidence, mean)
        return -relative * pick(ops.log_softmax(y_pred), target)


@keras.saving.register_keras_serializable(package=PACKAGE)
class PermutedTarget(SoftTarget):
    r"""Soft targets whose classes other than the teacher's first are shuffled.

    In every row and at every step the teacher's probabilities of the classes it did
    not choose change places at random, which leaves its confidence and destroys what
    they say about similar classes (DKPP).

    Args:
        temperature: T, above 0.
        divergence: `"kl"` or `"cross_entropy"`.
        seed: Seed of the permutations.
        **kwargs: As in `kd.losses.SoftTarget`.

    Call arguments:
        y_true: Teacher logits, float `(..., C)`.
        y_pred: Student logits, float `(..., C)`.

    Raises:
        ValueError: As `kd.losses.SoftTarget`.

    Example:

    >>> from keras_distill.generations import PermutedTarget
    >>> teacher = [[3.0, 2.0, 1.0]]
    >>> loss = PermutedTarget(seed=0)(teacher, [[0.0, 0.0, 0.0]])
    >>> print(f"{float(loss):.4f}")
    1.0986

    References:
        Furlanello et al., Born-Again Neural Networks, ICML 2018 (arXiv 1805.04770).
    """

    def __init__(
        self,
        temperature: Any = 1.0,
        divergence: str = "cross_entropy",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(temperature, divergence=divergence, **kwargs)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_logits(self, y_true, y_pred)
        shuffled = ops.take_along_axis(y_true, self.permutation(y_true), -1)
        return super().call(shuffled, y_pred)

    def permutation(self, logits: Any) -> Any:
        """Which class's logit every class gets; the largest keeps its own."""
        first = ops.expand_dims(ops.argmax(logits, -1), -1)
        classes = ops.arange(logits.shape[-1], dtype=first.dtype)
        keys = keras.random.uniform(ops.shape(logits), seed=self.seed_generator)
        # The first class in front, the others behind it in random order ...
        order = ops.argsort(ops.where(classes == first, -1.0, keys), -1)
        # ... and where in that line each class stands when the others are in theirs.
        place = ops.where(classes < first, classes + 1, classes)
        place = ops.where(classes == first, 0, place)
        return ops.take_along_axis(order, ops.cast(place, order.dtype), -1)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "seed": self.seed}
