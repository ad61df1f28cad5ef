"""Several models as one teacher, and what else may be given as one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill.heads import Head
from keras_distill.losses.base import check_weight
from keras_distill.teachers.base import Teacher
from keras_distill.teachers.model import Model


class Ensemble(Teacher):
    r"""The weighted mean of several teachers.

    With weights `v_m` that sum to 1 and logits `z_m`, the target at temperature T is

    * `"arithmetic"`: `Σ_m v_m softmax(z_m / T)`, handed on as logits
      `T log Σ_m v_m softmax(z_m / T)`, which are right at that temperature only;
    * `"geometric"`: `softmax(Σ_m v_m z_m / T)`, the logits' mean, right at any.

    Features are read by paths that begin with the teacher's index: `"0/block3"`.

    Args:
        models: Keras models or teachers, with the same outputs.
        combine: `"arithmetic"` or `"geometric"`.
        weights: One weight per model; equal by default.

    Raises:
        ValueError: If there are no models, they differ in outputs or classes, or
            `combine` or `weights` are wrong.

    Example:

    ```python
    teacher = kd.teachers.Ensemble([first, second], weights=[2.0, 1.0])
    distiller = kd.Distiller(student, teacher)
    ```

    References:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015
        (arXiv 1503.02531).
    """

    def __init__(
        self,
        models: Sequence[Any],
        combine: str = "arithmetic",
        weights: Sequence[float] | None = None,
    ) -> None:
        if not models:
            raise ValueError("An ensemble needs at least one model. Received none.")
        if combine not in ("arithmetic", "geometric"):
            raise ValueError(
                f"`combine` must be 'arithmetic' or 'geometric'. Received: {combine!r}"
            )
        weights = [1.0] * len(models) if weights is None else list(weights)
        if len(weights) != len(models):
            raise ValueError(
                f"`weights` must have one weight per model ({len(models)}). "
                f"Received: {weights}"
            )
        for weight in weights:
            check_weight("weights", weight)
        if not sum(weights) > 0:
            raise ValueError(f"`weights` must not all be 0. Received: {weights}")
        self.teachers = [as_teacher(model) for model in models]
        self.combine = combine
        self.one_temperature = combine == "arithmetic" or any(
            teacher.one_temperature for teacher in self.teachers
        )
        self.weights = [weight / sum(weights) for weight in weights]
        self._heads = [teacher.heads() for teacher in self.teachers]
        first = self._heads[0]
        for index, heads in enumerate(self._heads[1:], 1):
            shapes = [(h.classes, h.shape[1:-1]) for h in heads]
            expected = [(h.classes, h.shape[1:-1]) for h in first]
            if shapes != expected:
                raise ValueError(
                    f"The teachers differ in their outputs: teacher 0 has classes "
                    f"{[h.classes for h in first]}, teacher {index} has "
                    f"{[h.classes for h in heads]}."
                )
        self.names = self.teachers[0].names
        for index, teacher in enumerate(self.teachers[1:], 1):
            if teacher.names != self.names and set(teacher.names) == set(self.names):
                raise ValueError(
                    f"The teachers have their outputs in different orders: teacher 0 "
                    f"{self.names}, teacher {index} {teacher.names}."
                )
        self.outputs = keras.tree.pack_sequence_as(
            self.teachers[0].outputs,
            [keras.KerasTensor((*h.shape[:-1], h.classes)) for h in first],
        )

    def __call__(
        self, x: Any, taps: Sequence[str], temperature: Any
    ) -> tuple[Any, dict[str, Any]]:
        features: dict[str, Any] = {}
        members = []
        for index, teacher in enumerate(self.teachers):
            prefix = f"{index}/"
            own = [tap[len(prefix) :] for tap in taps if tap.startswith(prefix)]
            outputs, found = teacher(x, own, temperature)
            features |= {prefix + tap: value for tap, value in found.items()}
            members.append(
                [
                    ops.cast(head.logits(output), "float32")
                    for head, output in zip(
                        self._heads[index], keras.tree.flatten(outputs), strict=True
                    )
                ]
            )
        combined = [
            self._combined(logits, ops.cast(temperature, "float32"))
            for logits in zip(*members, strict=True)
        ]
        return keras.tree.pack_sequence_as(self.outputs, combined), features

    def _combined(self, logits: Sequence[Any], temperature: Any) -> Any:
        pairs = zip(self.weights, logits, strict=True)
        if self.combine == "geometric":
            return sum(weight * z for weight, z in pairs)
        log_p = [
            ops.log_softmax(z / temperature) + math.log(weight)
            for weight, z in pairs
            if weight > 0
        ]
        return temperature * ops.logsumexp(ops.stack(log_p), 0)

    def check_loss(self, loss: Any) -> None:
        super().check_loss(loss)
        for teacher in self.teachers:
            teacher.check_loss(loss)

    def check_temperature(self, temperature: float) -> None:
        for teacher in self.teachers:
            teacher.check_temperature(temperature)

    def fingerprint(self) -> str:
        parts = [teacher.fingerprint() for teacher in self.teachers]
        text = repr((parts, self.combine, self.weights))
        return hashlib.sha256(text.encode()).hexdigest()

    def resolve(self, layer: Any) -> Any:
        if isinstance(layer, (list, tuple)):
            return [self.resolve(item) for item in layer]
        if isinstance(layer, str):
            index, _, path = layer.partition("/")
            if not index.isdigit() or int(index) >= len(self.teachers) or not path:
                raise ValueError(
                    "`teacher_layer`: in an ensemble a path begins with the teacher's "
                    f"index, 0 to {len(self.teachers) - 1}, as in '0/{layer}'. "
                    f"Received: {layer!r}"
                )
            return f"{index}/{self.teachers[int(index)].resolve(path)}"
        for position, teacher in enumerate(self.teachers):
            try:
                return f"{position}/{teacher.resolve(layer)}"
            except ValueError:
                continue
        raise ValueError(
            f"`teacher_layer`: the layer {layer.name!r} is in none of the teachers."
        )

    def tap_specs(self, taps: Sequence[str]) -> dict[str, Any]:
        specs: dict[str, Any] = {}
        for index, teacher in enumerate(self.teachers):
            prefix = f"{index}/"
            own = [tap[len(prefix) :] for tap in taps if tap.startswith(prefix)]
            if own:
                found = teacher.tap_specs(own)
                specs |= {prefix + tap: spec for tap, spec in found.items()}
        return specs

    def heads(self) -> list[Head]:
        exact = all(head.exact for heads in self._heads for head in heads)
        geometric = self.combine == "geometric"
        kind = "logits" if geometric and exact else "log_probabilities"
        return [
            Head(head.name, (*head.shape[:-1], head.classes), kind)
            for head in self._heads[0]
        ]

    @property
    def variables(self) -> list[Any]:
        return [v for teacher in self.teachers for v in teacher.variables]

    def __repr__(self) -> str:
        return f"teachers.Ensemble({len(self.teachers)} models, {self.combine!r})"


def as_teacher(teacher: Any) -> Teacher:
    """Any teacher: a `Teacher`, a Keras model, or a list of either (an ensemble).

    Raises:
        TypeError: If it is none of those.
    """
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, keras.Model):
        return Model(teacher)
    if isinstance(teacher, (list, tuple)):
        return Ensemble(teacher)
    raise TypeError(
        "`teacher` must be a keras.Model, a list of models, or a kd.teachers.Teacher. "
        f"Received: {teacher!r}"
    )
