"""Contrast with a memory of all samples."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_distill.distribute.replicas import assign_rows
from keras_distill.grids import normalize
from keras_distill.losses.base import PACKAGE, check_positive
from keras_distill.weighting import mean_of_rows


@keras.saving.register_keras_serializable(package=PACKAGE)
class MemoryBank(keras.Layer):
    r"""A unit vector for every sample of the training set, which embeddings meet.

    With `h = exp(⟨memory, embedding⟩ / temperature) / Z` for a row's own sample (`h₀`)
    and K others of N, and `c = K / N`, each row gets

    $$-\log\frac{h_0}{h_0 + c} - \sum_{k=1}^{K} \log\frac{c}{h_k + c}$$

    with 1e-7 added to both denominators, as in the official code. Z is N times the mean
    of the first batch's scores, and stays so. No gradient flows
    into the memory, which follows what it is told by `update`.

    Args:
        num_samples: N.
        size: Size of the vectors.
        temperature: Of the similarities, above 0.
        momentum: Share of the old vector in the new one, in [0, 1).
        **kwargs: As in `keras.Layer`.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> import keras
    >>> bank = MemoryBank(num_samples=10, size=4)
    >>> embedding = keras.ops.convert_to_tensor([[1.0, 0.0, 0.0, 0.0]])
    >>> tuple(bank.contrast(embedding, [[3, 0, 1, 2]]).shape)
    (1,)

    References:
        Tian, Krishnan, Isola, Contrastive Representation Distillation, ICLR 2020
        (arXiv 1910.10699).
    """

    def __init__(
        self,
        num_samples: int,
        size: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**({"dtype": "float32"} | kwargs))
        check_count("num_samples", num_samples, 2)
        check_count("size", size)
        check_positive("temperature", temperature)
        if not 0 <= momentum < 1:
            raise ValueError(
                f"`momentum` must be at least 0, below 1. Received: {momentum}"
            )
        self.num_samples = num_samples
        self.size = size
        self.temperature = float(temperature)
        self.momentum = float(momentum)
        spread = math.sqrt(3 / size)
        self.memory = self.add_weight(
            shape=(num_samples, size),
            initializer=keras.initializers.RandomUniform(-spread, spread),
            trainable=False,
            name="memory",
        )
        self.scale = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="scale"
        )
        self.built = True

    def contrast(self, embedding: Any, indices: Any) -> Any:
        """The loss of each row.

        Args:
            embedding: Unit vectors `(B, size)`.
            indices: Integers `(B, 1 + K)`: each row's own sample, then the others.

        Returns:
            Values `(B,)`.
        """
        others = ops.shape(indices)[1] - 1
        vectors = ops.take(ops.stop_gradient(self.memory.value), indices, axis=0)
        products = ops.squeeze(ops.matmul(vectors, embedding[:, :, None]), -1)
        scores = ops.exp(products / self.temperature)
        scale = self.scale.value
        fresh = ops.stop_gradient(mean_of_rows(scores)) * self.num_samples
        scale = ops.where(scale > 0, scale, fresh)
        self.scale.assign(scale)
        scores = scores / scale
        noise = ops.cast(others, scores.dtype) / self.num_samples
        total = scores + noise + 1e-7
        own = ops.log(scores[:, 0]) - ops.log(total[:, 0])
        return -own - ops.sum(ops.log(noise) - ops.log(total[:, 1:]), -1)

    def update(self, index: Any, embedding: Any) -> None:
        """Moves the memory of some samples towards their embeddings.

        Args:
            index: Integers `(B,)`; on several replicas the rows of all of them.
            embedding: Unit vectors `(B, size)`.
        """
        old = ops.take(self.memory.value, index, axis=0)
        new = self.momentum * old + (1 - self.momentum) * ops.cast(embedding, old.dtype)
        new = normalize(ops.stop_gradient(new))
        assign_rows(self.memory, index, new)  # in place: there may be millions

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_samples": self.num_samples,
            "size": self.size,
            "temperature": self.temperature,
            "momentum": self.momentum,
        }


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}. Received: {value!r}"
        )
