"""What each term of a distiller says about one batch."""

from __future__ import annotations

import dataclasses
from typing import Any

from keras_distill.base import BaseDistiller
from keras_distill.tables import text_table


@dataclasses.dataclass(frozen=True)
class TermRow:
    """One term on one batch.

    Attributes:
        term: Its name: `hard`, `soft`, a link's or another term's, `regularization`.
        value: The term without its weight; None if it was not computed.
        weight: Its weight.
        gradient_norm: Norm of the weighted term's gradient over the student's weights.
        share: This norm as a share of the sum of all norms.
    """

    term: str
    value: float | None
    weight: float
    gradient_norm: float
    share: float


def explain(
    distiller: BaseDistiller, batch: Any, *, verbose: bool = True
) -> list[TermRow]:
    """Prints each term's value, weight and gradient norm on one batch.

    The batch goes through the networks as in a training step, dropout included, but
    nothing is changed by it: no weight, no statistic, no state of a random generator,
    no metric. Terms whose gradients are a thousand times another's decide alone what
    is learned.

    Args:
        distiller: A compiled distiller.
        batch: `x`, or a tuple `(x, y)` or `(x, y, sample_weight)`.
        verbose: Whether the table is printed.

    Returns:
        One `TermRow` per term.

    Raises:
        TypeError: If `distiller` is not a distiller.
        ValueError: If it is not compiled.

    Example:

    ```python
    rows = kd.explain(distiller, (x[:64], y[:64]))
    ```
    """
    if not isinstance(distiller, BaseDistiller):
        raise TypeError(f"`distiller` must be a distiller. Received: {distiller!r}")
    if not distiller.compiled:
        raise ValueError("Compile the distiller first: the hard term is part of that.")
    found = distiller.terms_of_batch(batch)
    total = sum(norm for *_, norm in found.values()) or 1.0
    rows = [
        TermRow(name, value, weight, norm, norm / total)
        for name, (value, weight, norm) in found.items()
    ]
    if verbose:
        print(_table(rows))
    return rows


def _table(rows: list[TermRow]) -> str:
    cells = [
        [
            row.term,
            "not computed" if row.value is None else f"{row.value:.6g}",
            f"{row.weight:.6g}",
            f"{row.gradient_norm:.6g}",
            f"{row.share:.1%}",
        ]
        for row in rows
    ]
    return text_table(["term", "value", "weight", "gradient norm", "share"], cells)
