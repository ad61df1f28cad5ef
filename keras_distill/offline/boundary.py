"""Activation boundaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from keras_distill.adapters import Connector
from keras_distill.links import Link
from keras_distill.losses.base import PACKAGE
from keras_distill.losses.boundary import ActivationBoundary
from keras_distill.offline.preset import (
    labels_and_links,
    pairs_of_layers,
    paths_by_path,
    tap_shapes,
)
from keras_distill.offline.stages import Staged
from keras_distill.teachers.base import Teacher
from keras_distill.teachers.ensemble import as_teacher


@keras.saving.register_keras_serializable(package=PACKAGE)
class ActivationBoundaryDistiller(Staged):
    """Activation boundaries: the student's neurons fire where the teacher's do.

    Stage one, `fit_hints`, trains the student up to the last of the layers by
    `ActivationBoundary`; layer i of L (from 0) has the weight
    `weight * 2 ** (i - L + 1)`. Stage two, `fit`, is ordinary training without the
    links, on the labels unless `temperature`, `beta` or `soft_loss` asks for soft
    targets.

    Args:
        student: A built Keras model.
        teacher: As in `Distiller`.
        layers: {student layer: teacher layer} from shallow to deep, both before their
            ReLU. Where shapes differ a `Connector` is put behind the student's.
        margin: How far beyond the boundary the student should be.
        weight: Weight of the last layer.
        **options: Further arguments of `Distiller`; alpha is 1 by default.

    Raises:
        TypeError: If `layers` is not a dict.
        ValueError: If it is empty, a layer does not exist, or shapes cannot be mapped.

    Example:

    ```python
    distiller = kd.ActivationBoundaryDistiller(
        student, teacher, {"features": "features"}
    )
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    distiller.fit_hints(x, epochs=2)
    distiller.fit(x, y, epochs=2)
    ```

    References:
        Heo et al., Knowledge Transfer via Distillation of Activation Boundaries Formed
        by Hidden Neurons, AAAI 2019 (arXiv 1811.03233). Weights are the official
        code's. There stage two is soft targets alone, without the factor T²: `alpha=0,
        beta=1, soft_loss=kd.losses.SoftTarget(3.0, scale_by_temperature=False)`.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any,
        layers: Mapping[Any, Any],
        *,
        margin: float = 1.0,
        weight: float = 0.003,
        **options: Any,
    ) -> None:
        pairs = pairs_of_layers("layers", layers)
        teacher = as_teacher(teacher)
        super().__init__(
            student,
            teacher,
            hints=[
                Link(
                    own,
                    other,
                    ActivationBoundary(margin),
                    weight=weight * 2.0 ** (i - len(pairs) + 1),
                    adapter=_connector(student, teacher, own, other),
                )
                for i, (own, other) in enumerate(pairs)
            ],
            **labels_and_links(options),
        )
        self.margin = margin
        self.layer_weight = weight

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "layers": paths_by_path(self.hints),
            "margin": self.margin,
            "weight": self.layer_weight,
        }


def _connector(
    student: keras.Model, teacher: Teacher, own: Any, other: Any
) -> Connector | None:
    """A connector where the two layers' shapes differ, as in the official code."""
    mine, known = tap_shapes(student, teacher, own, other, "layers")
    return None if mine[1:] == known[1:] else Connector()
