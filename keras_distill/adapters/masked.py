"""The adapter of masked generative distillation."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill.adapters.base import (
    Adapter,
    Shape,
    check_grid,
    check_known_grids,
    convolution,
    pointwise,
)
from keras_distill.losses.base import PACKAGE


@keras.saving.register_keras_serializable(package=PACKAGE)
class MaskedGeneration(Adapter):
    """Hides parts of the student's features and generates the teacher's from the rest.

    In training a random mask, without rescaling, sets channels or pixels to 0; then
    come a 3 × 3 convolution, ReLU and a 3 × 3 convolution, with biases. A 1 × 1
    convolution before that maps the channels if they differ; where the grids do, the
    student's is average-pooled or interpolated. With the loss `Hint(variant="paper")`
    and twice the official weight this is the method's loss, half the squared error
    being summed per sample.

    Args:
        target_shape: The teacher's shape without the batch; links tell it.
        mask: `"channel"`, as the official code for classification, or `"pixel"`, as the
            paper and the official code for detection.
        rate: Probability of being hidden: 0.15 for channels, 0.45 to 0.75 for pixels.
        seed: Seed of the masks.
        **kwargs: As in `keras.Layer`.

    Call arguments:
        inputs: Student features, float `(B, H, W, C)`.
        training: Whether to hide anything.

    Returns:
        Features of the teacher's shape.

    Raises:
        ValueError: If the features are not grids, `mask` is unknown, or the rate is not
            in [0, 1).

    Example:

    >>> import keras
    >>> generation = MaskedGeneration(target_shape=(8, 8, 32))
    >>> tuple(generation(keras.ops.ones((2, 8, 8, 16)), training=True).shape)
    (2, 8, 8, 32)

    References:
        Yang et al., Masked Generative Distillation, ECCV 2022 (arXiv 2205.01529).
    """

    def __init__(
        self,
        target_shape: Any = None,
        *,
        mask: str = "channel",
        rate: float = 0.15,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(target_shape, **kwargs)
        if mask not in ("channel", "pixel"):
            raise ValueError(f"`mask` must be 'channel' or 'pixel'. Received: {mask!r}")
        if not 0 <= rate < 1:
            raise ValueError(f"`rate` must be at least 0, below 1. Received: {rate}")
        self.mask = mask
        self.rate = rate
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def check_map(self, student_shape: Shape, teacher_shape: Shape) -> None:
        check_grid(self, student_shape)
        check_grid(self, teacher_shape)
        check_known_grids(self, student_shape, teacher_shape)

    def build_parts(self, input_shape: Shape) -> None:
        channels = self.target_shape[-1]
        target: Shape = (None, *self.target_shape)
        self.channel_map = None
        if channels != input_shape[-1]:
            self.channel_map = self.part(
                pointwise(self, 4, channels), (*target[:-1], input_shape[-1])
            )
        self.first = self.part(convolution(self, channels, 3), target)
        self.second = self.part(convolution(self, channels, 3), target)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.to_grid(inputs)
        if self.channel_map is not None:
            x = self.channel_map(x)
        if training and self.rate > 0:
            batch, height, width, channels = ops.shape(x)
            shape = (
                (batch, 1, 1, channels)
                if self.mask == "channel"
                else (batch, height, width, 1)
            )
            noise = keras.random.uniform(
                shape, seed=self.seed_generator, dtype="float32"
            )
            x = x * ops.cast(noise >= self.rate, x.dtype)
        return self.second(ops.relu(self.first(x)))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "mask": self.mask,
            "rate": self.rate,
            "seed": self.seed,
        }
