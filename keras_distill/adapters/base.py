"""What adapters share: being told both shapes before they are built."""

from __future__ import annotations

from typing import Any

import keras

from keras_distill.grids import resample

Shape = tuple[Any, ...]  # sizes, None where they are not known


class Adapter(keras.Layer):
    """Base class of layers that map student features to a teacher's shape.

    A link calls `match` with the shapes of both sides before the adapter is built; who
    uses an adapter without a link gives `target_shape`.

    Args:
        target_shape: The teacher's shape without the batch, such as `(8, 8, 64)`.
        **kwargs: As in `keras.Layer`.
    """

    def __init__(self, target_shape: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.target_shape: Any = target_shape and tuple(target_shape)
        self.supports_masking = True

    def match(self, student_shape: Any, teacher_shape: Any) -> None:
        """Learns what to map onto what.

        Args:
            student_shape: Shape of the student's features, with the batch.
            teacher_shape: Shape of the teacher's features (behind its adapter), with
                the batch.

        Raises:
            ValueError: If there is no such map, or if the adapter was made for another
                shape.
        """
        check_shape(self, "student", student_shape)
        check_shape(self, "teacher", teacher_shape)
        target = tuple(teacher_shape[1:])
        if self.target_shape not in (None, target):
            raise ValueError(
                f"{type(self).__name__} was made for teacher features of shape "
                f"{(None, *self.target_shape)}. Received: {tuple(teacher_shape)}. "
                "Each link needs an adapter of its own."
            )
        self.check_map(tuple(student_shape), (None, *target))
        self.target_shape = target

    def check_map(self, student_shape: Shape, teacher_shape: Shape) -> None:
        """Raises ValueError where the adapter cannot map one shape to the other."""
        check_same_rank(self, student_shape, teacher_shape)
        check_known_grids(self, student_shape, teacher_shape)

    def build(self, input_shape: Any) -> None:
        check_shape(self, "student", input_shape)
        if self.target_shape is None:
            raise ValueError(
                f"{type(self).__name__} does not know the teacher's shape: use it in a "
                "link, call `match(student_shape, teacher_shape)`, or give "
                "`target_shape`."
            )
        self.check_map(tuple(input_shape), (None, *self.target_shape))
        self.build_parts(tuple(input_shape))
        self.built = True

    def build_parts(self, input_shape: Shape) -> None:
        """Makes and builds the layers inside."""
        raise NotImplementedError

    def part(self, layer: keras.Layer, input_shape: Shape) -> keras.Layer:
        """A layer inside, built."""
        layer.build(input_shape)
        return layer

    def to_grid(self, x: Any) -> Any:
        """Pools or interpolates features to the teacher's grid."""
        return resample(x, self.target_shape[:-1])

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """The input's mask, if the positions are still the same."""
        same = tuple(inputs.shape[1:-1]) == self.target_shape[:-1]
        return previous_mask if same else None

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "target_shape": self.target_shape}


def check_shape(layer: keras.Layer, who: str, shape: Any) -> None:
    """Raises ValueError unless this is one shape `(batch, ..., channels)`."""
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) < 2
        or not all(size is None or isinstance(size, int) for size in shape)
        or shape[-1] is None
    ):
        raise ValueError(
            f"{type(layer).__name__} needs {who} features of one layer, of shape "
            f"(batch, ..., channels) with known channels. Received: {shape}"
        )


def check_same_rank(layer: keras.Layer, student: Shape, teacher: Shape) -> None:
    """Raises ValueError unless both shapes have the same number of axes."""
    if len(student) != len(teacher):
        raise ValueError(
            f"{type(layer).__name__} maps features to features with the same number of "
            f"axes. Received: student {student}, teacher {teacher}"
        )


def check_known_grids(layer: keras.Layer, student: Shape, teacher: Shape) -> None:
    """Raises ValueError if a grid may differ, but is not known."""
    for s, t in zip(student[1:-1], teacher[1:-1], strict=True):
        if s != t and None in (s, t):
            raise ValueError(
                f"{type(layer).__name__} needs grids of known size. Received: student "
                f"{student}, teacher {teacher}"
            )


def check_grid(layer: keras.Layer, shape: Shape) -> None:
    """Raises ValueError unless the shape is `(batch, height, width, channels)`."""
    if len(shape) != 4:
        raise ValueError(
            f"{type(layer).__name__} needs features of shape (batch, height, width, "
            f"channels). Received: {shape}"
        )


def pointwise(layer: keras.Layer, rank: int, channels: int, **kwargs: Any) -> Any:
    """A map of channels, the same at all positions: a 1 × 1 convolution on grids."""
    kwargs["dtype"] = layer.dtype_policy
    if rank == 4:
        return keras.layers.Conv2D(channels, 1, data_format="channels_last", **kwargs)
    return keras.layers.Dense(channels, **kwargs)


def convolution(layer: keras.Layer, channels: int, size: Any, **kwargs: Any) -> Any:
    """A convolution, channels last, in the precision of `layer`."""
    kwargs.setdefault("padding", "same")
    return keras.layers.Conv2D(
        channels, size, data_format="channels_last", dtype=layer.dtype_policy, **kwargs
    )


def batch_normalization(layer: keras.Layer) -> keras.layers.BatchNormalization:
    """Batch normalization in the precision of `layer`."""
    return keras.layers.BatchNormalization(epsilon=1e-5, dtype=layer.dtype_policy)
