"""Contrastive representation distillation, with two memory banks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill.distiller import Distiller
from keras_distill.fitting import unique
from keras_distill.inputs import INDEX, plain_inputs
from keras_distill.losses.base import PACKAGE
from keras_distill.offline.memory import MemoryBank, check_count
from keras_distill.offline.preset import labels_and_links, tap_shapes, two_layers
from keras_distill.taps import paths_of
from keras_distill.teachers.ensemble import as_teacher
from keras_distill.weighting import current_share


@keras.saving.register_keras_serializable(package=PACKAGE)
class ContrastiveDistiller(Distiller):
    r"""Contrastive representation distillation (CRD).

    Two linear heads, both trained, map the embeddings of student and teacher to unit
    vectors. The term `contrastive` asks each of them to tell its own sample among K
    others in a memory of what the other network said of every sample (see
    `MemoryBank`); it is the sum of both directions. The memories follow the vectors
    with momentum. There is a soft term only if `beta` or `soft_loss` asks for one;
    `temperature` is this method's.

    On several replicas there is one memory of all rows: each scores its own rows
    against it, and all enter the vectors of the global batch.

    Data carry the position of each row in the training set: `x` is a dict with the
    integers `x["kd_index"]` beside the inputs, which the networks do not see. In
    `evaluate` and `predict` it may be missing.

    Args:
        student: A built Keras model.
        teacher: As in `Distiller`.
        embedding: (student layer, teacher layer), each giving `(B, D)`.
        num_samples: Number of rows of the training set.
        embedding_dim: Size of the unit vectors.
        negatives: K, other samples per row; the time and the memory of a step grow
            with `batch * K * embedding_dim`.
        temperature: Of the similarities.
        momentum: Share of the old vector in the memory's new one.
        weight: Weight of the term.
        **options: Further arguments of `Distiller`; alpha is 1 by default. The
            temperature of soft targets goes into their loss:
            `soft_loss=kd.losses.SoftTarget(4.0)`.

    Raises:
        ValueError: If an argument is out of range, a layer gives no vectors, or the
            data have no index.

    Example:

    ```python
    distiller = kd.ContrastiveDistiller(
        student, teacher, embedding=("embedding", "embedding"),
        num_samples=len(x), negatives=64,
    )
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    distiller.fit({"image": x, "kd_index": np.arange(len(x))}, y, epochs=2)
    ```

    References:
        Tian, Krishnan, Isola, Contrastive Representation Distillation, ICLR 2020
        (arXiv 1910.10699). Negatives are drawn from all other samples, also of the
        same class.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any,
        *,
        embedding: Sequence[Any],
        num_samples: int,
        embedding_dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        weight: float = 0.8,
        **options: Any,
    ) -> None:
        own, other = two_layers("embedding", embedding)
        check_count("negatives", negatives)
        teacher = as_teacher(teacher)
        super().__init__(student, teacher, **labels_and_links(options))
        shapes = tap_shapes(student, teacher, own, other, "embedding")
        self._taps = [paths_of(student, own, "embedding"), teacher.resolve(other)]
        self._student_taps = unique([*self._student_taps, self._taps[0]])
        self._teacher_taps = unique([*self._teacher_taps, self._taps[1]])
        self.student_head = _head(shapes[0], embedding_dim, "student")
        self.teacher_head = _head(shapes[1], embedding_dim, "teacher")
        self.student_memory, self.teacher_memory = (
            MemoryBank(num_samples, embedding_dim, temperature, momentum)
            for _ in self._taps
        )
        self.negatives = negatives
        self.seed_generator = keras.random.SeedGenerator()
        self.contrastive_weight = weight
        self.add_term("contrastive", weight)

    @property
    def link_names(self) -> tuple[str, ...]:
        return (*super().link_names, "contrastive")

    @property
    def compares_rows(self) -> bool:
        return True

    def _collective(self, *compared: Any) -> bool:
        return self.distribute_strategy.num_replicas_in_sync > 1

    def _adapted(self, features: dict[str, Any]) -> dict[str, Any]:
        own = self.student_head(features[self._taps[0]], training=True)
        return super()._adapted(features) | {"contrastive": own}

    def _further_terms(
        self, x: Any, features: dict[str, Any], adapted: dict[str, Any], weight: Any
    ) -> dict[str, Any]:
        x = plain_inputs(x)
        if not isinstance(x, dict) or INDEX not in x:
            raise ValueError(
                "ContrastiveDistiller needs the position of each row in the training "
                f"set: `x` must be a dict with integers x[{INDEX!r}]."
            )
        index = ops.cast(ops.reshape(x[INDEX], (-1,)), "int32")
        own = adapted["contrastive"]
        known = self.teacher_head(features[self._taps[1]], training=True)
        indices = self._with_negatives(index)
        values = self.teacher_memory.contrast(own, indices)
        values = values + self.student_memory.contrast(known, indices)
        vectors = (index, ops.stop_gradient(own), ops.stop_gradient(known))
        share = current_share()
        index, own, known = vectors if share is None else share.gather(vectors)
        self.student_memory.update(index, own)
        self.teacher_memory.update(index, known)
        return {"contrastive": self.mean(values, weight)}

    def _with_negatives(self, index: Any) -> Any:
        """Each row's own position, then random others: `(B, 1 + K)`.

        They are drawn for the global batch, so that its split does not matter.
        """
        share = current_share()
        rows = ops.shape(index)[0] if share is None else ops.cast(share.total, "int32")
        last = self.student_memory.num_samples - 1
        shape = (rows, self.negatives)
        others = keras.random.randint(shape, 0, last, seed=self.seed_generator)
        others = others if share is None else share.own(others)
        own = ops.expand_dims(index, -1)
        others = others + ops.cast(others >= own, others.dtype)
        return ops.concatenate([own, others], -1)

    def get_config(self) -> dict[str, Any]:
        memory = self.student_memory
        return super().get_config() | {
            "embedding": list(self._taps),
            "num_samples": memory.num_samples,
            "embedding_dim": memory.size,
            "negatives": self.negatives,
            "temperature": memory.temperature,
            "momentum": memory.momentum,
            "weight": self.contrastive_weight,
        }


def _head(shape: tuple, size: int, who: str) -> keras.Model:
    """A linear map to unit vectors, in float32 whatever the networks compute in."""
    if len(shape) != 2 or shape[-1] is None:
        raise ValueError(
            f"`embedding` must name layers that give vectors (B, D). The {who}'s gives "
            f"{shape}."
        )
    return keras.Sequential(
        [
            keras.Input(shape[1:]),
            keras.layers.Dense(size, dtype="float32"),
            keras.layers.UnitNormalization(dtype="float32"),
        ],
        name=f"{who}_head",
    )
