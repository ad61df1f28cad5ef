"""The cubic part of the angle loss, without a tensor that holds all of it."""

from __future__ import annotations

from typing import Any

from keras import ops

# Vertices taken at once: a few (BLOCK, B, B) tensors are all the memory it takes.
BLOCK = 8


@ops.custom_gradient
def huber(gap: Any) -> Any:
    """Huber's function (δ = 1): half the square, linear beyond 1."""
    clipped = ops.clip(gap, -1.0, 1.0)

    def grad(*args: Any, upstream: Any = None) -> Any:
        return (args[0] if upstream is None else upstream) * clipped

    return clipped * (gap - 0.5 * clipped), grad


@ops.custom_gradient
def angle_differences(teacher: Any, student: Any) -> Any:
    """Sums of Huber's function over the angles at each vertex.

    With squared distances `D`, where 0 stands for a pair without a direction (equal
    rows, rows not in the batch), the cosine at vertex i between j and k follows from
    the law of cosines, `(D_ij + D_ik - D_jk) / (2 sqrt(D_ij D_ik))`.

    Args:
        teacher: Squared distances `(B, B)`.
        student: Squared distances `(B, B)`.

    Returns:
        `(B,)`: for vertex i the sum over j and k of Huber's function (δ = 1) of the
        difference of the two cosines.
    """

    def grad(*args: Any, upstream: Any = None) -> Any:
        upstream = args[0] if upstream is None else upstream
        # Huber's function is even: teacher and student change places. Where nobody
        # asks for the teacher's gradient, a compiled step drops its loop.
        return _slopes(student, teacher, upstream), _slopes(teacher, student, upstream)

    return _values(teacher, student), grad


class _Cosines:
    """The cosines at a block of vertices, from squared distances `(B, B)`."""

    def __init__(self, distances: Any) -> None:
        self.distances = distances
        self.sides = split(distances)
        apart = self.sides > 0
        self.inverses = ops.where(
            apart, ops.rsqrt(ops.where(apart, self.sides, 1.0)), 0.0
        )

    def __call__(self, block: Any) -> Any:
        """`(BLOCK, B, B)`, 0 where a pair has no direction."""
        sides, inverses = self.sides[block], self.inverses[block]
        products = ops.expand_dims(sides, 2) + ops.expand_dims(sides, 1)
        products = (products - self.distances) * ops.expand_dims(inverses, 2)
        return products * ops.expand_dims(0.5 * inverses, 1)


def split(x: Any) -> Any:
    """Cuts the first axis into blocks, the last one filled up with zeros."""
    size = ops.shape(x)[0]
    blocks = (size + BLOCK - 1) // BLOCK
    x = ops.pad(x, [(0, blocks * BLOCK - size)] + [(0, 0)] * (len(x.shape) - 1))
    return ops.reshape(x, (-1, BLOCK, *ops.shape(x)[1:]))


def _values(teacher: Any, student: Any) -> Any:
    first, second = _Cosines(teacher), _Cosines(student)

    def body(block: Any, sums: Any) -> Any:
        values = ops.sum(huber(second(block) - first(block)), (1, 2))
        return ops.scatter_update(sums, [[block]], ops.expand_dims(values, 0))

    sums = ops.zeros_like(first.sides[:, :, 0])
    sums = ops.fori_loop(0, ops.shape(sums)[0], body, sums)
    return ops.reshape(sums, (-1,))[: ops.shape(teacher)[0]]


def _slopes(teacher: Any, student: Any, upstream: Any) -> Any:
    """Gradient of the weighted sum of the values for the student's distances."""
    first, second = _Cosines(teacher), _Cosines(student)
    weights = ops.expand_dims(split(upstream), -1)

    def body(block: Any, state: Any) -> Any:
        adjacent, opposite = state
        cosines, inverses = second(block), second.inverses[block]
        slopes = ops.clip(cosines - first(block), -1.0, 1.0)
        # D_ij enters the cosine as a summand and under the root, D_jk as a summand.
        roots = ops.sum(slopes * cosines, -1)
        slopes = slopes * ops.expand_dims(inverses, 1)
        weighted = weights[block] * inverses
        own = weighted * (ops.sum(slopes, -1) - inverses * roots)
        adjacent = ops.scatter_update(adjacent, [[block]], ops.expand_dims(own, 0))
        opposite = opposite + ops.sum(slopes * ops.expand_dims(weighted, -1), 0)
        return adjacent, opposite

    state = ops.zeros_like(second.sides), ops.zeros_like(student)
    adjacent, opposite = ops.fori_loop(0, ops.shape(second.sides)[0], body, state)
    adjacent = ops.reshape(adjacent, (-1, ops.shape(student)[1]))
    return adjacent[: ops.shape(student)[0]] - 0.5 * opposite
