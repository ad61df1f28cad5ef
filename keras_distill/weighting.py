"""One weight per output position: labels, weights, masks and replicas brought together.

Everything that says how much a row counts is turned into weights before any loss or
metric is called, so that no loss has to know about it, and any split of a batch over
replicas equals one device.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops

from keras_distill.losses.base import align_left

_SPARSE = ("sparse_categorical_crossentropy",)
_CATEGORICAL = ("categorical_crossentropy", "categorical_focal_crossentropy")


@dataclass(frozen=True)
class Share:
    """What this replica holds of the global batch.

    Attributes:
        rows: Number of rows here, float32 scalar (a padding row does not count).
        total: Number of rows on all replicas.
        replicas: Number of replicas.
        all_reduce: Sums a tensor over the replicas.
        gather: Gives every replica the rows of all, in a structure of tensors.
        own: This replica's rows of what has a row for each of all.
        logged: Names of the logs that this step updates.
        losses: What the student's layers added in this step: see `note_losses`.
    """

    rows: Any
    total: Any
    replicas: int
    all_reduce: Callable[[Any], Any]
    gather: Callable[[Any], Any]
    own: Callable[[Any], Any]
    logged: set[str] = field(default_factory=set)
    losses: list[list[Any]] = field(default_factory=list)

    @property
    def factor(self) -> Any:
        """What a replica's mean must be multiplied by: n · R / N."""
        return self.rows * self.replicas / self.total

    def valid(self, mask: Any) -> tuple[Any, Any]:
        """Valid positions here and, summed, on all replicas."""
        here = ops.sum(ops.cast(mask, "float32")) * ops.cast(self.rows > 0, "float32")
        return here, (self.all_reduce(here) if self.replicas > 1 else here)


_current = threading.local()


def mean_of_rows(values: Any) -> Any:
    """The mean over the rows of the global batch, the same on every replica."""
    share, mean = current_share(), ops.mean(values)
    if share is None:
        return mean
    part = ops.cast(share.rows / share.total, mean.dtype)
    return share.all_reduce(ops.where(part > 0, mean * part, 0))


@contextlib.contextmanager
def this_share(share: Share) -> Iterator[Share]:
    """Sets the share of the step that this thread (a replica's) is tracing."""
    before = getattr(_current, "share", None)
    _current.share = share
    try:
        yield share
    finally:
        _current.share = before


def current_share() -> Share | None:
    """The share of the step being traced, None outside of one or on one device."""
    share = getattr(_current, "share", None)
    return share if share is not None and share.replicas > 1 else None


def note_log(name: str) -> None:
    """Remembers that the step being traced updates a log."""
    share = getattr(_current, "share", None)
    if share is not None:
        share.logged.add(name)


def note_losses(layer: keras.Layer) -> None:
    """Remembers what a forward pass added, as soon as it is over.

    At a collective the replicas' threads take turns, and behind it a layer may hold
    what another replica has added.
    """
    share = getattr(_current, "share", None)
    if share is not None:
        share.losses[:] = [layer.losses]


def noted_losses(layer: keras.Layer) -> list[Any]:
    """What `note_losses` has remembered in this step, else what the layer has now."""
    share = getattr(_current, "share", None)
    return layer.losses if share is None or not share.losses else share.losses[0]


def current_rows(padded: bool = False) -> Any:
    """Rows of the step being traced; with `padded` a padding row counts too."""
    share = _current.share
    return ops.cast(ops.maximum(share.rows, 1), "int32") if padded else share.rows


def for_masked(weight: Any, mask: Any) -> Any:
    """Weights for an output with a mask, right on any split.

    A loss takes the mean over the positions that are valid on its own replica. Weights
    that carry the factor n · R / N become weights that carry v · R / V, for v of the V
    valid positions.
    """
    share = current_share()
    if share is None or mask is None:
        return weight
    here, total = share.valid(mask)
    ratio = ops.divide_no_nan(here * share.total, share.rows * total)
    return ratio if weight is None else ops.cast(weight, "float32") * ratio


def unscaled(value: Any, rows: Any = None) -> Any:
    """A term as one device would log it for this replica's rows alone."""
    share = current_share()
    if share is None:
        return value
    total = share.total
    if rows is None:
        rows = share.rows
    else:
        total = share.all_reduce(rows)
    return ops.divide_no_nan(value * total, rows)


def full(weight: Any, values: Any) -> Any:
    """Weights expanded to the shape of values.

    Keras itself would align `(B,)` with `(B, T)` from the right.
    """
    if weight is None:
        return None
    weight = align_left("sample_weight", weight, values)
    return weight * ops.ones_like(values)


# -- labels -------------------------------------------------------------------------


def label_kind(loss: Any) -> str | None:
    """What the labels of a loss are: `"sparse"`, `"categorical"` or None (neither)."""
    if isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        return "sparse"
    if isinstance(
        loss,
        (
            keras.losses.CategoricalCrossentropy,
            keras.losses.CategoricalFocalCrossentropy,
        ),
    ):
        return "categorical"
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", "")
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
    if name in ("crossentropy", "ce"):
        return "crossentropy"  # Keras decides by the shapes
    if name in _SPARSE:
        return "sparse"
    return "categorical" if name in _CATEGORICAL else None


@dataclass
class Labels:
    """The labels of one output, made safe for losses and metrics.

    Attributes:
        values: The labels; missing ones replaced by class 0.
        valid: Which positions have a label: booleans, or None for all.
        classes: Class of each position (for class weights), or None.
    """

    values: Any
    valid: Any = None
    classes: Any = None


def read_labels(
    y: Any, output: Any, kind: str | None, unlabelled: int | None
) -> Labels:
    """Finds missing labels and classes.

    Args:
        y: Labels of one output.
        output: The output, or its symbolic shape.
        kind: As `label_kind` says.
        unlabelled: The integer that means "no label" (for one-hot labels a row of
            zeros means it), or None to switch that off.
    """
    y = ops.convert_to_tensor(y)
    rank = len(output.shape)
    if kind == "crossentropy":
        same = len(y.shape) == rank and y.shape[-1] == output.shape[-1]
        kind = None if output.shape[-1] == 1 else "categorical" if same else "sparse"
    if kind == "sparse":
        classes = y
        if len(y.shape) == rank and y.shape[-1] == 1:
            classes = ops.squeeze(y, -1)
        classes = ops.cast(classes, "int32")
        if unlabelled is None:
            return Labels(y, None, classes)
        valid = classes != unlabelled
        missing = ops.reshape(valid, ops.shape(y))
        values = ops.where(missing, y, ops.zeros_like(y))
        return Labels(values, valid, ops.where(valid, classes, 0))
    if kind == "categorical":
        classes = ops.argmax(y, -1)
        valid = None if unlabelled is None else ops.any(y != 0, -1)
        return Labels(y, valid, classes)
    if len(y.shape) == rank and y.shape[-1] == 1:
        return Labels(y, None, ops.cast(ops.squeeze(y, -1), "int32"))
    if len(y.shape) == rank - 1:
        return Labels(y, None, ops.cast(y, "int32"))
    return Labels(y)


def marked(y: Any, output: Any, unlabelled: int | None) -> Any:
    """Labels as this library's losses take them: -1 where an integer means "none"."""
    if y is None or unlabelled is None:
        return y
    y = ops.convert_to_tensor(y)
    one_hot = len(y.shape) == len(output.shape) and y.shape[-1] != 1
    if one_hot:
        return y
    y = ops.cast(y, "int32")
    return ops.where(y == unlabelled, -1, y)


def class_weights(labels: Labels, table: dict[int, float]) -> Any:
    """The class weight of every position; 1 for classes not in the table, or no label.

    Raises:
        ValueError: If the labels name no classes.
    """
    if labels.classes is None:
        raise ValueError(
            "`class_weight` needs labels that are classes (integers or one-hot). "
            f"Received labels of shape {tuple(labels.values.shape)}."
        )
    weights = [float(table.get(c, 1.0)) for c in range(max(table) + 1)]
    index = ops.clip(labels.classes, 0, len(weights) - 1)
    weight = ops.take(ops.convert_to_tensor(weights, "float32"), index)
    known = (labels.classes >= 0) & (labels.classes < len(weights))
    if labels.valid is not None:
        known = known & labels.valid
    return ops.where(known, weight, ops.ones_like(weight))


def multiply(first: Any, second: Any) -> Any:
    """Product of two weights aligned from the left; None counts as 1."""
    if first is None or second is None:
        return second if first is None else first
    first, second = ops.cast(first, "float32"), ops.cast(second, "float32")
    if len(first.shape) < len(second.shape):
        first, second = second, first
    return first * align_left("sample_weight", second, first)


def hand_on(output: Any, valid: Any) -> Any:
    """A copy of an output whose mask leaves out what has no label."""
    mask = getattr(output, "_keras_mask", None)
    if valid is None:
        return output
    return remasked(output, valid if mask is None else mask & valid)


def remasked(output: Any, mask: Any) -> Any:
    """A copy of an output with another mask, or none.

    The copy carries the logits that a softmax attached: without them Keras's losses
    would take the logarithm of rounded probabilities.
    """
    copy = ops.copy(output)
    if mask is not None:
        copy._keras_mask = mask
    logits = getattr(output, "_keras_logits", None)
    if logits is not None:
        copy._keras_logits = logits
    return copy


def by_output(value: Any, outputs: Any, names: list[str]) -> list[Any]:
    """Labels or weights in the order of a model's flat outputs; None where absent.

    Raises:
        ValueError: If the structure fits neither the outputs nor their names.
    """
    count = len(names)
    if value is None:
        return [None] * count
    if isinstance(value, dict):
        unknown = set(value) - set(names)
        if unknown:
            raise ValueError(
                f"There are no outputs named {sorted(unknown)}. Outputs: {names}"
            )
        return [value.get(name) for name in names]
    if not isinstance(value, (list, tuple)):
        if count == 1:
            return [value]
        raise ValueError(
            f"The model has the outputs {names}, but the data hold one array for them."
        )
    if len(value) != count:
        raise ValueError(
            f"The model has the outputs {names}, but the data hold {len(value)} arrays."
        )
    return list(value)
