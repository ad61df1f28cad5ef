"""The adapter of knowledge review."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill.adapters.base import (
    batch_normalization,
    check_shape,
    convolution,
)
from keras_distill.grids import resample_nearest
from keras_distill.losses.base import PACKAGE


@keras.saving.register_keras_serializable(package=PACKAGE)
class Fusion(keras.Layer):
    """ReviewKD's fusion: each stage of the student, with all deeper ones in it.

    From the deepest to the shallowest: a 1 × 1 convolution with batch normalization
    brings a stage to a common width; two maps of sigmoid gates, made from the stage and
    from what came from the deeper ones (enlarged by copying), weigh the two; a 3 × 3
    convolution with batch normalization makes the features that are compared with the
    teacher's. A vector counts as a grid of one position.

    Args:
        target_shapes: The teacher's shapes without the batch, one per stage; links tell
            them.
        width: Channels of the fused features; None for those of the student's deepest
            stage, 512 at most.
        **kwargs: As in `keras.Layer`.

    Call arguments:
        inputs: List of student features from shallow to deep, float `(B, H, W, C)` or
            `(B, C)`.
        training: Whether batch normalization uses the batch's statistics.

    Returns:
        A list of features of the teacher's shapes.

    Raises:
        ValueError: If student and teacher have different numbers of stages, or a stage
            is neither a grid of known size nor a vector.

    Example:

    >>> import keras
    >>> fusion = Fusion(target_shapes=[(8, 8, 32), (64,)])
    >>> taps = [keras.ops.ones((2, 8, 8, 16)), keras.ops.ones((2, 24))]
    >>> [tuple(x.shape) for x in fusion(taps)]
    [(2, 8, 8, 32), (2, 64)]

    References:
        Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021
        (arXiv 2104.09044).
    """

    def __init__(
        self, target_shapes: Any = None, *, width: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.target_shapes = target_shapes and [tuple(s) for s in target_shapes]
        self.width = width

    def match(self, student_shape: Any, teacher_shape: Any) -> None:
        """Learns the shapes of all stages, lists of shapes with the batch.

        Raises:
            ValueError: If they are not as many, if one is neither a grid nor a vector,
                or if the adapter was made for others.
        """
        self._check("teacher", teacher_shape)
        targets = [tuple(shape[1:]) for shape in teacher_shape]
        self._check("student", student_shape, len(targets))
        if self.target_shapes not in (None, targets):
            raise ValueError(
                f"Fusion was made for teacher features of shapes {self.target_shapes}. "
                f"Received: {targets}"
            )
        self.target_shapes = targets

    def _check(self, who: str, shapes: Any, count: int | None = None) -> None:
        if (
            not isinstance(shapes, (list, tuple))
            or not shapes
            or not all(isinstance(shape, (list, tuple)) for shape in shapes)
        ):
            raise ValueError(
                f"Fusion needs a list of {who} features, from shallow to deep. "
                f"Received: shape {shapes}"
            )
        if count not in (None, len(shapes)):
            raise ValueError(
                f"Fusion needs as many student as teacher stages, {count}. "
                f"Received: {len(shapes)}"
            )
        for shape in shapes:
            check_shape(self, who, shape)
            if len(shape) not in (2, 4) or None in tuple(shape[1:]):
                raise ValueError(
                    "Fusion needs features of shape (batch, height, width, channels) "
                    f"of known size, or (batch, channels). Received: {who} "
                    f"{tuple(shape)}"
                )

    def build(self, input_shape: Any) -> None:
        if self.target_shapes is None:
            raise ValueError(
                "Fusion does not know the teacher's shapes: use it in a link, call "
                "`match(student_shapes, teacher_shapes)`, or give `target_shapes`."
            )
        self._check("student", input_shape, len(self.target_shapes))
        width = self.width or min(512, input_shape[-1][-1])
        self.entries: list[keras.Layer] = []
        self.entry_norms: list[keras.Layer] = []
        self.gates: list[keras.Layer] = []
        self.exits: list[keras.Layer] = []
        self.exit_norms: list[keras.Layer] = []
        deepest = len(input_shape) - 1
        for index, (shape, target) in enumerate(
            zip(input_shape, self.target_shapes, strict=True)
        ):
            grid, goal = _grid(tuple(shape[1:])), _grid(target)
            fused = (None, *grid[:2], width)
            self._add(self.entries, convolution(self, width, 1, use_bias=False), grid)
            self._add(self.entry_norms, batch_normalization(self), fused[1:])
            if index < deepest:
                gate = convolution(self, 2, 1, activation="sigmoid")
                self._add(self.gates, gate, (*grid[:2], 2 * width))
            outward = (*goal[:2], width)
            exit_ = convolution(self, goal[-1], 3, use_bias=False)
            self._add(self.exits, exit_, outward)
            self._add(self.exit_norms, batch_normalization(self), goal)
        self.built = True

    def _add(self, parts: list[Any], layer: keras.Layer, shape: Any) -> None:
        layer.build((None, *shape))
        parts.append(layer)

    def call(self, inputs: Any, training: bool | None = None) -> list[Any]:
        deeper = None
        outputs = []
        for index in reversed(range(len(inputs))):
            x = _as_grid(inputs[index])
            x = self.entry_norms[index](self.entries[index](x), training=training)
            if deeper is not None:
                deeper = resample_nearest(deeper, tuple(x.shape[1:3]))
                gates = self.gates[index](ops.concatenate([x, deeper], -1))
                x = x * gates[..., :1] + deeper * gates[..., 1:]
            target = self.target_shapes[index]
            deeper = resample_nearest(x, _grid(target)[:2])
            y = self.exit_norms[index](self.exits[index](deeper), training=training)
            outputs.append(ops.reshape(y, (-1, *target)))
        return outputs[::-1]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "target_shapes": self.target_shapes,
            "width": self.width,
        }


def _grid(shape: Any) -> tuple[int, int, int]:
    return shape if len(shape) == 3 else (1, 1, shape[0])


def _as_grid(x: Any) -> Any:
    return x if len(x.shape) == 4 else ops.reshape(x, (-1, 1, 1, x.shape[-1]))
