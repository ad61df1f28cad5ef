"""The contract of a teacher: whatever knows something."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import keras

from keras_distill.heads import Head


class Teacher(abc.ABC):
    """The contract of a teacher: knowledge for a batch of inputs.

    A teacher is never trained and is not a Keras layer, so that no distiller tracks,
    trains or saves it by accident.

    Attributes:
        outputs: Symbolic outputs, in the teacher's own structure.
        names: Names of the flat outputs.
        one_temperature: Whether outputs are right only at the temperature that they
            were asked for.
    """

    outputs: Any
    names: list[str]
    one_temperature = False

    @abc.abstractmethod
    def __call__(
        self, x: Any, taps: Sequence[str], temperature: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Outputs and features for a batch.

        Args:
            x: Inputs, as the data give them.
            taps: Paths of the features that are wanted.
            temperature: At which the outputs will be compared.

        Returns:
            The outputs in the teacher's own structure, and the features by path.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Changes with the architecture, the weights, and what of `x` is read."""

    @abc.abstractmethod
    def tap_specs(self, taps: Sequence[str]) -> dict[str, Any]:
        """Symbolic features by path."""

    def resolve(self, layer: Any) -> Any:
        """Checked paths for names or layer objects.

        Raises:
            ValueError: If there is no such layer.
        """
        raise ValueError(f"{self!r} has no layers to read. Received: {layer!r}")

    def heads(self) -> list[Head]:
        """What the outputs are; asked only where logits are compared."""
        flat = keras.tree.flatten(self.outputs)
        return [
            Head(name, (None, *tuple(output.shape)[1:]))
            for name, output in zip(self.names, flat, strict=True)
        ]

    def check_loss(self, loss: Any) -> None:
        """Raises ValueError if a soft loss cannot be computed from these outputs."""
        if not self.one_temperature:
            return
        if hasattr(loss, "temperatures"):
            raise ValueError(
                f"{type(loss).__name__} compares at several temperatures; {self!r} has "
                "outputs for one. Use combine='geometric' in an ensemble."
            )
        if getattr(loss, "standardize", False):
            raise ValueError(
                f"`standardize=True` changes the scale of logits; those of {self!r} "
                "are right at one scale only. Use combine='geometric' in an ensemble."
            )

    def check_temperature(self, temperature: float) -> None:  # noqa: B027
        """Raises ValueError at a temperature for which there are no outputs."""

    @property
    def variables(self) -> list[Any]:
        """All variables, none of which may be the student's."""
        return []


class Absent(Teacher):
    """What is left of a teacher in a distiller that was loaded without it."""

    def __init__(self, memory: dict[str, Any]) -> None:
        self.memory = memory
        self.names = memory["names"]
        self.outputs = [keras.KerasTensor(_shape(s)) for s in memory["shapes"]]

    def __call__(self, x: Any, taps: Sequence[str], temperature: Any) -> Any:
        raise ValueError(
            "The distiller was loaded without its teacher. Before `fit`, give it back: "
            "distiller.teacher = model"
        )

    def fingerprint(self) -> str:
        return self.memory["fingerprint"]

    def resolve(self, layer: Any) -> Any:
        return layer

    def tap_specs(self, taps: Sequence[str]) -> dict[str, Any]:
        return {
            tap: keras.KerasTensor(_shape(self.memory["taps"][tap])) for tap in taps
        }

    def heads(self) -> list[Head]:
        return [
            Head(name, _shape(shape), kind)
            for name, shape, kind in zip(
                self.names, self.memory["shapes"], self.memory["kinds"], strict=True
            )
        ]

    def __repr__(self) -> str:
        return "teachers.Absent()"


def _shape(sizes: Sequence[int | None]) -> tuple[int | None, ...]:
    return tuple(sizes)
