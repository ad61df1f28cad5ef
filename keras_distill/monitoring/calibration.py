"""Calibration: whether a network is as sure as it is right."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Calibration(NamedTuple):
    """How far confidence and accuracy are apart.

    Attributes:
        error: The expected calibration error.
        confidence: Mean confidence per bin; NaN in an empty one.
        accuracy: Share of right rows per bin; NaN in an empty one.
        rows: Rows per bin.
    """

    error: float
    confidence: np.ndarray
    accuracy: np.ndarray
    rows: np.ndarray


def calibration(probabilities: Any, labels: Any, bins: int = 15) -> Calibration:
    r"""Expected calibration error, over bins of equal width.

    $$\mathrm{ECE} = \sum_b \frac{n_b}{N} |\text{accuracy}_b - \text{confidence}_b|$$

    where bin b holds the rows whose highest probability is in (b / B, (b + 1) / B].

    Args:
        probabilities: `(N, C)`.
        labels: Integers `(N,)`.
        bins: B.

    Example:

    >>> round(calibration([[0.8, 0.2], [0.6, 0.4]], [0, 1], bins=5).error, 6)
    0.4

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017
        (arXiv 1706.04599).
    """
    probabilities = np.asarray(probabilities, "float64")
    confidence = probabilities.max(-1)
    right = probabilities.argmax(-1) == np.asarray(labels)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(place, confidence, bins) / count
        accuracy = np.bincount(place, right, bins) / count
    gaps = np.abs(np.nan_to_num(accuracy - mean_confidence))
    error = float(np.sum(count * gaps) / len(confidence))
    return Calibration(error, mean_confidence, accuracy, count)
