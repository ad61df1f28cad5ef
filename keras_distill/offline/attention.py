"""Attention transfer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from keras_distill.links import Link
from keras_distill.losses.base import PACKAGE
from keras_distill.losses.feature import AttentionTransfer
from keras_distill.offline.preset import (
    Preset,
    labels_and_links,
    pairs_of_layers,
    paths_by_path,
)


@keras.saving.register_keras_serializable(package=PACKAGE)
class AttentionDistiller(Preset):
    """Attention transfer: the student looks where the teacher looks.

    The compiled loss plus `weight` times the sum of `AttentionTransfer` over pairs of
    layers, in one stage. There is a soft term only if `temperature`, `beta` or
    `soft_loss` asks for one.

    Args:
        student: A built Keras model.
        teacher: As in `Distiller`.
        layers: {student layer: teacher layer}, outputs of stages. Channels may
            differ; of two grids the larger is average-pooled.
        p: Power of the activations in the maps.
        weight: Weight of each pair.
        **options: Further arguments of `Distiller`; alpha is 1 by default.

    Raises:
        TypeError: If `layers` is not a dict.
        ValueError: If it is empty, a layer does not exist, or gives no grid.

    Example:

    ```python
    distiller = kd.AttentionDistiller(student, teacher, {"features": "features"})
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    distiller.fit(x, y, epochs=2)
    ```

    References:
        Zagoruyko, Komodakis, Paying More Attention to Attention, ICLR 2017
        (arXiv 1612.03928). Loss and weight are the official code's.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any,
        layers: Mapping[Any, Any],
        *,
        p: float = 2,
        weight: float = 1000.0,
        **options: Any,
    ) -> None:
        super().__init__(
            student,
            teacher,
            own=[
                Link(own, other, AttentionTransfer(p), weight=weight)
                for own, other in pairs_of_layers("layers", layers)
            ],
            **labels_and_links(options),
        )
        self.p = p
        self.layer_weight = weight

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "layers": paths_by_path(self.own_links),
            "p": self.p,
            "weight": self.layer_weight,
        }
