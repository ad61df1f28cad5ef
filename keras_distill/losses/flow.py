"""Knowledge in the flow from one layer to the next."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill.grids import flatten_positions, normalize, pool_to_smaller
from keras_distill.losses.base import (
    PACKAGE,
    DistillationLoss,
    check_positive,
    check_rank,
    number,
)
from keras_distill.losses.feature import GRID, check_variant

# Up to this share of the largest one, the difference of two squared singular values
# is rounding.
ROUNDING = {"float32": 1e-6, "float64": 1e-14}


@keras.saving.register_keras_serializable(package=PACKAGE)
class FlowOfProcedure(DistillationLoss):
    r"""FSP: how the channels of one layer go with the channels of the next.

    The flow of two features on the same grid is the matrix
    `G_ij = (1 / HW) Σ F1_i F2_j` over the positions. Each sample gets
    `‖G_teacher - G_student‖²` (Frobenius), summed over consecutive layers. If one grid
    is larger it is max-pooled, in the usual case of halved grids by 2 × 2 windows.
    `variant="repdistiller"` pools averages instead and takes the mean over the entries
    of G.

    Args:
        variant: None (the paper), or `"repdistiller"`.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: List of two (or more) consecutive teacher features, float
            `(B, H, W, C)`.
        y_pred: List of as many student features with the same channels.

    Raises:
        ValueError: If the features are no lists of grids, if channels differ, if a
            larger grid is no multiple of the smaller one, or if the variant is unknown.

    Example:

    >>> teacher = [[[[[1.0]]]], [[[[3.0]]]]]
    >>> student = [[[[[1.0]]]], [[[[1.0]]]]]
    >>> print(float(FlowOfProcedure()(teacher, student)))
    4.0

    References:
        Yim et al., A Gift from Knowledge Distillation: Fast Optimization, Network
        Minimization and Transfer Learning, CVPR 2017.
    """

    def __init__(self, variant: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_variant(variant, "repdistiller")
        self.variant = variant

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_flow(self, y_true, y_pred)
        reduce = ops.sum if self.variant is None else ops.mean
        return sum(
            reduce(ops.square(student - teacher), (1, 2))
            for teacher, student in zip(
                self._flows(y_true), self._flows(y_pred), strict=True
            )
        )

    def _flows(self, features: Any) -> list[Any]:
        pool = pool_to_smaller if self.variant else max_pool_to_smaller
        flows = []
        for pair in zip(features[:-1], features[1:], strict=True):
            first, second = (flatten_positions(x) for x in pool(*pair))
            positions = ops.cast(ops.shape(first)[1], first.dtype)
            flows.append(
                ops.matmul(ops.transpose(first, (0, 2, 1)), second) / positions
            )
        return flows

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "variant": self.variant}


def max_pool_to_smaller(a: Any, b: Any) -> tuple[Any, Any]:
    """Max-pools the larger of two grids to the size of the smaller one."""
    sizes = list(zip(a.shape[1:3], b.shape[1:3], strict=True))
    if all(None in pair or pair[0] == pair[1] for pair in sizes):
        return a, b
    if all(m % n == 0 for m, n in sizes):
        window = tuple(m // n for m, n in sizes)
        return ops.max_pool(a, window, window, data_format="channels_last"), b
    if all(n % m == 0 for m, n in sizes):
        window = tuple(n // m for m, n in sizes)
        return a, ops.max_pool(b, window, window, data_format="channels_last")
    raise ValueError(
        "FlowOfProcedure needs consecutive grids of which the larger is a multiple of "
        f"the smaller. Received: {tuple(a.shape)} and {tuple(b.shape)}"
    )


@keras.saving.register_keras_serializable(package=PACKAGE)
class SingularValue(DistillationLoss):
    r"""KD-SVD: the flow between the leading singular vectors of two layers.

    Each feature is a matrix `(H W, C)` per sample, of which the first `rank` right
    singular vectors are kept. For consecutive layers with vectors `v` and `w`, the flow
    is `R_ij = exp(-(v_i - w_j)² / beta)`, and each sample gets the sum of
    `(R_student - R_teacher)²`. A teacher vector's sign is chosen so that its entry of
    largest magnitude is positive; of the student's first `rank + 3` vectors the one
    most parallel to it is taken, with the sign that makes the cosine positive. For rank
    above 1 both vectors are multiplied by the teacher's singular value over the norm of
    the kept ones. Choice, signs and weights carry no gradient.

    The formula follows the official code, with the batch's mean instead of its sum.
    Its sign rule is missing there, so that values depend on the SVD routine; and its
    handwritten gradient differs from the derivative, which is computed here exactly.
    (Singular values that are equal up to rounding count as not interacting.) Features
    that are not finite give a loss that is not finite.

    Args:
        rank: Number of singular vectors, at least 1.
        beta: Width of the kernel, above 0.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: List of two (or more) consecutive teacher features, float
            `(B, H, W, C)`, with known H, W and C.
        y_pred: List of as many student features with the same channels.

    Raises:
        ValueError: If the features are no lists of grids, if channels differ, if the
            rank is below 1 or above min(H W, C), or if beta is not above 0.

    Example:

    >>> import keras
    >>> student = [keras.random.normal((2, 4, 4, 3)), keras.random.normal((2, 2, 2, 5))]
    >>> print(float(SingularValue()(student, student)))
    0.0

    References:
        Lee, Kim, Song, Self-supervised Knowledge Distillation Using Singular Value
        Decomposition, ECCV 2018 (arXiv 1807.06819).
    """

    def __init__(self, rank: int = 1, beta: float = 8.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(
                f"`rank` must be an integer of at least 1. Received: {rank!r}"
            )
        check_positive("beta", beta)
        self.rank = rank
        self.beta = number(beta)

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_flow(self, y_true, y_pred)
        teacher_vectors, student_vectors = [], []
        for teacher, student in zip(y_true, y_pred, strict=True):
            self._check_size("teacher", teacher)
            self._check_size("student", student)
            teacher_svd = LeadingVectors(teacher, self.dtype)
            student_svd = LeadingVectors(student, self.dtype)
            target = teacher_svd.first(self.rank)
            aligned = student_svd.closest(target, self.rank + 3)
            weight = normalize(teacher_svd.singular_values(self.rank))[:, None, :]
            teacher_vectors.append(target * weight)
            student_vectors.append(aligned * weight)
        return sum(
            ops.sum(ops.square(student - teacher), (1, 2, 3))
            for teacher, student in zip(
                self._flows(teacher_vectors), self._flows(student_vectors), strict=True
            )
        )

    def _flows(self, vectors: list[Any]) -> list[Any]:
        return [
            ops.exp(ops.square(v[:, :, None, :] - w[:, None, :, :]) / -self.beta)
            for v, w in zip(vectors[:-1], vectors[1:], strict=True)
        ]

    def _check_size(self, who: str, x: Any) -> None:
        if None in tuple(x.shape[1:]):
            raise ValueError(
                f"SingularValue needs {who} features of known size. "
                f"Received: {tuple(x.shape)}"
            )
        largest = min(x.shape[1] * x.shape[2], x.shape[3])
        if self.rank > largest:
            raise ValueError(
                f"`rank` must be at most min(H * W, C), {largest} for {who} features "
                f"of shape {tuple(x.shape)}. Received: {self.rank}"
            )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rank": self.rank, "beta": self.beta}


class LeadingVectors:
    """The leading right singular vectors of features `(B, H, W, C)`, as matrices.

    They are eigenvectors of the smaller one of the two Gram matrices, which is much
    cheaper to decompose than the features. No gradient flows through the
    decomposition: each vector that is asked for gets its exact derivative afterwards.
    """

    def __init__(self, x: Any, dtype: str) -> None:
        matrix = flatten_positions(x)
        transposed = ops.transpose(matrix, (0, 2, 1))
        self.wide = matrix.shape[1] < matrix.shape[2]
        # Eigenvectors of AᵀA are sought. Its derivative is dAᵀA and the transpose of
        # that: half of the product needs to be differentiable.
        self.a, at = (transposed, matrix) if self.wide else (matrix, transposed)
        half = ops.matmul(ops.stop_gradient(at), self.a)
        gram = ops.stop_gradient(half)
        half_change = half - gram
        self.change = half_change + ops.transpose(half_change, (0, 2, 1))
        # LAPACK stops the program at a NaN; this way it ends up in the loss, through
        # `_differentiable`.
        finite = ops.all(ops.isfinite(gram), (1, 2), keepdims=True)
        values, vectors = ops.eigh(ops.where(finite, gram, 0.0))
        self.values = ops.stop_gradient(ops.flip(values, -1))
        self.vectors = ops.stop_gradient(ops.flip(vectors, -1))
        self.rounding = ROUNDING[dtype]

    def singular_values(self, count: int) -> Any:
        """The first singular values, without gradient: `(B, count)`."""
        return ops.sqrt(ops.maximum(self.values[:, :count], 0.0))

    def first(self, count: int) -> Any:
        """The first vectors, their largest entry positive: `(B, C, count)`."""
        vectors = self._right(self.vectors[:, :, :count], self.values[:, :count])
        largest = ops.one_hot(
            ops.argmax(ops.abs(vectors), 1), vectors.shape[1], axis=1, dtype=self._dtype
        )
        entry = ops.stop_gradient(ops.sum(vectors * largest, 1, keepdims=True))
        return vectors * _sign(entry)

    def closest(self, target: Any, count: int) -> Any:
        """For each target the most parallel one of the first vectors, same direction.

        Args:
            target: Vectors `(B, C, K)`.
            count: Number of vectors to choose from.

        Returns:
            Vectors `(B, C, K)`.
        """
        vectors, values = self.vectors[:, :, :count], self.values[:, :count]
        candidates = ops.matmul(self.a, vectors) if self.wide else vectors
        candidates = ops.stop_gradient(normalize(candidates, axis=1))
        cosine = ops.matmul(ops.transpose(candidates, (0, 2, 1)), target)
        cosine = ops.stop_gradient(cosine)
        chosen = ops.one_hot(
            ops.argmax(ops.abs(cosine), 1), cosine.shape[1], axis=1, dtype=self._dtype
        )
        sign = _sign(ops.sum(cosine * chosen, 1, keepdims=True))
        value = ops.squeeze(ops.matmul(values[:, None, :], chosen), 1)
        return self._right(ops.matmul(vectors, chosen), value) * sign

    @property
    def _dtype(self) -> str:
        return keras.backend.standardize_dtype(self.vectors.dtype)

    def _right(self, vectors: Any, values: Any) -> Any:
        """Eigenvectors of AᵀA as right singular vectors, differentiable."""
        vectors = self._differentiable(vectors, values)
        return normalize(ops.matmul(self.a, vectors), axis=1) if self.wide else vectors

    def _differentiable(self, vectors: Any, values: Any) -> Any:
        """Adds to eigenvectors a term of value 0 that has their derivative.

        A change dG of G = AᵀA turns `v` by `Σ_j v_j (v_jᵀ dG v) / (λ - λ_j)` over the
        other eigenvectors. This is linear in `dG v`, the change of `AᵀA v` for fixed
        `v`.
        """
        change = ops.matmul(self.change, vectors)
        gap = values[:, None, :] - self.values[:, :, None]
        apart = ops.abs(gap) > self.rounding * self.values[:, None, :1]
        inverse = ops.where(apart, 1.0 / ops.where(apart, gap, 1.0), 0.0)
        turn = ops.matmul(ops.transpose(self.vectors, (0, 2, 1)), change) * inverse
        return vectors + ops.matmul(self.vectors, turn)


def _sign(x: Any) -> Any:
    return ops.where(x < 0, -ops.ones_like(x), ops.ones_like(x))


def check_flow(loss: Any, y_true: Any, y_pred: Any) -> None:
    """Raises ValueError unless both are lists of grids with the same channels."""
    for name, features in (("y_true", y_true), ("y_pred", y_pred)):
        if not isinstance(features, (list, tuple)) or len(features) < 2:
            raise ValueError(
                f"{type(loss).__name__} needs `{name}` to be a list of the features of "
                "consecutive layers, two at least. Received: "
                f"{len(features) if isinstance(features, list) else 1}"
            )
    if len(y_true) != len(y_pred):
        raise ValueError(
            f"{type(loss).__name__} compares equal numbers of layers. Received: "
            f"{len(y_true)} teacher and {len(y_pred)} student features."
        )
    for teacher, student in zip(y_true, y_pred, strict=True):
        check_rank(loss, "teacher", teacher, 4, GRID)
        check_rank(loss, "student", student, 4, GRID)
        if teacher.shape[-1] != student.shape[-1]:
            raise ValueError(
                f"{type(loss).__name__} needs the same channels in teacher and "
                f"student. Received: {teacher.shape[-1]} and {student.shape[-1]}. An "
                "adapter brings the student's channels to the teacher's."
            )
