"""Inheritance and exploration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_distill.adapters import Paraphraser, Translator
from keras_distill.links import Link
from keras_distill.losses.adapted import FactorTransfer
from keras_distill.losses.base import PACKAGE
from keras_distill.offline.preset import Preset, labels_and_links, two_layers


@keras.saving.register_keras_serializable(package=PACKAGE)
class Exploration(FactorTransfer):
    """The negative of `FactorTransfer`: the further from the teacher, the better.

    Both factors have norm 1, so there is a furthest.
    """

    def call(self, y_true: Any, y_pred: Any, rows: Any = None) -> Any:
        return -super().call(y_true, y_pred)


@keras.saving.register_keras_serializable(package=PACKAGE)
class PartTranslator(Translator):
    """A translator that sees the first or the second half of the channels.

    Args:
        side: 0 or 1.
        target_shape: As in `Translator`.
        **kwargs: As in `Translator`.
    """

    def __init__(self, side: int, target_shape: Any = None, **kwargs: Any) -> None:
        super().__init__(target_shape, **kwargs)
        self.side = side

    def check_map(self, student_shape: Any, teacher_shape: Any) -> None:
        super().check_map(student_shape, teacher_shape)
        if student_shape[-1] < 2:
            raise ValueError(
                "`features`: a student's feature of one channel cannot be split in "
                f"two. Received shape {student_shape}."
            )

    def build_parts(self, input_shape: Any) -> None:
        half = input_shape[-1] // 2
        width = half if self.side == 0 else input_shape[-1] - half
        super().build_parts((*input_shape[:-1], width))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        half = inputs.shape[-1] // 2
        x = inputs[..., :half] if self.side == 0 else inputs[..., half:]
        return super().call(x, training=training)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "side": self.side}


@keras.saving.register_keras_serializable(package=PACKAGE)
class InheritExplore(Preset):
    """Inheritance and exploration (IE-KD): one half learns, the other looks elsewhere.

    The channels of the student's feature are split in two halves, each with a
    translator of its own. The first half's factor is pulled towards the teacher's
    factor (`inherit`: `FactorTransfer`), the second's pushed away from it (`explore`:
    its negative); the compiled loss keeps both useful. The teacher's factor comes from
    a paraphraser, an autoencoder's half that `pretrain` trains on the teacher's
    features. There is a soft term only if `temperature`, `beta` or `soft_loss` asks for
    one.

    Args:
        student: A built Keras model.
        teacher: As in `Distiller`.
        features: (student layer, teacher layer), grids near the end of each network.
        inherit_weight: Weight of the inheritance.
        explore_weight: Weight of the exploration.
        paraphraser: A paraphraser that is trained already; None for a new one, which is
            random until `pretrain`.
        **options: Further arguments of `Distiller`; alpha is 1 by default.

    Raises:
        TypeError: If `paraphraser` is none.
        ValueError: If `features` is not a pair, or its layers do not give grids.

    Example:

    ```python
    distiller = kd.InheritExplore(student, teacher, features=("features", "features"))
    distiller.pretrain(x, epochs=2)
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    distiller.fit(x, y, epochs=2)
    ```

    References:
        Huang et al., Revisiting Knowledge Distillation: An Inheritance and Exploration
        Framework, CVPR 2021 (arXiv 2107.00181). There is no official code; weights are
        factor transfer's.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any,
        *,
        features: Sequence[Any],
        inherit_weight: float = 500.0,
        explore_weight: float = 500.0,
        paraphraser: Paraphraser | None = None,
        **options: Any,
    ) -> None:
        own, other = two_layers("features", features)
        if paraphraser is None:
            paraphraser = Paraphraser()
            paraphraser.trainable = False
        elif not isinstance(paraphraser, Paraphraser):
            raise TypeError(
                "`paraphraser` must be a kd.adapters.Paraphraser. "
                f"Received: {paraphraser!r}"
            )
        parts = (
            ("inherit", FactorTransfer(), inherit_weight),
            ("explore", Exploration(), explore_weight),
        )
        super().__init__(
            student,
            teacher,
            own=[
                Link(
                    own,
                    other,
                    loss,
                    weight=weight,
                    adapter=PartTranslator(part),
                    teacher_adapter=paraphraser,
                    name=name,
                )
                for part, (name, loss, weight) in enumerate(parts)
            ],
            **labels_and_links(options),
        )
        self.paraphraser = paraphraser
        self.part_weights = (inherit_weight, explore_weight)

    def pretrain(
        self, data: Any, epochs: int = 30, **options: Any
    ) -> keras.callbacks.History:
        """Trains the paraphraser on the teacher's features: see `Paraphraser.pretrain`.

        Call it before `compile`.
        """
        layer = self.own_links[0].teacher_layer
        return self.paraphraser.pretrain(
            self.teacher, layer, data, epochs=epochs, **options
        )

    def get_config(self) -> dict[str, Any]:
        link = self.own_links[0]
        return super().get_config() | {
            "features": [link.student_layer, link.teacher_layer],
            "inherit_weight": self.part_weights[0],
            "explore_weight": self.part_weights[1],
            "paraphraser": keras.saving.serialize_keras_object(self.paraphraser),
        }
