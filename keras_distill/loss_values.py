"""What a compiled loss has a value for: every position of an output, or every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops
from keras.src.losses.losses import LossFunctionWrapper

from keras_distill.specs import symbolic_run
from keras_distill.weighting import full, label_kind


@dataclass(frozen=True)
class Layout:
    """How the values of a loss lie on an output.

    Attributes:
        axes: How many of the output's first axes they have.
        rank: How many axes they have in all.
    """

    axes: int
    rank: int

    def of_positions(self, tensor: Any, positions: Any, reduce: Any) -> Any:
        """What is known per position, as it is per value.

        Args:
            tensor: Aligned from the left with `positions`, or None.
            positions: A tensor with the shape of an output's positions.
            reduce: Makes one number of those along some axes.
        """
        if tensor is None:
            return None
        tensor = full(tensor, positions)
        inner = tuple(range(self.axes, len(positions.shape)))
        tensor = reduce(tensor, inner) if inner else tensor
        for _ in range(self.rank - self.axes):
            tensor = ops.expand_dims(tensor, -1)
        return tensor


def per_position(output: Any) -> Layout:
    """The layout of most losses: a value for each position of the output."""
    rank = max(len(output.shape) - 1, 1)
    return Layout(rank, rank)


def layout_of(loss: Any, y: Any, output: Any) -> Layout:
    """How the values of a compiled loss lie on an output.

    Most losses leave out the last axis alone. Dice over whole images, or CTC, have one
    value per row. A loss that is one number for the whole batch counts as one with a
    value per position: weights are then factors of it.

    Args:
        loss: What was compiled for the output: a Keras loss, a function, a name.
        y: Its labels.
        output: The output.
    """
    usual = per_position(output)
    if usual.rank == 1 or label_kind(loss) is not None:
        return usual
    loss = keras.losses.get(loss)
    if not isinstance(loss, keras.losses.Loss):
        loss = LossFunctionWrapper(loss)

    def symbol(tensor: Any) -> Any:
        return keras.KerasTensor((None, *tensor.shape[1:]), loss.dtype)

    values = symbolic_run(loss.call, symbol(y), symbol(output)).shape
    axes = 0
    for own, whole in zip(values, (None, *output.shape[1:-1]), strict=False):
        if own != whole:
            break
        axes += 1
    return Layout(axes, len(values)) if axes else usual


def common_layout(losses: list[Any], y: Any, output: Any) -> Layout:
    """The layout of all losses of one output.

    Raises:
        ValueError: If they differ: the losses of an output share their weights.
    """
    layouts = [layout_of(loss, y, output) for loss in losses if loss is not None]
    if len(set(layouts)) > 1:
        raise ValueError(
            f"The losses {losses} of one output have values for different axes of it, "
            "so they cannot share sample weights, masks or replicas. Add them up in "
            "one function that returns one value per row."
        )
    return layouts[0] if layouts else per_position(output)


def any_of(mask: Any, axes: tuple[int, ...]) -> Any:
    """Whether there is any valid position along some axes."""
    return ops.any(mask > 0, axes)
