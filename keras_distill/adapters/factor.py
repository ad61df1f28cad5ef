"""The adapters of factor transfer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_distill.adapters.base import (
    Adapter,
    Shape,
    batch_normalization,
    check_grid,
    check_known_grids,
    check_shape,
)
from keras_distill.losses.base import PACKAGE, check_positive
from keras_distill.taps import paths_of, run_with_taps


@keras.saving.register_keras_serializable(package=PACKAGE)
class Paraphraser(keras.Layer):
    """Factor transfer's paraphraser: the encoder of an autoencoder of the teacher.

    Three 3 × 3 convolutions, C → C → kC → kC channels, each followed by a leaky ReLU,
    make the factor; the decoder mirrors them with transposed convolutions. `pretrain`
    trains both on the teacher's features, and freezes them. Used as the
    `teacher_adapter` of a link whose adapter is a `Translator`.

    Args:
        rate: k, channels of the factor per channel of the teacher.
        **kwargs: As in `keras.Layer`.

    Call arguments:
        inputs: Teacher features, float `(B, H, W, C)`.

    Returns:
        The factor, `(B, H, W, max(1, int(k C)))`.

    Raises:
        ValueError: If the features are not grids, or the rate is not above 0.

    Example:

    >>> import keras
    >>> paraphraser = Paraphraser(rate=0.5)
    >>> tuple(paraphraser(keras.ops.ones((2, 4, 4, 16))).shape)
    (2, 4, 4, 8)

    References:
        Kim, Park, Kwak, Paraphrasing Complex Network: Network Compression via Factor
        Transfer, NeurIPS 2018 (arXiv 1802.04977).
    """

    def __init__(self, rate: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive("rate", rate)
        self.rate = rate

    def build(self, input_shape: Any) -> None:
        check_shape(self, "teacher", input_shape)
        check_grid(self, tuple(input_shape))
        channels = input_shape[-1]
        factor = max(1, int(channels * self.rate))
        self.encoder = _leaky_stack(
            self, input_shape, (channels, factor, factor), keras.layers.Conv2D
        )
        self.decoder = _leaky_stack(
            self,
            (*input_shape[:-1], factor),
            (factor, channels, channels),
            keras.layers.Conv2DTranspose,
        )
        self.built = True

    def call(self, inputs: Any) -> Any:
        return _run_leaky(self.encoder, inputs)

    def reconstruct(self, features: Any) -> Any:
        """The features as the autoencoder gives them back."""
        factor = self(features)  # makes the decoder, too
        return _run_leaky(self.decoder, factor)

    def pretrain(
        self,
        teacher: Any,
        layer: Any,
        data: Any,
        *,
        epochs: int = 30,
        optimizer: Any = "adam",
        **fit: Any,
    ) -> keras.callbacks.History:
        """Trains the autoencoder on the teacher's features, and freezes it.

        The loss is the mean absolute error, as in the official code. The teacher is
        not changed.

        Args:
            teacher: A built `keras.Model`, or a `keras_distill.teachers.Teacher`.
            layer: Path of the teacher's layer, as in `Link`; or, for a `keras.Model`,
                the layer.
            data: What `fit` takes as `x`; labels in it are ignored.
            epochs: Number of epochs.
            optimizer: As in `compile`.
            **fit: Further arguments of `fit`.

        Returns:
            The history of `fit`.
        """
        self.trainable = True
        autoencoder = _Autoencoder(self, feature_reader(teacher, layer))
        autoencoder.compile(optimizer=optimizer)
        history = autoencoder.fit(data, epochs=epochs, **fit)
        self.trainable = False
        return history

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate}


class _Autoencoder(keras.Model):
    """Trains a paraphraser; the teacher is hidden in `read`, out of Keras's sight."""

    def __init__(self, paraphraser: Paraphraser, read: Callable[[Any], Any]) -> None:
        super().__init__(name="autoencoder")
        self.paraphraser = paraphraser
        self.read = read

    def call(self, inputs: Any) -> Any:
        features = ops.cast(ops.stop_gradient(self.read(inputs)), "float32")
        output = self.paraphraser.reconstruct(features)
        self.add_loss(ops.mean(ops.abs(ops.cast(output, "float32") - features)))
        return output


def feature_reader(teacher: Any, layer: Any) -> Callable[[Any], Any]:
    """A function from a teacher's inputs to its features at a layer."""
    if isinstance(teacher, keras.Model):
        path = paths_of(teacher, layer, "layer")

        def read(x: Any) -> Any:
            return run_with_taps(teacher, x, [path], training=False)[1][path]
    else:
        path = teacher.resolve(layer)

        def read(x: Any) -> Any:
            return teacher(x, [path], 1.0)[1][path]

    return read


@keras.saving.register_keras_serializable(package=PACKAGE)
class Translator(Adapter):
    """Factor transfer's translator: makes the student's factor.

    Three 3 × 3 convolutions, from the student's C to C, K and K channels, each followed
    by a leaky ReLU, where K are the channels of the teacher's factor, behind its
    `Paraphraser`. Where the grids differ the student's is average-pooled or
    interpolated first.

    Args:
        target_shape: The shape of the teacher's factor without the batch; links tell
            it.
        batch_normalization: Whether batch normalization precedes each leaky ReLU.
        **kwargs: As in `keras.Layer`.

    Call arguments:
        inputs: Student features, float `(B, H, W, C)`.
        training: Whether batch normalization uses the batch's statistics.

    Returns:
        The factor, of the teacher's factor's shape.

    Raises:
        ValueError: If the features are not grids.

    Example:

    >>> import keras
    >>> translator = Translator(target_shape=(4, 4, 8))
    >>> tuple(translator(keras.ops.ones((2, 4, 4, 12))).shape)
    (2, 4, 4, 8)

    References:
        Kim, Park, Kwak, NeurIPS 2018 (arXiv 1802.04977).
    """

    def __init__(
        self,
        target_shape: Any = None,
        *,
        batch_normalization: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(target_shape, **kwargs)
        self.batch_normalization = batch_normalization

    def check_map(self, student_shape: Shape, teacher_shape: Shape) -> None:
        check_grid(self, student_shape)
        check_grid(self, teacher_shape)
        check_known_grids(self, student_shape, teacher_shape)

    def build_parts(self, input_shape: Shape) -> None:
        factor = self.target_shape[-1]
        widths = (input_shape[-1], factor, factor)
        grid = self.target_shape[:-1]
        self.encoder = _leaky_stack(
            self, (None, *grid, input_shape[-1]), widths, keras.layers.Conv2D
        )
        self.normalizations = [
            self.part(batch_normalization(self), (None, *grid, width))
            for width in widths
            if self.batch_normalization
        ]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return _run_leaky(
            self.encoder, self.to_grid(inputs), self.normalizations, training
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "batch_normalization": self.batch_normalization,
        }


def _leaky_stack(
    layer: keras.Layer, input_shape: Any, widths: tuple[int, ...], kind: Any
) -> list[keras.Layer]:
    stack = []
    shape = tuple(input_shape)
    for width in widths:
        stack.append(
            kind(
                width,
                3,
                padding="same",
                data_format="channels_last",
                dtype=layer.dtype_policy,
            )
        )
        stack[-1].build(shape)
        shape = (*shape[:-1], width)
    return stack


def _run_leaky(
    stack: list[keras.Layer],
    x: Any,
    normalizations: Any = (),
    training: bool | None = None,
) -> Any:
    for index, layer in enumerate(stack):
        x = layer(x)
        if normalizations:
            x = normalizations[index](x, training=training)
        x = ops.leaky_relu(x, negative_slope=0.1)
    return x
