"""Grids of features: their size, pooling them and resizing them (channels last)."""

from __future__ import annotations

from typing import Any

from keras import ops


def resample(x: Any, grid: tuple[int | None, ...]) -> Any:
    """Brings the axes between batch and channels to other sizes.

    An axis of n positions that becomes smaller, m, is pooled: the windows
    `[floor(i n / m), ceil((i + 1) n / m))` are averaged, ordinary average pooling
    where m divides n, overlapping windows elsewhere. One that becomes larger is
    interpolated linearly.

    Args:
        x: Features `(B, ..., C)`.
        grid: The new size of each axis; None leaves an axis as it is.

    Returns:
        Features `(B, *grid, C)`.
    """
    for axis, size in enumerate(grid, start=1):
        if size is not None and x.shape[axis] not in (None, size):
            old = x.shape[axis]
            weigh = _pooling if size < old else _interpolation
            x = _mix(x, axis, [weigh(i, old, size) for i in range(size)])
    return x


def resample_nearest(x: Any, grid: tuple[int, ...]) -> Any:
    """Like `resample`, but each new position copies the nearest old one."""
    for axis, size in enumerate(grid, start=1):
        old = x.shape[axis]
        if old != size:
            nearest = [i * old // size for i in range(size)]
            x = _mix(x, axis, [[float(j == n) for j in range(old)] for n in nearest])
    return x


def _pooling(i: int, old: int, new: int) -> list[float]:
    start, stop = i * old // new, -(-(i + 1) * old // new)
    return [(start <= j < stop) / (stop - start) for j in range(old)]


def _interpolation(i: int, old: int, new: int) -> list[float]:
    place = min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1.0)
    return [max(0.0, 1.0 - abs(place - j)) for j in range(old)]


def _mix(x: Any, axis: int, weights: list[list[float]]) -> Any:
    """Replaces an axis by weighted sums over it, one row of weights for each."""
    matrix = ops.transpose(ops.convert_to_tensor(weights, dtype=x.dtype))
    return ops.moveaxis(ops.matmul(ops.moveaxis(x, axis, -1), matrix), -1, axis)


def pool_to_smaller(a: Any, b: Any) -> tuple[Any, Any]:
    """Average-pools two grids, axis by axis the larger one, to the same size."""
    grid = tuple(
        None if None in (m, n) else min(m, n)
        for m, n in zip(a.shape[1:-1], b.shape[1:-1], strict=True)
    )
    return resample(a, grid), resample(b, grid)


def flatten_positions(x: Any) -> Any:
    """Features `(B, ..., C)` as matrices `(B, positions, C)`."""
    # The product is spelled out: with -1 the number of positions would be unknown
    # whenever the batch is.
    sizes = ops.shape(x)[1:-1]
    positions = 1
    for size in sizes:
        positions = positions * size
    return ops.reshape(x, (-1, positions, x.shape[-1]))


def normalize(x: Any, axis: Any = -1) -> Any:
    """Divides by the L2 norm over `axis`; a norm up to 1e-12 gives zeros.

    At zero the direction is not defined; there the gradient is 0.
    """
    square = ops.sum(ops.square(x), axis, keepdims=True)
    positive = square > 1e-24
    return ops.where(positive, x * ops.rsqrt(ops.where(positive, square, 1.0)), 0.0)
