"""The soft term: a loss, its temperature, and the outputs that it compares."""

from __future__ import annotations

import copy
from typing import Any

import keras

from keras_distill.heads import Head, example_rows, find_heads
from keras_distill.links import as_loss
from keras_distill.losses.base import DistillationLoss, check_weight, number
from keras_distill.losses.response import SoftTarget
from keras_distill.losses.tempered import LearnedTemperature
from keras_distill.matching import Match, check_match, match_heads
from keras_distill.taps import call_model
from keras_distill.teachers.base import Teacher


class SoftTerm:
    """Mixed into `Distiller`: what it does with the teacher's outputs."""

    def _add_soft_term(self: Any, soft_loss: Any, temperature: Any, beta: Any) -> None:
        self._matches: list[Match] = []
        self._soft_loss = checked_soft_loss(soft_loss, temperature, beta)
        loss = self._soft_loss
        compares_logits = isinstance(loss, DistillationLoss)
        if self.student_from_logits is not None and not compares_logits:
            raise ValueError(
                "`student_from_logits` has no effect with a soft loss that is not one "
                f"of kd.losses. Received: {self.student_from_logits}"
            )
        if loss is None:
            if self.output_weights:
                raise ValueError("`output_weights` has no effect without a soft loss.")
            return
        if hasattr(loss, "temperature"):
            self._temperature = self._own_temperature(loss.temperature)
            loss.temperature = self._temperature
        beta = 0.9 if beta is None else beta
        check_weight("beta", beta)
        self.add_term("soft", beta)
        self._matches = self._match_outputs(self.teacher)
        self._check_teacher(self.teacher)
        if compares_logits:
            for match in self._matches:
                self.add_log(self._agreement_log(match))

    def _own_temperature(self: Any, temperature: Any) -> Any:
        """A variable of this distiller, or the layer that learns one."""
        if not isinstance(temperature, LearnedTemperature):
            return self._scalar("temperature", number(temperature))
        if not temperature.built:
            temperature.build()
        self.add_log("temperature")
        return temperature

    @property
    def _learns_temperature(self: Any) -> bool:
        return isinstance(self._temperature, LearnedTemperature)

    def _check_teacher(self: Any, teacher: Teacher) -> None:
        """Raises ValueError if the soft loss asks for what a teacher does not have."""
        teacher.check_loss(self._soft_loss)
        if self._temperature is None:
            teacher.check_temperature(1.0)
        elif self._learns_temperature:
            if teacher.one_temperature:
                raise ValueError(
                    "A learned temperature needs the gradient of the teacher's side "
                    f"too; {teacher!r} makes its outputs for one temperature at a "
                    "time. Use combine='geometric' in an ensemble."
                )
            for value in self._temperature.reach:
                teacher.check_temperature(value)
        else:
            teacher.check_temperature(number(self._temperature))

    def _match_outputs(self: Any, teacher: Teacher) -> list[Match]:
        logits = isinstance(self._soft_loss, DistillationLoss)
        flat = keras.tree.flatten(self._symbolic_outputs)
        if logits:
            students = find_heads(
                self.student,
                self._symbolic_outputs,
                self.student_from_logits,
                "student_from_logits",
                lambda: call_model(
                    self.student, example_rows(self._student_spec), False
                ),
            )
            teachers = teacher.heads()
        else:
            students = [
                Head(name, (None, *tuple(output.shape)[1:]))
                for name, output in zip(self._names, flat, strict=True)
            ]
            teachers = Teacher.heads(teacher)
        matches = match_heads(students, teachers, self.output_weights)
        for match in matches:
            check_match(match, self._soft_loss, logits)
        return matches

    def _agreement_log(self: Any, match: Match) -> str:
        return "agreement" if len(self._names) == 1 else f"{match.name}_agreement"

    @property
    def _teacher_temperature(self: Any) -> Any:
        if self._temperature is None:
            return 1.0
        return self._temperature.value

    def _check_temperature(self: Any, value: float) -> None:
        self.teacher.check_temperature(value)

    @property
    def beta(self: Any) -> Any:
        """Weight of the soft loss, a variable."""
        if "soft" not in self._terms:
            raise AttributeError("This distiller has no soft loss.")
        return self._terms["soft"]

    @beta.setter
    def beta(self: Any, value: Any) -> None:
        check_weight("beta", value)
        self._terms["soft"] = value

    @property
    def soft_loss(self: Any) -> Any:
        """The loss of the soft term, or None."""
        return self._soft_loss


def checked_soft_loss(loss: Any, temperature: Any, beta: Any) -> Any:
    """A copy of the soft loss, checked against the arguments that go with it."""
    if loss is None:
        for argument, value in (("temperature", temperature), ("beta", beta)):
            if value is not None:
                raise ValueError(
                    f"`{argument}` has no effect with `soft_loss=None`. "
                    f"Received: {value}"
                )
        return None
    if isinstance(loss, str) and loss == "auto":
        return SoftTarget(4.0 if temperature is None else temperature)
    if temperature is not None:
        raise ValueError(
            "`temperature` belongs to `soft_loss='auto'`; another soft loss has its "
            f"own, or none. Received: temperature={temperature}"
        )
    loss = copy.copy(as_loss(loss))
    if not getattr(loss, "needs_teacher", True):
        raise ValueError(
            f"{type(loss).__name__} needs no teacher: use it with kd.TeacherFree, "
            "or as the compiled loss."
        )
    return loss
