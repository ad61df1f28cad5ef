"""What every distillation loss shares, and `keras.losses.Loss` lacks."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

PACKAGE = "keras_distill"


class _Reduce(keras.losses.Loss):
    """Hands values through, so that Keras itself reduces and scales them."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred


class DistillationLoss(keras.losses.Loss):
    """Base class: how far the student's knowledge is from the teacher's.

    A subclass implements `call(y_true, y_pred)`, where `y_true` is the teacher's
    knowledge and `y_pred` the student's, and returns one value per position or per
    sample. Three things differ from `keras.losses.Loss`:

    * integers in `y_true` (labels) stay integers: a cast to float16 would turn
      label 2049 into 2048;
    * everything else is computed in float32 (float64 on demand), whatever the
      dtype of the networks;
    * weights and masks are aligned with the values from the left: weights of shape
      `(B,)` weight the rows of values of shape `(B, H, W)`.

    Gradients flow into both arguments; whoever calls the loss stops the teacher's.

    Args:
        reduction: As in `keras.losses.Loss`: `"sum_over_batch_size"` (the mean over
            all values), `"sum"`, `"mean_with_sample_weight"` or `None`.
        name: Name of the loss.
        dtype: `"float32"` (also what `None` means, unless `floatx` is float64) or
            `"float64"`.

    Attributes:
        needs_labels: Whether `y_true` is `[teacher, labels]`.
        needs_teacher: Whether there is a teacher at all; if not, `y_true` holds the
            labels.
        across_batch: Whether rows are compared with each other. Then `call` gets a
            third argument `rows`, float `(B,)`: 1 for rows that are in the batch, 0
            for rows of weight 0, which must not take part in any sum, mean or norm.

    Raises:
        ValueError: If `dtype` is a lower precision than float32, if weights or a
            mask have more axes than the values.
    """

    needs_labels = False
    needs_teacher = True
    across_batch = False
    shift_invariant = True

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=_loss_dtype(dtype))

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        mask = getattr(y_pred, "_keras_mask", None)
        with keras.name_scope(self.name):
            y_true, y_pred = self._convert_all(y_true), self._convert_all(y_pred)
            if self.across_batch:
                batch = ops.shape(keras.tree.flatten(y_pred)[0])[:1]
                rows = kept_rows(batch, sample_weight, mask, self.dtype)
                values = self.call(y_true, y_pred, rows)
            else:
                values = self.call(y_true, y_pred)
            return reduce_values(values, sample_weight, mask, self.reduction)

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        raise NotImplementedError

    def _convert_all(self, tree: Any) -> Any:
        # A list of numbers is one tensor, a list of tensors is a list.
        if not any(hasattr(leaf, "shape") for leaf in keras.tree.flatten(tree)):
            return self._convert(tree)
        return keras.tree.map_structure(self._convert, tree)

    def _convert(self, x: Any) -> Any:
        x = ops.convert_to_tensor(x)
        is_float = "float" in keras.backend.standardize_dtype(x.dtype)
        return ops.cast(x, self.dtype) if is_float else x

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "dtype": self.dtype}

    def __repr__(self) -> str:
        config = self.get_config()
        for key in ("name", "reduction", "dtype"):
            config.pop(key)
        for key, value in config.items():
            if isinstance(value, dict):  # an object, as it is stored
                config[key] = getattr(self, key)
        arguments = ", ".join(f"{key}={value!r}" for key, value in config.items())
        return f"{type(self).__name__}({arguments})"


def _loss_dtype(dtype: Any) -> str:
    if dtype is None:
        return "float64" if keras.config.floatx() == "float64" else "float32"
    name = keras.dtype_policies.get(dtype).compute_dtype
    if name not in ("float32", "float64"):
        raise ValueError(
            "Distillation losses compute in float32 or float64, whatever the dtype of "
            f"the networks. Received: dtype={dtype!r}"
        )
    return name


def reduce_values(
    values: Any,
    sample_weight: Any = None,
    mask: Any = None,
    reduction: str | None = "sum_over_batch_size",
) -> Any:
    """Weights values and reduces them exactly as Keras does, aligned from the left.

    Masked values are left out of the mean. Under `tf.distribute` a mean is divided
    by the number of replicas (Keras's own rule), so that the replicas' sum is the
    mean over the global batch.

    Args:
        values: Tensor of any rank, first axis the batch.
        sample_weight: None, a number, or weights for the first axes of `values`.
        mask: None or booleans for the first axes of `values`.
        reduction: As in `keras.losses.Loss`.

    Returns:
        A scalar, or the weighted values without reduction.
    """
    dtype = keras.backend.standardize_dtype(values.dtype)
    weight = None
    if sample_weight is not None:
        weight = align_left("sample_weight", sample_weight, values)
    if mask is not None:
        mask = align_left("mask", mask, values)
        if reduction in ("sum_over_batch_size", "mean"):
            # `valid / size` of the values count: dividing by it makes the mean over
            # all values the mean over the valid ones.
            mask = ops.divide_no_nan(mask, ops.mean(mask))
        weight = mask if weight is None else weight * mask
    if weight is not None and weight.shape != values.shape:
        weight = weight * ops.ones_like(values)
    reduce = _Reduce(name="reduce", reduction=reduction, dtype=dtype)
    return reduce(values, values, weight)


def align_left(name: str, weight: Any, values: Any) -> Any:
    """Gives weights the rank of the values: `(B,)` becomes `(B, 1, 1)`.

    Raises:
        ValueError: If `weight` has more axes than `values`, or other sizes.
    """
    weight = ops.cast(ops.convert_to_tensor(weight), values.dtype)
    rank = len(values.shape)
    while len(weight.shape) > rank and weight.shape[-1] == 1:
        weight = ops.squeeze(weight, -1)
    shape = tuple(weight.shape)
    if len(shape) > rank or any(
        w not in (v, 1) and None not in (w, v)
        for w, v in zip(shape, tuple(values.shape), strict=False)
    ):
        raise ValueError(
            f"`{name}` of shape {shape} does not fit loss values of shape "
            f"{tuple(values.shape)}: its axes must be the first axes of the values."
        )
    while 0 < len(weight.shape) < rank:
        weight = ops.expand_dims(weight, -1)
    return weight


def kept_rows(batch: Any, sample_weight: Any, mask: Any, dtype: str) -> Any:
    """One number per row: 1 where the row's weight is not 0, else 0; None for all 1.

    Args:
        batch: Shape `(B,)` of the rows.
        sample_weight: None, a number, or weights of shape `(B,)` or `(B, 1)`.
        mask: None or booleans of shape `(B,)` or `(B, 1)`.
        dtype: Of the result.
    """
    if sample_weight is None and mask is None:
        return None
    rows = ops.ones(batch, dtype)
    if sample_weight is not None:
        weight = align_left("sample_weight", sample_weight, rows)
        rows = rows * ops.cast(weight != 0, dtype)
    if mask is not None:
        rows = rows * ops.cast(align_left("mask", mask, rows) != 0, dtype)
    return rows


def number(value: Any) -> float:
    """The value of a number that may live in a variable."""
    if hasattr(value, "numpy"):  # `float(variable)` raises under a strategy
        value = value.numpy()
    return float(value)


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a finite number above 0."""
    if not 0 < number(value) < float("inf"):
        raise ValueError(f"`{name}` must be above 0 and finite. Received: {value!r}")


def check_weight(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a finite number of at least 0."""
    if not 0 <= number(value) < float("inf"):
        raise ValueError(f"`{name}` must be finite and at least 0. Received: {value!r}")


def check_same_shape(loss: Any, y_true: Any, y_pred: Any) -> None:
    """Raises ValueError where teacher and student are known to differ in shape."""
    true, pred = tuple(y_true.shape), tuple(y_pred.shape)
    if len(true) != len(pred) or any(
        a != b and None not in (a, b) for a, b in zip(true, pred, strict=True)
    ):
        raise ValueError(
            f"{type(loss).__name__} compares equal shapes. Received: teacher {true}, "
            f"student {pred}. An adapter brings the student's shape to the teacher's."
        )


def check_rank(loss: Any, who: str, x: Any, rank: int, axes: str) -> None:
    """Raises ValueError unless `x` has `rank` axes, named in `axes`."""
    if len(x.shape) != rank:
        raise ValueError(
            f"{type(loss).__name__} needs {who} features of shape {axes}. "
            f"Received: {tuple(x.shape)}"
        )
