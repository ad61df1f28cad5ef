"""Adapters that map a student's features onto a teacher's shape."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_distill.adapters.base import (
    Adapter,
    Shape,
    batch_normalization,
    check_grid,
    check_known_grids,
    convolution,
    pointwise,
)
from keras_distill.losses.base import PACKAGE


@keras.saving.register_keras_serializable(package=PACKAGE)
class Regressor(Adapter):
    """The smallest layer that maps the student's shape onto the teacher's.

    Channels are mapped by a 1 × 1 convolution (vectors and sequences: a Dense layer),
    left out if they agree; grids are average-pooled or interpolated. Axes that only the
    student has, for a teacher's vector, are averaged. With `grid="convolution"` one
    convolution maps channels and grid, as in the reimplementations of FitNets: 3 × 3
    with stride 2 to half the grid, a transposed 4 × 4 with stride 2 to twice the grid,
    else, to a smaller grid, an unpadded one with kernel `1 + student - teacher`.

    Args:
        target_shape: The teacher's shape without the batch; links tell it.
        grid: `"resample"` or `"convolution"`.
        use_bias: Whether the map of channels has a bias.
        batch_normalization: Whether batch normalization follows.
        activation: Activation at the end: None, or what Keras's layers take.
        **kwargs: As in `keras.Layer`.

    Call arguments:
        inputs: Student features, float `(B, ..., C)`.
        training: Whether batch normalization uses the batch's statistics.

    Returns:
        Features of the teacher's shape.

    Raises:
        ValueError: If there is no such map between the shapes, or `grid` is unknown.

    Example:

    >>> import keras
    >>> regressor = Regressor(target_shape=(4, 4, 32))
    >>> tuple(regressor(keras.ops.ones((2, 8, 8, 16))).shape)
    (2, 4, 4, 32)

    References:
        Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015
        (arXiv 1412.6550).
    """

    def __init__(
        self,
        target_shape: Any = None,
        *,
        grid: str = "resample",
        use_bias: bool = False,
        batch_normalization: bool = False,
        activation: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(target_shape, **kwargs)
        if grid not in ("resample", "convolution"):
            raise ValueError(
                f"`grid` must be 'resample' or 'convolution'. Received: {grid!r}"
            )
        self.grid = grid
        self.use_bias = use_bias
        self.batch_normalization = batch_normalization
        self.activation = keras.activations.get(activation)

    def check_map(self, student_shape: Shape, teacher_shape: Shape) -> None:
        if self.grid == "convolution":
            check_grid(self, student_shape)
            check_grid(self, teacher_shape)
            self._kernel(student_shape[1:3], teacher_shape[1:3])
        elif len(student_shape) == len(teacher_shape):
            check_known_grids(self, student_shape, teacher_shape)
        elif len(teacher_shape) != 2:
            raise ValueError(
                "Regressor maps features to features with the same number of axes, or "
                f"to vectors. Received: student {student_shape}, teacher "
                f"{teacher_shape}"
            )

    def build_parts(self, input_shape: Shape) -> None:
        channels = self.target_shape[-1]
        self.channel_map: Any = None
        self.normalization: Any = None
        if self.grid == "convolution":
            self.channel_map = self._convolution(input_shape)
            self.channel_map.build(self._padded(input_shape))
        elif channels != input_shape[-1]:
            # Averaging commutes with the map: vectors are mapped after it.
            rank = len(self.target_shape) + 1
            self.channel_map = self.part(
                pointwise(self, rank, channels, use_bias=self.use_bias),
                (None, *input_shape[1 : rank - 1], input_shape[-1]),
            )
        if self.batch_normalization:
            self.normalization = self.part(
                batch_normalization(self), (None, *self.target_shape)
            )

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = inputs
        if len(self.target_shape) == 1 and len(x.shape) > 2:
            x = ops.mean(x, tuple(range(1, len(x.shape) - 1)))
        if self.grid == "convolution":
            pad = self._padding(x.shape)
            x = self.channel_map(ops.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))))
        elif self.channel_map is None:
            x = self.to_grid(x)
        elif math.prod(n or 1 for n in x.shape[1:-1]) > math.prod(
            n or 1 for n in self.target_shape[:-1]
        ):
            x = self.channel_map(self.to_grid(x))  # both orders agree: fewer positions
        else:
            x = self.to_grid(self.channel_map(x))
        if self.normalization is not None:
            x = self.normalization(x, training=training)
        return self.activation(x)

    def _convolution(self, input_shape: Shape) -> Any:
        kernel = self._kernel(input_shape[1:3], self.target_shape[:2])
        channels = self.target_shape[-1]
        if kernel == "half":
            return convolution(
                self, channels, 3, strides=2, padding="valid", use_bias=self.use_bias
            )
        if kernel == "double":
            return keras.layers.Conv2DTranspose(
                channels,
                4,
                strides=2,
                padding="same",
                use_bias=self.use_bias,
                data_format="channels_last",
                dtype=self.dtype_policy,
            )
        return convolution(
            self, channels, kernel, padding="valid", use_bias=self.use_bias
        )

    def _kernel(self, student: Shape, teacher: Shape) -> Any:
        if None not in student and None not in teacher:
            axes = list(zip(student, teacher, strict=True))
            if all(s == 2 * t for s, t in axes):
                return "half"
            if all(2 * s == t for s, t in axes):
                return "double"
            if all(s >= t for s, t in axes):
                return tuple(1 + s - t for s, t in axes)
        raise ValueError(
            "Regressor(grid='convolution') maps known grids to half, twice or fewer "
            f"positions. Received: student grid {student}, teacher grid {teacher}. "
            "grid='resample' maps any grid."
        )

    def _padding(self, shape: Any) -> int:
        # Padded here, on both sides alike: "same" would depend on the backend.
        return int(self._kernel(tuple(shape[1:3]), self.target_shape[:2]) == "half")

    def _padded(self, shape: Shape) -> Shape:
        pad = 2 * self._padding(shape)
        return (shape[0], shape[1] + pad, shape[2] + pad, shape[3])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "grid": self.grid,
            "use_bias": self.use_bias,
            "batch_normalization": self.batch_normalization,
            "activation": keras.activations.serialize(self.activation),
        }


@keras.saving.register_keras_serializable(package=PACKAGE)
class Connector(Adapter):
    """The connector of activation boundaries and of the overhaul.

    A 1 × 1 convolution without bias to the teacher's channels, then batch
    normalization, and no ReLU: it makes pre-activation features. Where the grids
    differ the student's is average-pooled or interpolated first.

    Args:
        target_shape: The teacher's shape without the batch; links tell it.
        **kwargs: As in `keras.Layer`.

    Call arguments:
        inputs: Student features before the ReLU, float `(B, ..., C)`.
        training: Whether batch normalization uses the batch's statistics.

    Returns:
        Features of the teacher's shape.

    Raises:
        ValueError: If the shapes have different numbers of axes.

    Example:

    >>> import keras
    >>> connector = Connector(target_shape=(8, 8, 32))
    >>> tuple(connector(keras.ops.ones((2, 8, 8, 16)), training=True).shape)
    (2, 8, 8, 32)

    References:
        Heo et al., AAAI 2019 (arXiv 1811.03233) and ICCV 2019 (arXiv 1904.01866).
    """

    def build_parts(self, input_shape: Shape) -> None:
        channels = self.target_shape[-1]
        spread = math.sqrt(2 / channels)
        self.channel_map = self.part(
            pointwise(
                self,
                len(input_shape),
                channels,
                use_bias=False,
                kernel_initializer=keras.initializers.RandomNormal(stddev=spread),
            ),
            (None, *self.target_shape[:-1], input_shape[-1]),
        )
        self.normalization = self.part(
            batch_normalization(self), (None, *self.target_shape)
        )

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.channel_map(self.to_grid(inputs))
        return self.normalization(x, training=training)


@keras.saving.register_keras_serializable(package=PACKAGE)
class Projector(Adapter):
    """SimKD's projector, behind which the student uses the teacher's classifier.

    Three convolutions without bias (1 × 1 to the teacher's channels over `factor`,
    3 × 3, 1 × 1 to the teacher's channels), each with batch normalization and ReLU. A
    student's larger grid is average-pooled to the teacher's first.

    Args:
        target_shape: The teacher's shape without the batch; links tell it.
        factor: How many times narrower the inner features are.
        **kwargs: As in `keras.Layer`.

    Call arguments:
        inputs: Student's last features, float `(B, H, W, C)`.
        training: Whether batch normalization uses the batch's statistics.

    Returns:
        Features of the teacher's shape.

    Raises:
        ValueError: If the features are not grids, or the student's is the smaller one.

    Example:

    >>> import keras
    >>> projector = Projector(target_shape=(4, 4, 32))
    >>> tuple(projector(keras.ops.ones((2, 8, 8, 16))).shape)
    (2, 4, 4, 32)

    References:
        Chen et al., Knowledge Distillation with the Reused Teacher Classifier,
        CVPR 2022 (arXiv 2203.14001).
    """

    def __init__(
        self, target_shape: Any = None, *, factor: int = 2, **kwargs: Any
    ) -> None:
        super().__init__(target_shape, **kwargs)
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"`factor` must be a positive integer. Received: {factor}")
        self.factor = factor

    def check_map(self, student_shape: Shape, teacher_shape: Shape) -> None:
        check_grid(self, student_shape)
        check_grid(self, teacher_shape)
        check_known_grids(self, student_shape, teacher_shape)
        grids = zip(student_shape[1:3], teacher_shape[1:3], strict=True)
        if any(None not in (s, t) and s < t for s, t in grids):
            raise ValueError(
                "Projector needs a student grid that is not smaller than the "
                f"teacher's. Received: student {student_shape}, teacher "
                f"{teacher_shape}. Pool the teacher's features, for example with "
                "teacher_adapter=keras.layers.AveragePooling2D(2)."
            )

    def build_parts(self, input_shape: Shape) -> None:
        channels = self.target_shape[-1]
        inner = max(1, channels // self.factor)
        shape: Shape = (None, *self.target_shape[:-1], input_shape[-1])
        self.convolutions, self.normalizations = [], []
        for width, size in ((inner, 1), (inner, 3), (channels, 1)):
            layer = convolution(self, width, size, use_bias=False)
            self.convolutions.append(self.part(layer, shape))
            shape = (*shape[:-1], width)
            self.normalizations.append(self.part(batch_normalization(self), shape))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.to_grid(inputs)
        for layer, normalize in zip(
            self.convolutions, self.normalizations, strict=True
        ):
            x = ops.relu(normalize(layer(x), training=training))
        return x

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "factor": self.factor}
