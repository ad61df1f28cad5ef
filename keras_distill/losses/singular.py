"""The leading right singular vectors of a batch of matrices, and their derivative.

They are eigenvectors of the smaller one of the two Gram matrices, which is much cheaper
to decompose than the matrix itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_distill.grids import normalize

# Up to this share of the largest one, the difference of two eigenvalues is rounding.
ROUNDING = {"float32": 1e-6, "float64": 1e-14}

Solver = Callable[[Any, int], tuple[Any, Any]]


def right_vectors(matrix: Any, count: int, solve: Solver) -> Any:
    """The leading right singular vectors, in the order of the singular values.

    Differentiable, exactly but for singular values that are equal up to rounding: the
    vectors of such are taken as not turning into each other. Matrices that are not
    finite give vectors that are not finite.

    Args:
        matrix: Matrices `(B, M, N)`.
        count: How many; there are at most `min(M, N)`.
        solve: `by_decomposition`, or `by_powers` for few vectors.

    Returns:
        Vectors `(B, N, count)`, unit columns of unspecified sign.
    """
    count = min(count, matrix.shape[1], matrix.shape[2])
    if matrix.shape[1] >= matrix.shape[2]:
        return _eigenvectors(matrix, count, solve)
    transposed = ops.transpose(matrix, (0, 2, 1))
    left = _eigenvectors(transposed, count, solve)
    return normalize(ops.matmul(transposed, left), axis=1)


def largest_positive(vectors: Any) -> Any:
    """Vectors `(B, N, K)` with signs that make their largest entry positive."""
    largest = _one_hot(ops.argmax(ops.abs(vectors), 1), vectors)
    return vectors * _sign(ops.sum(vectors * largest, 1, keepdims=True))


def aligned(candidates: Any, target: Any) -> Any:
    """For each target the most parallel candidate, in the target's direction.

    Args:
        candidates: Vectors `(B, N, L)`.
        target: Vectors `(B, N, K)`.

    Returns:
        Vectors `(B, N, K)`.
    """
    cosine = ops.matmul(ops.transpose(candidates, (0, 2, 1)), target)
    cosine = ops.stop_gradient(cosine)
    chosen = _one_hot(ops.argmax(ops.abs(cosine), 1), cosine)
    return ops.matmul(candidates, chosen * _sign(cosine))


def by_decomposition(gram: Any, count: int) -> tuple[Any, Any]:
    """The leading eigenvectors, and all eigenvalues and eigenvectors."""
    values, vectors = ops.eigh(gram)  # in ascending order
    return ops.flip(vectors[:, :, -count:], -1), (values, vectors)


def by_powers(gram: Any, count: int) -> tuple[Any, None]:
    """The leading eigenvectors one by one, by squaring: cheaper where few are wanted.

    G, G⁴, G¹⁶, … soon consists of the first eigenvector alone. Where the trace of a
    power is 1, the trace of its square says by how much the others matter.
    """
    vectors: list[Any] = []
    for _ in range(count):
        power = ops.stop_gradient(_unit_trace(gram))
        # Vectors that are equal up to rounding never part: hence a limit.
        _, power = ops.while_loop(
            lambda mixed, power: ops.any(mixed > 1e-3),
            lambda mixed, power: _fourth_power(power),
            (ops.ones_like(power[:, 0, 0]), power),
            maximum_iterations=20,
        )
        # Without this XLA refuses the loop inside a condition that is differentiated.
        power = ops.stop_gradient(power)
        strongest = _one_hot(
            ops.argmax(ops.diagonal(power, axis1=1, axis2=2), -1)[:, None], power
        )
        vectors.append(normalize(ops.matmul(power, strongest), axis=1))
        image = ops.matmul(gram, vectors[-1])
        value = ops.sum(vectors[-1] * image, 1, keepdims=True)
        gram = gram - value * vectors[-1] * ops.transpose(vectors[-1], (0, 2, 1))
    return ops.concatenate(vectors, -1), None


def _fourth_power(power: Any) -> tuple[Any, Any]:
    """How mixed the argument is, and its fourth power."""
    square = ops.matmul(power, power)
    trace = ops.trace(square, axis1=1, axis2=2)
    mixed = ops.where(trace > 0, 1 - trace, 0.0)
    return mixed, _unit_trace(ops.matmul(square, square))


def _unit_trace(matrix: Any) -> Any:
    trace = ops.trace(matrix, axis1=1, axis2=2)[:, None, None]
    return matrix * ops.where(trace > 0, 1 / ops.where(trace > 0, trace, 1.0), 0.0)


def _eigenvectors(matrix: Any, count: int, solve: Solver) -> Any:
    """The leading eigenvectors of AᵀA for a matrix A, differentiable."""

    @ops.custom_gradient
    def eigenvectors(a: Any) -> tuple[Any, Any]:
        gram = ops.matmul(ops.transpose(a, (0, 2, 1)), a)
        # A decomposition ends the program where it meets a NaN.
        finite = ops.isfinite(ops.trace(gram, axis1=1, axis2=2))[:, None, None]
        gram = ops.where(finite, gram, 0.0)
        vectors, everything = solve(gram, count)

        def gradient(*args: Any, upstream: Any = None) -> Any:
            # A change dG of G = AᵀA turns v by Σ_j v_j (v_jᵀ dG v) / (λ - λ_j) over
            # the other eigenvectors.
            if upstream is None:
                (upstream,) = args
            values, basis = everything or by_decomposition(gram, count)[1]
            leading = ops.flip(values[:, None, -count:], -1)
            gap = leading - values[:, :, None]
            dtype = keras.backend.standardize_dtype(values.dtype)
            apart = ops.abs(gap) > ROUNDING[dtype] * leading[:, :, :1]
            inverse = ops.where(apart, 1.0 / ops.where(apart, gap, 1.0), 0.0)
            turn = ops.matmul(ops.transpose(basis, (0, 2, 1)), upstream) * inverse
            turn = ops.matmul(basis, turn)
            first = ops.matmul(a, ops.concatenate([turn, vectors], -1))
            second = ops.concatenate([vectors, turn], -1)
            return ops.matmul(first, ops.transpose(second, (0, 2, 1)))

        return ops.where(finite, vectors, float("nan")), gradient

    return eigenvectors(matrix)


def _one_hot(index: Any, like: Any) -> Any:
    dtype = keras.backend.standardize_dtype(like.dtype)
    return ops.one_hot(index, like.shape[1], axis=1, dtype=dtype)


def _sign(x: Any) -> Any:
    return ops.where(x < 0, -ops.ones_like(x), ops.ones_like(x))
