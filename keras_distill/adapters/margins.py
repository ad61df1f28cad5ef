"""The overhaul's margins, from the teacher's batch normalization."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops


def margins(batch_normalization: keras.layers.BatchNormalization) -> Any:
    r"""Margins for `MarginReLU`: what the teacher's negative responses are on average.

    A channel that leaves batch normalization is taken as normal with mean β and
    deviation `|γ|`; its margin is the mean of the negative part,
    `β - |γ| φ(β / |γ|) / Φ(-β / |γ|)`, or `-3 |γ|` where less than a thousandth of it
    is negative, as in the official code.

    Args:
        batch_normalization: The teacher's layer before the ReLU, built.

    Returns:
        Array of one number per channel, float64.

    Raises:
        TypeError: If the layer is not a BatchNormalization.
        ValueError: If it is not built.

    Example:

    >>> import keras
    >>> layer = keras.layers.BatchNormalization()
    >>> layer.build((None, 1))
    >>> print(f"{margins(layer)[0]:.4f}")
    -0.7979

    References:
        Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019
        (arXiv 1904.01866).
    """
    if not isinstance(batch_normalization, keras.layers.BatchNormalization):
        raise TypeError(
            "`batch_normalization` must be a keras.layers.BatchNormalization. "
            f"Received: {batch_normalization!r}"
        )
    if not batch_normalization.built:
        raise ValueError(
            f"The layer {batch_normalization.name!r} was never built: it has no "
            "statistics."
        )
    channels = batch_normalization.moving_mean.shape[0]
    gamma, beta = batch_normalization.gamma, batch_normalization.beta
    scale = [1.0] * channels if gamma is None else gamma.numpy().tolist()
    shift = [0.0] * channels if beta is None else beta.numpy().tolist()
    return ops.convert_to_numpy(
        [_margin(abs(g), b) for g, b in zip(scale, shift, strict=True)]
    )


def _margin(deviation: float, mean: float) -> float:
    if deviation == 0:
        return min(mean, 0.0)
    ratio = mean / deviation
    negative = math.erfc(ratio / math.sqrt(2)) / 2
    if negative <= 0.001:
        return -3 * deviation
    density = math.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    return mean - deviation * density / negative
