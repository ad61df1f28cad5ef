"""Knowledge in the logits of a whole batch: how classes go together."""

from __future__ import annotations

from collections.abc import Sequence
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
from keras_distill.losses.batch import Rows, gram, safe_sqrt
from keras_distill.losses.response import check_logits
from keras_distill.losses.tempered import TemperedLoss


@keras.saving.register_keras_serializable(package=PACKAGE)
class DIST(TemperedLoss):
    r"""DIST: correlations in place of a divergence, along rows and along columns.

    With `P = softmax(logits / T)` of student and teacher and ρ Pearson's correlation
    (1e-8 is added to the product of the norms), row b gets

    $$T^2 \left(\beta (1 - \rho(P^s_b, P^t_b))
      + \gamma \frac{1}{C} \sum_k (1 - \rho(P^s_{:k}, P^t_{:k}))\right)$$

    The second sum belongs to the batch as a whole: every row gets it. Rows of weight 0
    have no part in it. Where the authors' two implementations differ, the one for
    classification (with a temperature) is followed.

    Args:
        beta: Weight of the correlation over classes, at least 0.
        gamma: Weight of the correlation over the batch, at least 0.
        temperature: T, above 0. May be a variable: changes take effect at once;
            or a `kd.LearnedTemperature`.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher logits, float `(B, C)`, B of at least 2.
        y_pred: Student logits, float `(B, C)`.

    Raises:
        ValueError: If an argument is out of its range, the shapes differ, or the batch
            is one row.

    Example:

    >>> loss = DIST(temperature=1.0)
    >>> logits = [[2.0, 0.0], [0.0, 1.0]]
    >>> print(f"{abs(float(loss(logits, logits))):.4f}")
    0.0000

    References:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022
        (arXiv 2205.10536).
    """

    across_batch = True

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: Any = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(temperature, **kwargs)
        check_weight("beta", beta)
        check_weight("gamma", gamma)
        self.beta = beta
        self.gamma = gamma

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_matrix(self, y_true, y_pred)
        batch = Rows(self, y_true, y_pred, rows)
        temperature = self.current_temperature()
        p = ops.softmax(batch.select(y_true) / temperature)
        q = ops.softmax(batch.select(y_pred) / temperature)

        def centre(x: Any) -> Any:
            x = batch.select(x)
            return batch.select(x - ops.sum(x, 0, keepdims=True) / batch.count)

        inter = 1 - _correlation(
            p - ops.mean(p, -1, keepdims=True), q - ops.mean(q, -1, keepdims=True), -1
        )
        intra = 1 - _correlation(centre(p), centre(q), 0)
        values = self.beta * inter + self.gamma * ops.mean(intra)
        return batch.result(temperature**2 * values)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "beta": self.beta,
            "gamma": self.gamma,
        }


@keras.saving.register_keras_serializable(package=PACKAGE)
class MultiLevelLogit(DistillationLoss):
    r"""Multi-level logit distillation: instances, classes and the batch.

    With `P = softmax(logits / T)`, a `(B, C)` matrix, row b gets the sum over the
    temperatures of

    $$T^2 KL(P^t_b | P^s_b)
      + \frac{1}{C} \|{P^s}^\top P^s - {P^t}^\top P^t\|_F^2
      + \sum_j ((P^s {P^s}^\top)_{bj} - (P^t {P^t}^\top)_{bj})^2$$

    The second term belongs to the batch as a whole: every row gets it. Rows of weight
    0 have no part in any sum. These are the three terms as the paper describes them,
    without its selection of confident samples; the released code works on two views of
    each image, and its selection only scales the terms.

    The second and third term grow with the rows per class: next to nothing beside the
    first with a hundred classes and 128 rows, with ten they are as large. There begin
    with a smaller weight, or let it grow (`kd.schedules`).

    Args:
        temperatures: The temperatures, each above 0.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher logits, float `(B, C)`.
        y_pred: Student logits, float `(B, C)`.

    Raises:
        ValueError: If a temperature is not above 0, or the shapes differ.

    Example:

    >>> loss = MultiLevelLogit(temperatures=[1.0])
    >>> print(f"{float(loss([[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])):.4f}")
    0.1203

    References:
        Jin, Wang, Lin, Multi-Level Logit Distillation, CVPR 2023.
    """

    across_batch = True

    def __init__(
        self, temperatures: Sequence[float] = (2, 3, 4, 5, 6), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.temperatures = tuple(temperatures)
        if not self.temperatures:
            raise ValueError("`temperatures` must not be empty. Received: ()")
        for temperature in self.temperatures:
            check_positive("temperatures", temperature)

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_matrix(self, y_true, y_pred)
        batch = Rows(self, y_true, y_pred, rows, alone=True)
        y_true, y_pred = batch.select(y_true), batch.select(y_pred)
        terms = [self._level(y_true, y_pred, t, batch) for t in self.temperatures]
        return batch.result(sum(terms))

    def _level(self, y_true: Any, y_pred: Any, temperature: Any, batch: Rows) -> Any:
        temperature = ops.cast(temperature, self.dtype)
        log_p = ops.log_softmax(y_true / temperature)
        log_q = ops.log_softmax(y_pred / temperature)
        instance = ops.sum(ops.exp(log_p) * (log_p - log_q), -1) * temperature**2
        p, q = batch.select(ops.exp(log_p)), batch.select(ops.exp(log_q))
        rows = ops.sum(ops.square(gram(q) - gram(p)), -1)
        columns = gram(ops.transpose(q)) - gram(ops.transpose(p))
        return instance + rows + ops.sum(ops.square(columns)) / y_pred.shape[-1]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "temperatures": [number(t) for t in self.temperatures],
        }


def check_matrix(loss: DistillationLoss, teacher: Any, student: Any) -> None:
    """Raises ValueError unless both are `(B, C)` logits of the same classes."""
    check_logits(loss, teacher, student)
    if len(student.shape) != 2:
        raise ValueError(
            f"{type(loss).__name__} needs logits of shape (batch, classes). "
            f"Received: {tuple(student.shape)}"
        )


def _correlation(a: Any, b: Any, axis: int) -> Any:
    """Pearson's correlation of two tensors that are centred along the axis."""
    norms = safe_sqrt(ops.sum(ops.square(a), axis)) * safe_sqrt(
        ops.sum(ops.square(b), axis)
    )
    return ops.sum(a * b, axis) / (norms + 1e-8)
