"""Rows that are compared with each other: which of them are in the batch."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


class Rows:
    """The rows that take part, as the losses across the batch need them.

    A row of weight 0 is not in the batch. It cannot be cut out (shapes must not
    depend on weights under XLA), so its contents are replaced by zeros and its pairs
    are masked.

    Args:
        loss: Named in errors.
        y_true: The teacher's knowledge, first axis the batch.
        y_pred: The student's knowledge, first axis the batch.
        rows: Floats `(B,)`, 1 for a row in the batch, 0 for one that is not; None if
            all are.
        alone: Whether the loss makes sense for a single row.

    Attributes:
        kept: The floats.
        count: How many rows are in the batch, at least 1 (to divide by).
        counted: The floats, but all 0 for a lone row, which has no relations.

    Raises:
        ValueError: If the sizes of the batches differ or are known to be 1.
    """

    def __init__(
        self, loss: Any, y_true: Any, y_pred: Any, rows: Any, alone: bool = False
    ) -> None:
        true, pred = y_true.shape[0], y_pred.shape[0]
        if true != pred and None not in (true, pred):
            raise ValueError(
                f"{type(loss).__name__} needs as many teacher rows as student rows. "
                f"Received: {true} and {pred}"
            )
        if 1 in (true, pred) and not alone:
            raise ValueError(
                f"{type(loss).__name__} compares the rows of a batch with each other "
                f"and needs at least two. Received: student {tuple(y_pred.shape)}"
            )
        self._all = rows is None
        if rows is None:
            rows = ops.ones(ops.shape(y_pred)[:1], loss.dtype)
        self.kept = rows
        total = ops.sum(rows)
        self.count = ops.maximum(total, 1.0)
        self.counted = rows if alone else rows * ops.cast(total > 1, loss.dtype)

    def select(self, x: Any) -> Any:
        """Puts zeros in place of rows that are not in the batch (also of NaN)."""
        if self._all:
            return x
        kept = ops.reshape(self.kept, (-1,) + (1,) * (len(x.shape) - 1))
        return ops.where(kept > 0, x, 0.0)

    def columns(self, values: Any) -> Any:
        """Puts zeros where the second row of a pair, `(B, B)`, is not in the batch."""
        return values if self._all else values * self.kept

    def others(self) -> Any:
        """`(B, B)`: 1 for two different rows that are both in the batch, else 0."""
        place = ops.cumsum(ops.ones_like(self.kept))
        different = ops.cast(ops.expand_dims(place, 1) != place, self.kept.dtype)
        return different * outer(self.kept)

    def result(self, values: Any) -> Any:
        """Values per row, 0 for rows not in the batch and for a lone row."""
        return ops.where(self.counted > 0, values, 0.0)


@ops.custom_gradient
def gram(x: Any) -> Any:
    """Inner products of all pairs of rows, `(B, D)` to `(B, B)`.

    The gradient takes one product of matrices; automatic differentiation, which does
    not know that both factors are the same, takes two.
    """

    def grad(*args: Any, upstream: Any = None) -> Any:
        upstream = args[0] if upstream is None else upstream
        return ops.matmul(upstream + ops.transpose(upstream), x)

    return ops.matmul(x, ops.transpose(x)), grad


@ops.custom_gradient
def squared_distances(x: Any, kept: Any) -> Any:
    """Squared distances of all pairs of rows, `(B, D)` to `(B, B)`.

    Both the products and the squares come from one Gram matrix (of the centred rows,
    for its error grows with the distance from the origin), so that they are rounded
    alike. What is not above the rounding error is exactly 0 and has gradient 0.

    Args:
        x: Rows, float `(B, D)`.
        kept: Floats `(B,)`; pairs with a row that has 0 here get 0.
    """
    rows = ops.expand_dims(kept > 0, 1)
    x = ops.where(rows, x, 0.0)
    x = x - ops.sum(x, 0, keepdims=True) / ops.maximum(ops.sum(kept), 1.0)
    products = ops.matmul(x, ops.transpose(x))
    squares = ops.diagonal(products)
    both = ops.expand_dims(squares, 1) + squares
    distances = (both - 2 * products) * outer(kept)
    apart = distances > ROUNDING[keras.backend.standardize_dtype(x.dtype)] * both

    def grad(*args: Any, upstream: Any = None) -> Any:
        upstream = args[0] if upstream is None else upstream
        slope = ops.where(apart, upstream + ops.transpose(upstream), 0.0)
        slope = 2 * (ops.sum(slope, 1, keepdims=True) * x - ops.matmul(slope, x))
        return slope, ops.zeros_like(kept)

    return ops.where(apart, distances, 0.0), grad


def outer(x: Any) -> Any:
    """Products of all pairs of numbers, `(B,)` to `(B, B)`."""
    return ops.expand_dims(x, 1) * x


# Eight times the distance from 1 to the next number.
ROUNDING = {"float32": 2.0**-20, "float64": 2.0**-49}


def safe_sqrt(x: Any) -> Any:
    """Square root with gradient 0, instead of infinity, at 0."""
    positive = x > 0
    return ops.where(positive, ops.sqrt(ops.where(positive, x, 1.0)), 0.0)
