"""Flow of the solution procedure, and its singular vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from keras_distill.links import Link
from keras_distill.losses.base import PACKAGE
from keras_distill.losses.flow import FlowOfProcedure, SingularValue
from keras_distill.offline.preset import labels_and_links, pairs_of_layers
from keras_distill.offline.stages import Staged
from keras_distill.policies import ClipToMain


@keras.saving.register_keras_serializable(package=PACKAGE)
class FlowDistiller(Staged):
    """Flows: what happens between two layers, not what they say.

    Consecutive layers form the pairs. With `method="fsp"` stage one, `fit_hints`,
    trains the student up to the last layer by `FlowOfProcedure`, and stage two, `fit`,
    is ordinary training without it. With `method="svd"` there is one stage: the
    compiled loss plus `SingularValue`, whose gradient `ClipToMain()` limits
    (`compile`'s default here). There is a soft term only if `temperature`, `beta` or
    `soft_loss` asks for one.

    Args:
        student: A built Keras model.
        teacher: As in `Distiller`.
        layers: {student layer: teacher layer} from shallow to deep, two pairs at
            least. At each pair both networks have the same number of channels.
        method: `"fsp"` or `"svd"`.
        rank: Number of singular vectors, for `"svd"` alone.
        weight: Weight of each pair.
        **options: Further arguments of `Distiller`; alpha is 1 by default.

    Raises:
        TypeError: If `layers` is not a dict.
        ValueError: If there are fewer than two layers, channels differ, `method` is
            unknown, or `rank` is given for `"fsp"`.

    Example:

    ```python
    layers = {"features": "features", "deep": "deep"}
    distiller = kd.FlowDistiller(student, teacher, layers, method="svd")
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    distiller.fit(x, y, epochs=2)
    ```

    References:
        Yim et al., A Gift from Knowledge Distillation, CVPR 2017; Lee, Kim, Song,
        Self-supervised Knowledge Distillation Using Singular Value Decomposition,
        ECCV 2018 (arXiv 1807.06819).
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any,
        layers: Mapping[Any, Any],
        *,
        method: str = "fsp",
        rank: int = 1,
        weight: float = 1.0,
        **options: Any,
    ) -> None:
        if method not in ("fsp", "svd"):
            raise ValueError(f"`method` must be 'fsp' or 'svd'. Received: {method!r}")
        if method == "fsp" and rank != 1:
            raise ValueError(
                f"`rank` has no effect with method='fsp'. Received: {rank}"
            )
        pairs = pairs_of_layers("layers", layers, least=2)
        loss = FlowOfProcedure() if method == "fsp" else SingularValue(rank)
        super().__init__(
            student,
            teacher,
            hints=[
                Link([s, next_s], [t, next_t], loss, weight=weight)
                for (s, t), (next_s, next_t) in zip(pairs[:-1], pairs[1:], strict=True)
            ],
            joint=method == "svd",
            **labels_and_links(options),
        )
        self.method = method
        self.rank = rank
        self.layer_weight = weight

    def compile(self, *args: Any, **kwargs: Any) -> FlowDistiller:
        """As `Distiller.compile`; `"svd"` has `gradient_policy=ClipToMain()`."""
        if self.method == "svd":
            kwargs = {"gradient_policy": ClipToMain()} | kwargs
        super().compile(*args, **kwargs)
        return self

    def get_config(self) -> dict[str, Any]:
        layers: dict[str, str] = {}
        for hint in self.hints:
            own, other = hint.student_layer, hint.teacher_layer
            layers |= dict(zip(own, other, strict=True))
        return super().get_config() | {
            "layers": layers,
            "method": self.method,
            "rank": self.rank,
            "weight": self.layer_weight,
        }
