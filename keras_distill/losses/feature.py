"""Knowledge in the features of one layer."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill.grids import (
    flatten_positions,
    normalize,
    pool_to_smaller,
    resample,
)
from keras_distill.losses.base import (
    PACKAGE,
    DistillationLoss,
    check_rank,
    check_same_shape,
)

GRID = "(batch, height, width, channels)"


@keras.saving.register_keras_serializable(package=PACKAGE)
class Hint(DistillationLoss):
    r"""FitNets' hint: the squared distance of two features of the same shape.

    Each position gets `(1 / C) Σ_c (student_c - teacher_c)²`, so the mean is the mean
    over all elements, as in the reimplementations. `variant="paper"` is the paper's
    `½ Σ` over positions and channels, averaged over the batch: `½ H W C` times as
    much. An adapter brings the student's features to the teacher's shape first.

    Args:
        variant: None, or `"paper"`.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher features, float `(B, ..., C)`.
        y_pred: Student features, float `(B, ..., C)`.

    Raises:
        ValueError: If the shapes differ, or the variant is unknown.

    Example:

    >>> import numpy as np
    >>> print(float(Hint()(np.array([[3.0, 0.0]]), np.array([[1.0, 0.0]]))))
    2.0

    References:
        Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015
        (arXiv 1412.6550).
    """

    def __init__(self, variant: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_variant(variant, "paper")
        self.variant = variant

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_same_shape(self, y_true, y_pred)
        square = ops.square(y_pred - y_true)
        if self.variant is None:
            return ops.mean(square, -1)
        values = ops.sum(square, -1) / 2
        for size in ops.shape(values)[1:]:
            values = values * ops.cast(size, values.dtype)
        return values

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "variant": self.variant}


@keras.saving.register_keras_serializable(package=PACKAGE)
class AttentionTransfer(DistillationLoss):
    r"""Attention transfer: the distance of two normalised maps of activity.

    The map of a sample is `normalize(mean over channels of |F|^p)`, flattened over
    the grid; each sample gets the mean over positions of the squared difference, as in
    the official code. `variant="paper"` gives the norm of the difference (not squared).
    Channels may differ; where the grids do, the larger one is average-pooled.

    Args:
        p: Power of the activations, at least 1.
        variant: None, or `"paper"`.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher features, float `(B, H, W, C)`.
        y_pred: Student features, float `(B, H', W', C')`.

    Raises:
        ValueError: If the features are not grids, `p` is below 1, or the variant is
            unknown.

    Example:

    >>> import numpy as np
    >>> teacher = np.array([3.0, 0.0]).reshape(1, 1, 2, 1)
    >>> student = np.array([0.0, 1.0]).reshape(1, 1, 2, 1)
    >>> print(float(AttentionTransfer()(teacher, student)))
    1.0

    References:
        Zagoruyko, Komodakis, Paying More Attention to Attention, ICLR 2017
        (arXiv 1612.03928).
    """

    def __init__(self, p: float = 2, variant: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_power(p)
        check_variant(variant, "paper")
        self.p = p
        self.variant = variant

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_rank(self, "teacher", y_true, 4, GRID)
        check_rank(self, "student", y_pred, 4, GRID)
        teacher, student = pool_to_smaller(y_true, y_pred)
        difference = self._map(student) - self._map(teacher)
        if self.variant is None:
            return ops.mean(ops.square(difference), -1)
        square = ops.sum(ops.square(difference), -1)
        # The root has no finite slope at 0.
        positive = square > 0
        return ops.where(positive, ops.sqrt(ops.where(positive, square, 1.0)), 0.0)

    def _map(self, x: Any) -> Any:
        activity = ops.mean(power(x, self.p), -1, keepdims=True)
        return normalize(ops.squeeze(flatten_positions(activity), -1))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "p": self.p, "variant": self.variant}


@keras.saving.register_keras_serializable(package=PACKAGE)
class NeuronSelectivity(DistillationLoss):
    r"""Neuron selectivity transfer: where channels respond, compared as two sets.

    Each channel's map is flattened over the grid and normalised; with the kernel
    `k(x, y) = ⟨x, y⟩²` each sample gets the squared maximum mean discrepancy

    $$\operatorname{mean} k(t, t) + \operatorname{mean} k(s, s)
      - 2 \operatorname{mean} k(s, t)$$

    over pairs of channels. Channels may differ; where the grids do, the larger one is
    average-pooled.

    Args:
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher features, float `(B, H, W, C)`.
        y_pred: Student features, float `(B, H', W', C')`.

    Raises:
        ValueError: If the features are not grids.

    Example:

    >>> import numpy as np
    >>> teacher = np.array([1.0, 0.0]).reshape(1, 1, 2, 1)
    >>> student = np.array([0.0, 2.0]).reshape(1, 1, 2, 1)
    >>> print(float(NeuronSelectivity()(teacher, student)))
    2.0

    References:
        Huang, Wang, Like What You Like: Knowledge Distill via Neuron Selectivity
        Transfer, 2017 (arXiv 1707.01219).
    """

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        check_rank(self, "teacher", y_true, 4, GRID)
        check_rank(self, "student", y_pred, 4, GRID)
        teacher, student = (
            normalize(flatten_positions(x), axis=1)
            for x in pool_to_smaller(y_true, y_pred)
        )
        positions = teacher.shape[1]
        if positions is not None and positions <= teacher.shape[-1]:
            # Σ ⟨x_i, y_j⟩² over channels is the inner product of the two matrices
            # Σ x_i x_iᵀ over positions: on small grids these are the smaller ones.
            gap = _second_moment(student) - _second_moment(teacher)
            return ops.sum(ops.square(gap), (1, 2))
        return (
            _mean_kernel(teacher, teacher)
            + _mean_kernel(student, student)
            - 2 * _mean_kernel(student, teacher)
        )


def _second_moment(maps: Any) -> Any:
    return ops.matmul(maps, ops.transpose(maps, (0, 2, 1))) / maps.shape[-1]


def _mean_kernel(a: Any, b: Any) -> Any:
    products = ops.matmul(ops.transpose(a, (0, 2, 1)), b)
    pairs = a.shape[-1] * b.shape[-1]
    return ops.sum(ops.square(products), (1, 2)) / pairs


@keras.saving.register_keras_serializable(package=PACKAGE)
class HierarchicalContext(DistillationLoss):
    r"""ReviewKD's hierarchical context loss: features compared on coarser grids too.

    With `MSE_l` the mean squared difference of the features average-pooled to `l × l`,
    each sample gets

    $$\frac{\mathrm{MSE} + \sum_l w_l\,\mathrm{MSE}_l}{1 + \sum_l w_l}$$

    over those levels `l` that are smaller than the grid's height, with `w = ½, ¼, …` in
    the order in which levels are used. Several stages are summed.

    Args:
        levels: Sizes of the coarser grids.
        reduction: As in `keras.losses.Loss`.
        name: Name of the loss.
        dtype: `"float32"` or `"float64"`.

    Call arguments:
        y_true: Teacher features, float `(B, H, W, C)` or `(B, C)`, or a list of them.
        y_pred: Student features of the same shape, from the adapter `Fusion` in
            ReviewKD, or a list of as many.

    Raises:
        ValueError: If the shapes differ, or are neither grids nor vectors, or if a
            level is not a positive integer.

    Example:

    >>> import numpy as np
    >>> teacher, student = np.array([[3.0, 0.0]]), np.array([[1.0, 0.0]])
    >>> print(float(HierarchicalContext()(teacher, student)))
    2.0

    References:
        Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021
        (arXiv 2104.09044).
    """

    def __init__(self, levels: Any = (4, 2, 1), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        levels = tuple(levels)
        if not all(isinstance(level, int) and level > 0 for level in levels):
            raise ValueError(
                f"`levels` must be positive integers. Received: {levels!r}"
            )
        self.levels = levels

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        teacher, student = keras.tree.flatten(y_true), keras.tree.flatten(y_pred)
        if len(teacher) != len(student):
            raise ValueError(
                "HierarchicalContext compares stage by stage. Received: "
                f"{len(teacher)} teacher stages, {len(student)} student stages"
            )
        return sum(self._stage(t, s) for t, s in zip(teacher, student, strict=True))

    def _stage(self, teacher: Any, student: Any) -> Any:
        check_same_shape(self, teacher, student)
        difference = student - teacher
        if len(difference.shape) == 2:
            difference = difference[:, None, None, :]
        check_rank(self, "teacher and student", difference, 4, GRID)
        height, width = difference.shape[1:3]
        if height is None or width is None:
            raise ValueError(
                "HierarchicalContext needs grids of known size. Received: "
                f"{tuple(student.shape)}"
            )
        value = ops.mean(ops.square(difference), (1, 2, 3))
        weight = total = 1.0
        for level in self.levels:
            if level >= height:
                continue
            weight /= 2
            total += weight
            # Pooling is linear: pool the difference instead of both features.
            pooled = resample(difference, (level, min(level, width)))
            value = value + weight * ops.mean(ops.square(pooled), (1, 2, 3))
        return value / total

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "levels": list(self.levels)}


def power(x: Any, p: float) -> Any:
    """`|x| ** p`."""
    if p == 2:
        return ops.square(x)
    return ops.abs(x) if p == 1 else ops.power(ops.abs(x), p)


def check_power(p: Any) -> None:
    """Raises ValueError unless `p` is a finite number of at least 1."""
    if not 1 <= p < float("inf"):
        raise ValueError(f"`p` must be at least 1 and finite. Received: {p!r}")


def check_variant(variant: str | None, *names: str) -> None:
    """Raises ValueError unless `variant` is None or one of the names."""
    if variant is not None and variant not in names:
        known = ", ".join(repr(name) for name in names)
        raise ValueError(f"`variant` must be None or {known}. Received: {variant!r}")
