"""Residual networks for 32 x 32 images, as functional models that give logits.

Stages have names that links can use: the outputs of the stages are called `stage1`,
`stage2`, `stage3`, the pooled embedding `embedding`, the last layer `logits`.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers


def wide_resnet(
    depth: int,
    width: int,
    num_classes: int = 10,
    input_shape: tuple[int, ...] = (32, 32, 3),
    seed: int | None = None,
) -> keras.Model:
    """WRN-depth-width (Zagoruyko and Komodakis, arXiv:1605.07146).

    Pre-activation blocks of two 3 x 3 convolutions, three stages of 16, 32 and 64
    times `width` channels, no dropout.

    Args:
        depth: 6 n + 4: 16, 22, 28, 40.
        width: Factor on the channels.
        num_classes: Number of logits.
        input_shape: Of one image, `(H, W, C)`.
        seed: Of the initial weights.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"`depth` must be 6 n + 4, n of 1 or more. Received: {depth}")
    conv = _Convolutions(seed)
    inputs = keras.Input(input_shape)
    x = conv(inputs, 16)
    for stage in range(3):
        channels = 16 * 2**stage * width
        for block in range((depth - 4) // 6):
            name = f"stage{stage + 1}" if block == (depth - 10) // 6 else None
            stride = 2 if stage and not block else 1
            before = layers.Activation("relu")(_normalize(x))
            same = x.shape[-1] == channels and stride == 1
            shortcut = x if same else conv(before, channels, 1, stride)
            x = conv(before, channels, 3, stride)
            x = conv(layers.Activation("relu")(_normalize(x)), channels)
            x = layers.Add(name=name)([x, shortcut])
    x = layers.Activation("relu")(_normalize(x))
    outputs = _head(x, num_classes, conv.initializer())
    return keras.Model(inputs, outputs, name=f"wrn_{depth}_{width}")


def resnet(
    depth: int,
    width: int = 16,
    num_classes: int = 10,
    input_shape: tuple[int, ...] = (32, 32, 3),
    seed: int | None = None,
) -> keras.Model:
    """CIFAR ResNet (He et al., arXiv:1512.03385).

    Post-activation blocks, three stages of 1, 2 and 4 times `width` channels.

    Args:
        depth: 6 n + 2: 8, 14, 20, 32, 56.
        width: Channels of the first stage.
        num_classes: Number of logits.
        input_shape: Of one image, `(H, W, C)`.
        seed: Of the initial weights.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"`depth` must be 6 n + 2, n of 1 or more. Received: {depth}")
    conv = _Convolutions(seed)
    inputs = keras.Input(input_shape)
    x = layers.Activation("relu")(_normalize(conv(inputs, width)))
    for stage in range(3):
        channels = width * 2**stage
        for block in range((depth - 2) // 6):
            name = f"stage{stage + 1}" if block == (depth - 8) // 6 else None
            stride = 2 if stage and not block else 1
            same = x.shape[-1] == channels and stride == 1
            shortcut = x if same else _normalize(conv(x, channels, 1, stride))
            x = layers.Activation("relu")(_normalize(conv(x, channels, 3, stride)))
            x = layers.Add()([_normalize(conv(x, channels)), shortcut])
            x = layers.Activation("relu", name=name)(x)
    outputs = _head(x, num_classes, conv.initializer())
    return keras.Model(inputs, outputs, name=f"resnet_{depth}_{width}")


class _Convolutions:
    """Convolutions without bias, each with initial weights from a seed of its own."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._count = 0

    def initializer(self) -> Any:
        self._count += 1
        seed = None if self._seed is None else 1000 * self._seed + self._count
        return keras.initializers.HeNormal(seed=seed)

    def __call__(self, x: Any, channels: int, size: int = 3, stride: int = 1) -> Any:
        return layers.Conv2D(
            channels,
            size,
            strides=stride,
            padding="same",
            use_bias=False,
            kernel_initializer=self.initializer(),
        )(x)


def _normalize(x: Any) -> Any:
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)


def _head(x: Any, num_classes: int, initializer: Any) -> Any:
    x = layers.GlobalAveragePooling2D(name="embedding")(x)
    return layers.Dense(num_classes, name="logits", kernel_initializer=initializer)(x)
