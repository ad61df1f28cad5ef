"""Relations between the samples of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_distill.links import Link
from keras_distill.losses.base import PACKAGE
from keras_distill.losses.relation import (
    CorrelationCongruence,
    ProbabilisticTransfer,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
)
from keras_distill.offline.preset import Preset, two_layers

LOSSES = {
    "distance": RelationalDistance,
    "angle": RelationalAngle,
    "similarity": SimilarityPreserving,
    "probabilistic": ProbabilisticTransfer,
    "congruence": CorrelationCongruence,
}


@keras.saving.register_keras_serializable(package=PACKAGE)
class RelationalDistiller(Preset):
    """Relations: samples lie to each other as they do in the teacher's eyes.

    The compiled loss plus up to five terms that compare the embeddings of a batch:
    `distance` and `angle` (relational distillation), `similarity` (similarity
    preserving), `probabilistic` (probabilistic transfer) and `congruence` (correlation
    congruence, of embeddings scaled to length 1). A term of weight 0 is left out.
    Embeddings may have different sizes, and classes need not be the same. Without
    labels and without a compiled loss the terms alone train: metric learning.

    Args:
        student: A built Keras model.
        teacher: As in `Distiller`.
        embedding: (student layer, teacher layer), each giving `(B, D)`; for
            `similarity` alone any features.
        distance_weight: Weight of the distances.
        angle_weight: Weight of the angles.
        similarity_weight: Weight of the similarities.
        probabilistic_weight: Weight of the probabilities.
        congruence_weight: Weight of the congruence.
        alpha: Weight of the compiled loss.
        soft_loss: As in `Distiller`, by default none.
        **options: Further arguments of `Distiller`.

    Raises:
        ValueError: If `embedding` is not a pair, all weights are 0, or a layer does not
            give embeddings.

    Example:

    ```python
    distiller = kd.RelationalDistiller(
        student, teacher, embedding=("embedding", "embedding")
    )
    distiller.compile("adam").fit(x, epochs=2)
    ```

    References:
        Park et al., Relational Knowledge Distillation, CVPR 2019 (arXiv 1904.05068),
        whose weights these are. Tung, Mori, ICCV 2019 (arXiv 1907.09682): 3000.
        Passalis, Tefas, ECCV 2018 (arXiv 1803.10837): 30000. Peng et al., ICCV 2019
        (arXiv 1904.01802): 0.02 is in use for another form of that term; with the
        paper's, which this is, it is next to nothing.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any,
        *,
        embedding: Sequence[Any],
        distance_weight: float = 1.0,
        angle_weight: float = 2.0,
        similarity_weight: float = 0.0,
        probabilistic_weight: float = 0.0,
        congruence_weight: float = 0.0,
        alpha: float = 1.0,
        soft_loss: Any = None,
        **options: Any,
    ) -> None:
        own, other = two_layers("embedding", embedding)
        weights = {
            "distance": distance_weight,
            "angle": angle_weight,
            "similarity": similarity_weight,
            "probabilistic": probabilistic_weight,
            "congruence": congruence_weight,
        }
        if not any(weights.values()):
            raise ValueError(
                "All weights of the relations are 0, so nothing would be compared. Set "
                f"at least one of {', '.join(f'`{name}_weight`' for name in weights)}."
            )
        super().__init__(
            student,
            teacher,
            own=[
                Link(
                    own,
                    other,
                    LOSSES[name](),
                    weight=weight,
                    adapter=_unit(name),
                    teacher_adapter=_unit(name),
                    name=name,
                )
                for name, weight in weights.items()
                if weight
            ],
            alpha=alpha,
            soft_loss=soft_loss,
            **options,
        )
        self.relation_weights = weights

    def get_config(self) -> dict[str, Any]:
        link = self.own_links[0]
        weights = {f"{k}_weight": v for k, v in self.relation_weights.items()}
        return super().get_config() | {
            "embedding": [link.student_layer, link.teacher_layer],
            **weights,
        }


def _unit(name: str) -> keras.Layer | None:
    """Scales embeddings to length 1, for the loss that asks for it."""
    if name != "congruence":
        return None
    return keras.layers.UnitNormalization(dtype="float32")
