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
from keras_distill.losses.singular import (
    aligned,
    by_decomposition,
    by_powers,
    largest_positive,
    right_vectors,
)


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

    >>> import numpy as np
    >>> ones = np.ones((1, 2, 2, 1))
    >>> teacher, student = [ones, 3 * ones], [ones, ones]
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
    >>> print(f"{float(SingularValue()(student, student)):.6f}")
    0.000000

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
            matrix = flatten_positions(teacher)
            target = largest_positive(right_vectors(matrix, self.rank, by_powers))
            candidates = right_vectors(
                flatten_positions(student), self.rank + 3, by_decomposition
            )
            student_vector = aligned(candidates, target)
            if self.rank > 1:
                # ‖M v‖ is the singular value.
                image = ops.stop_gradient(ops.matmul(matrix, target))
                weight = ops.sqrt(ops.sum(ops.square(image), 1, keepdims=True))
                weight = normalize(weight)
                target, student_vector = target * weight, student_vector * weight
            teacher_vectors.append(target)
            student_vectors.append(student_vector)
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
