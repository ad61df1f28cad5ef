"""FitNets: hints from the teacher's middle layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from keras_distill.links import Link
from keras_distill.losses.base import PACKAGE
from keras_distill.losses.feature import Hint
from keras_distill.offline.preset import pairs_of_layers, paths_by_path
from keras_distill.offline.stages import Staged


@keras.saving.register_keras_serializable(package=PACKAGE)
class HintDistiller(Staged):
    r"""FitNets: the student first learns what the teacher's middle layers say.

    Stage one, `fit_hints`, trains the student up to the guided layers, and a regressor
    for each, by `weight * mean (teacher - regressor(student))²`. Stage two, `fit`, is
    distillation without hints: the compiled loss plus soft targets at T = 3, whose
    weight falls from 4 to 1, `beta = 4 - 3 e / max(E - 1, 1)` in epoch e of E. Paper
    and official code have no factor T² there; this library's soft targets have it, here
    too, which makes them 9 times as strong at T = 3. As the paper has it:
    `soft_loss=kd.losses.SoftTarget(3.0, scale_by_temperature=False)`. With
    `joint=True` there is one stage, in which the hints have their constant weight.

    Args:
        student: A built Keras model.
        teacher: As in `Distiller`.
        hints: {student layer: teacher layer}: the guided layers and their hints.
            Regressors are made where shapes differ: a 1 × 1 convolution for channels,
            pooling or interpolation for grids.
        joint: Whether hints are trained together with the rest.
        weight: Weight of each hint.
        temperature: T of the soft targets, 3 by default.
        alpha: Weight of the compiled loss.
        beta: Weight of the soft targets; None for the falling weight, a number stays
            constant.
        soft_loss: As in `Distiller`.
        **options: Further arguments of `Distiller`.

    Raises:
        TypeError: If `hints` is not a dict.
        ValueError: If it is empty, or a layer does not exist.

    Example:

    ```python
    distiller = kd.HintDistiller(student, teacher, hints={"features": "features"})
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    distiller.fit_hints(x, epochs=2)
    distiller.fit(x, y, epochs=2)
    ```

    References:
        Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015
        (arXiv 1412.6550). The hint is the mean over all elements, as in the
        reimplementations; `½ H W C` times as much is the paper's.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any,
        hints: Mapping[Any, Any],
        *,
        joint: bool = False,
        weight: float = 1.0,
        temperature: Any = None,
        alpha: float = 1.0,
        beta: float | None = None,
        soft_loss: Any = "auto",
        **options: Any,
    ) -> None:
        if temperature is None and isinstance(soft_loss, str) and soft_loss == "auto":
            temperature = 3.0
        super().__init__(
            student,
            teacher,
            hints=[
                Link(own, other, Hint(), weight=weight, adapter="auto")
                for own, other in pairs_of_layers("hints", hints)
            ],
            joint=joint,
            temperature=temperature,
            alpha=alpha,
            beta=beta,
            soft_loss=soft_loss,
            **options,
        )
        self.hint_weight = weight
        self._falling = beta is None and self.soft_loss is not None
        if self._falling:
            self.beta = 4.0

    def epoch_began(self, epoch: int, epochs: int) -> None:
        super().epoch_began(epoch, epochs)
        if self._falling:
            self.beta = 4 - 3 * min(1, epoch / max(epochs - 1, 1))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config() | {
            "hints": paths_by_path(self.hints),
            "joint": self.joint,
            "weight": self.hint_weight,
        }
        if self._falling:
            config["beta"] = None
        return config
