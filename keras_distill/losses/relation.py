"""Knowledge in the relations between the samples of a batch.

In all formulas i and j run over the n rows of the batch; rows of weight 0 are not in
the batch. The value of row i is the part of the paper's sum whose first index is i,
scaled so that the mean over the rows is the paper's value.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_distill.losses.angles import angle_differences, huber
from keras_distill.losses.base import (
    PACKAGE,
    DistillationLoss,
    check_positive,
    check_rank,
)
from keras_distill.losses.batch import Rows, gram, safe_sqrt, squared_distances


@keras.saving.register_keras_serializable(package=PACKAGE)
class RelationalDistance(DistillationLoss):
    r"""Relational distillation of distances.

    With `ψ_ij = |x_i - x_j| / μ` and μ the mean of all distances between two rows, of
    student and teacher each, and h Huber's function (δ = 1), row i gets

    $$\frac{1}{n} \sum_j h(\psi^s_{ij} - \psi^t_{ij})$$

    The student's μ carries a gradient. Equal rows have distance 1e-6, with gradient
    0, as in the released code. Other implementations average μ over the diagonal, too,
    or normalise the embeddings first.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher embeddings, float `(B, D_t)`, B of at least 2.
        y_pred: Student embeddings, float `(B, D_s)`.

    Raises:
        ValueError: If the embeddings are not matrices of as many rows, or the batch is
            one row.

    Example:

    >>> loss = RelationalDistance()
    >>> print(f"{float(loss([[0.0], [1.0], [2.0]], [[0.0], [1.0], [1.0]])):.4f}")
    0.1250

    References:
        Park et al., Relational Knowledge Distillation, CVPR 2019 (arXiv 1904.05068).
    """

    across_batch = True

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        batch = embeddings(self, y_true, y_pred, rows)
        others = batch.others()
        pairs = ops.maximum(batch.count * (batch.count - 1), 1.0)

        def relative(x: Any) -> Any:
            squares = squared_distances(x, batch.kept)
            distances = ops.sqrt(ops.maximum(squares, 1e-12)) * others
            mean = ops.sum(distances) / pairs
            return distances / ops.where(mean > 0, mean, 1.0)

        values = ops.sum(huber(relative(y_pred) - relative(y_true)), -1)
        return batch.result(values / batch.count)


@keras.saving.register_keras_serializable(package=PACKAGE)
class RelationalAngle(DistillationLoss):
    r"""Relational distillation of angles.

    With `e_ij` the unit vector from row i to row j (0 for equal rows) and h Huber's
    function (δ = 1), row i, the vertex, gets

    $$\frac{1}{n^2} \sum_{j,k} h(\langle e^s_{ij}, e^s_{ik} \rangle
      - \langle e^t_{ij}, e^t_{ik} \rangle)$$

    The cosines are computed from the matrix of squared distances, a few vertices at a
    time, and once more for the gradient: neither the `(B, B, D)` tensor of differences
    nor all `(B, B, B)` cosines are ever held. Pairs of rows whose distance drowns in
    rounding have no direction; their gradient, which the released code multiplies by
    1e12, is 0.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher embeddings, float `(B, D_t)`, B of at least 2.
        y_pred: Student embeddings, float `(B, D_s)`.

    Raises:
        ValueError: If the embeddings are not matrices of as many rows, or the batch is
            one row.

    Example:

    >>> loss = RelationalAngle()
    >>> teacher = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    >>> student = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    >>> print(f"{float(loss(teacher, student)):.4f}")
    0.0370

    References:
        Park et al., Relational Knowledge Distillation, CVPR 2019 (arXiv 1904.05068).
    """

    across_batch = True

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        batch = embeddings(self, y_true, y_pred, rows)
        teacher, student = (squared_distances(x, batch.kept) for x in (y_true, y_pred))
        return batch.result(angle_differences(teacher, student) / batch.count**2)


@keras.saving.register_keras_serializable(package=PACKAGE)
class ProbabilisticTransfer(DistillationLoss):
    r"""Probabilistic knowledge transfer: who is whose neighbour.

    The cosine of every two rows (1e-7 is added to the norms) is mapped to
    `(1 + cos) / 2`, and every row of this matrix is divided by its sum. With these
    conditional probabilities p row i gets

    $$\frac{1}{n} \sum_j p^t_{ij} \log \frac{p^t_{ij} + 10^{-7}}{p^s_{ij} + 10^{-7}}$$

    The mean runs over all n² entries, as in the released code: n times less than a
    divergence. The usual weight is 30000.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher embeddings, float `(B, D_t)`, B of at least 2.
        y_pred: Student embeddings, float `(B, D_s)`.

    Raises:
        ValueError: If the embeddings are not matrices of as many rows, or the batch is
            one row.

    Example:

    >>> loss = ProbabilisticTransfer()
    >>> print(f"{float(loss([[1.0, 0.0], [1.0, 0.1]], [[1.0, 0.0], [0.0, 1.0]])):.4f}")
    0.0292

    References:
        Passalis, Tefas, Learning Deep Representations with Probabilistic Knowledge
        Transfer, ECCV 2018 (arXiv 1803.10837).
    """

    across_batch = True

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        batch = embeddings(self, y_true, y_pred, rows)
        p, q = self._neighbours(y_true, batch), self._neighbours(y_pred, batch)
        values = ops.sum(p * (ops.log(p + 1e-7) - ops.log(q + 1e-7)), -1)
        return batch.result(values / batch.count)

    def _neighbours(self, x: Any, batch: Rows) -> Any:
        x = batch.select(x)
        norms = safe_sqrt(ops.sum(ops.square(x), -1, keepdims=True))
        # A row of zeros has no direction: gradient 0, not 1 / 1e-7.
        scale = ops.where(norms > 0, 1 / (norms + 1e-7), 0.0)
        closeness = batch.columns(0.5 * gram(x * scale) + 0.5)
        sums = ops.sum(closeness, -1, keepdims=True)
        return closeness / ops.where(sums > 0, sums, 1.0)


@keras.saving.register_keras_serializable(package=PACKAGE)
class SimilarityPreserving(DistillationLoss):
    r"""Similarity preserving: the same pairs of samples excite the network alike.

    With F the features as a `(B, everything else)` matrix and `G = F Fᵀ`, each row of
    it divided by its Euclidean norm, row i gets

    $$\frac{1}{n} \sum_j (G^s_{ij} - G^t_{ij})^2$$

    A row without features (all 0) stays 0 and has gradient 0. The usual weight is
    3000.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher features, float `(B, ...)`, B of at least 2.
        y_pred: Student features, float `(B, ...)`; only B must agree.

    Raises:
        ValueError: If the numbers of rows differ, or the batch is one row.

    Example:

    >>> loss = SimilarityPreserving()
    >>> print(f"{float(loss([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]])):.4f}")
    0.2929

    References:
        Tung, Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019
        (arXiv 1907.09682).
    """

    across_batch = True

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        for who, x in (("teacher", y_true), ("student", y_pred)):
            if len(x.shape) < 2:
                raise ValueError(
                    f"SimilarityPreserving needs {who} features of shape (batch, ...). "
                    f"Received: {tuple(x.shape)}"
                )
        batch = Rows(self, y_true, y_pred, rows)
        gap = self._similarity(y_pred, batch) - self._similarity(y_true, batch)
        return batch.result(ops.sum(ops.square(gap), -1) / batch.count)

    def _similarity(self, x: Any, batch: Rows) -> Any:
        products = gram(batch.select(ops.reshape(x, (-1, math.prod(x.shape[1:])))))
        squares = ops.sum(ops.square(products), -1, keepdims=True)
        some = squares > 1e-24
        return products * ops.where(some, ops.rsqrt(ops.where(some, squares, 1.0)), 0.0)


@keras.saving.register_keras_serializable(package=PACKAGE)
class CorrelationCongruence(DistillationLoss):
    r"""Correlation congruence: a Gaussian kernel between samples.

    For rows of length 1 the kernel `exp(-γ |x_i - x_j|²)` is expanded to order P,

    $$K_{ij} = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} (x_i \cdot x_j)^p$$

    and row i gets `(1 / n) Σ_j (K^s_ij - K^t_ij)²`. The rows are taken as they are:
    normalise them before (`keras.layers.UnitNormalization`). This is the paper's
    formula; under the same name a product of consecutive differences circulates,
    which depends on the order of the rows.

    Args:
        gamma: γ, above 0.
        order: P, at least 1.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher embeddings of length 1, float `(B, D_t)`, B of at least 2.
        y_pred: Student embeddings of length 1, float `(B, D_s)`.

    Raises:
        ValueError: If an argument is out of its range, the embeddings are not matrices
            of as many rows, or the batch is one row.

    Example:

    >>> loss = CorrelationCongruence()
    >>> print(f"{float(loss([[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]])):.4f}")
    0.1266

    References:
        Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019
        (arXiv 1904.01802).
    """

    across_batch = True

    def __init__(self, gamma: float = 0.4, order: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("gamma", gamma)
        if order < 1 or order != int(order):
            raise ValueError(
                f"`order` must be a whole number of at least 1. Received: {order!r}"
            )
        self.gamma = gamma
        self.order = int(order)

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        batch = embeddings(self, y_true, y_pred, rows)
        gap = self._kernel(y_pred, batch) - self._kernel(y_true, batch)
        values = ops.sum(batch.columns(ops.square(gap)), -1)
        return batch.result(values / batch.count)

    def _kernel(self, x: Any, batch: Rows) -> Any:
        products = 2 * self.gamma * gram(batch.select(x))
        kernel = ops.ones_like(products)
        for power in range(self.order, 0, -1):  # Horner's scheme
            kernel = 1 + products * kernel / power
        return math.exp(-2 * self.gamma) * kernel

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "gamma": self.gamma, "order": self.order}


def embeddings(loss: Any, y_true: Any, y_pred: Any, rows: Any) -> Rows:
    """The rows of two matrices of embeddings, whose widths may differ."""
    check_rank(loss, "teacher", y_true, 2, "(batch, width)")
    check_rank(loss, "student", y_pred, 2, "(batch, width)")
    return Rows(loss, y_true, y_pred, rows)
