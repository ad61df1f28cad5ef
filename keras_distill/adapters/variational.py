"""The adapter of variational information distillation."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_distill.adapters.base import Adapter, Shape, pointwise
from keras_distill.losses.base import PACKAGE, check_positive


@keras.saving.register_keras_serializable(package=PACKAGE)
class VariationalHead(Adapter):
    """Mean and variance of a guess of the teacher's features.

    The mean is made by three 1 × 1 convolutions without bias, with ReLU in between
    (vectors and sequences: Dense layers); the variance is one trainable number per
    channel of the teacher, `softplus(rho) + epsilon`. Where the grids differ the
    student's is average-pooled or interpolated first.

    Args:
        target_shape: The teacher's shape without the batch; links tell it.
        hidden: Channels between the convolutions; None for the teacher's.
        variance: The variance at the start.
        epsilon: The `epsilon` of the loss `VariationalInformation`.
        **kwargs: As in `keras.Layer`.

    Call arguments:
        inputs: Student features, float `(B, ..., C)`.

    Returns:
        A list: the mean, of the teacher's shape, and rho, of shape `(C,)`.

    Raises:
        ValueError: If the shapes have different numbers of axes, or if the variance is
            not above epsilon.

    Example:

    >>> import keras
    >>> head = VariationalHead(target_shape=(8, 8, 32))
    >>> mean, rho = head(keras.ops.ones((2, 8, 8, 16)))
    >>> tuple(mean.shape), tuple(rho.shape)
    ((2, 8, 8, 32), (32,))

    References:
        Ahn et al., Variational Information Distillation for Knowledge Transfer,
        CVPR 2019 (arXiv 1904.05835).
    """

    def __init__(
        self,
        target_shape: Any = None,
        *,
        hidden: int | None = None,
        variance: float = 5.0,
        epsilon: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(target_shape, **kwargs)
        check_positive("epsilon", epsilon)
        if not epsilon < variance < float("inf"):
            raise ValueError(
                f"`variance` must be above epsilon and finite. Received: {variance}"
            )
        self.hidden = hidden
        self.variance = variance
        self.epsilon = epsilon

    def build_parts(self, input_shape: Shape) -> None:
        channels = self.target_shape[-1]
        hidden = self.hidden or channels
        shape: Shape = (None, *self.target_shape[:-1], input_shape[-1])
        self.maps = []
        for width in (hidden, hidden, channels):
            layer = pointwise(self, len(input_shape), width, use_bias=False)
            self.maps.append(self.part(layer, shape))
            shape = (*shape[:-1], width)
        self.rho = self.add_weight(
            name="rho",
            shape=(channels,),
            initializer=keras.initializers.Constant(
                math.log(math.expm1(self.variance - self.epsilon))
            ),
            autocast=False,
        )

    def call(self, inputs: Any) -> list[Any]:
        x = self.to_grid(inputs)
        for layer in self.maps[:-1]:
            x = ops.relu(layer(x))
        return [self.maps[-1](x), self.rho.value]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "hidden": self.hidden,
            "variance": self.variance,
            "epsilon": self.epsilon,
        }
