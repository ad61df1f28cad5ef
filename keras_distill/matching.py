"""Matching: which outputs two networks share, and whether they can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras_distill.heads import Head
from keras_distill.links import same_shape
from keras_distill.losses.base import check_weight, number


@dataclass(frozen=True)
class Match:
    """An output that both networks have."""

    name: str
    student: Head
    teacher: Head
    student_index: int
    teacher_index: int
    weight: float


def match_heads(
    students: Sequence[Head], teachers: Sequence[Head], weights: dict[str, float]
) -> list[Match]:
    """Pairs outputs by name; by place where both have the same names in one order.

    One output each always match. A head that is called twice gives two outputs of one
    name.

    Args:
        students: The student's heads.
        teachers: The teacher's.
        weights: Weights of the outputs by name, 1 where absent.

    Raises:
        ValueError: If there is no output in common.
    """
    names = [head.name for head in teachers]
    by_place = [head.name for head in students] == names
    if len(students) == len(teachers) == 1:
        by_place = True
    matches = []
    for index, head in enumerate(students):
        if by_place or head.name in names:
            other = index if by_place else names.index(head.name)
            weight = weights.get(head.name, 1.0)
            matches.append(
                Match(head.name, head, teachers[other], index, other, weight)
            )
    if not matches:
        raise ValueError(
            "Student and teacher have no output in common. Student: "
            f"{[head.name for head in students]}, teacher: "
            f"{[head.name for head in teachers]}."
        )
    return matches


def check_match(match: Match, loss: Any, logits: bool) -> None:
    """Raises ValueError unless a loss can compare two outputs.

    Args:
        match: The outputs.
        loss: The soft loss.
        logits: Whether it compares logits (else the outputs as they are).
    """
    student, teacher = match.student, match.teacher
    if logits and student.classes != teacher.classes:
        raise ValueError(
            f"The output {match.name!r} has {student.classes} classes in the "
            f"student and {teacher.classes} in the teacher. Soft targets need the "
            "same classes; with `soft_loss=None` and links they may differ."
        )
    if not same_shape(student.shape[1:-1], teacher.shape[1:-1]) or (
        not logits and not same_shape(student.shape, teacher.shape)
    ):
        raise ValueError(
            f"The output {match.name!r} has shape {student.shape} in the student "
            f"and {teacher.shape} in the teacher."
        )
    exact = student.exact and teacher.exact
    if logits and not loss.shift_invariant and not exact:
        raise ValueError(
            f"{type(loss).__name__} needs real logits; the logarithm of "
            "probabilities is shifted by an unknown constant in every row. "
            "Use SoftTarget, or models that return logits."
        )


def weights_by_output(weights: Any, names: list[str]) -> dict[str, float]:
    """The argument `output_weights`, a dict or a list, as a dict by name.

    Raises:
        ValueError: If an output is unknown, or a weight is missing or negative.
    """
    if weights is None:
        return {}
    if not isinstance(weights, dict):
        if len(weights) != len(names):
            raise ValueError(
                f"`output_weights` must have one weight per output {names}. "
                f"Received: {weights}"
            )
        weights = dict(zip(names, weights, strict=True))
    unknown = set(weights) - set(names)
    if unknown:
        raise ValueError(
            f"`output_weights` names {sorted(unknown)}; the outputs are {names}."
        )
    for name, weight in weights.items():
        check_weight(f"output_weights[{name!r}]", weight)
    return {name: number(weight) for name, weight in weights.items()}
