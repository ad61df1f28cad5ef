"""What a search may choose from: a range, a choice, or one fixed value."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any


class Choice:
    """One of several values.

    Losses appear in the results under the names of their classes, numbered if there are
    several of one class.

    Args:
        values: At least one number, or at least one string or loss.

    Raises:
        ValueError: If there are no values, or two equal ones.

    Example:

    >>> from keras_distill.tuning import Choice
    >>> Choice([1, 4, 16])
    Choice([1, 4, 16])
    """

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(values)
        if not self.values:
            raise ValueError("A Choice needs at least one value. Received: []")
        plain = [value for value in self.values if _plain(value)]
        if len(set(plain)) < len(plain):
            raise ValueError(
                f"The values of a Choice must differ. Received: {self.values}"
            )
        self.labels: list[Any] = []
        for value in self.values:
            if value is None:  # keras-tuner wants labels of one kind
                self.labels.append("None")
            else:
                self.labels.append(value if _plain(value) else self._new_label(value))

    def _new_label(self, value: Any) -> str:
        """How keras-tuner writes an object down: the same in every process."""
        name = getattr(value, "__name__", type(value).__name__)
        taken = sum(
            re.fullmatch(rf"{name}( \d+)?", str(t)) is not None for t in self.labels
        )
        return f"{name} {taken + 1}" if taken else name

    def __repr__(self) -> str:
        return f"Choice({self.values!r})"


class Numbers:
    """The values that a search may give a number: a range, a Choice, or one.

    Args:
        name: The argument's name, also of the hyperparameter.
        given: `(low, high)`, a `Choice` of numbers, or a number.
        usual: The value without a search: the default is near it.
        positive: Whether 0 is too small. The range is then searched on a log scale.

    Raises:
        TypeError: If it is none of those.
        ValueError: If the range is empty, reversed or too low, or a value too low.
    """

    def __init__(self, name: str, given: Any, usual: float, positive: bool) -> None:
        self.name = name
        self.usual = usual
        self.positive = positive
        self.given = given
        if isinstance(given, Choice):
            self.values = [self._checked(value) for value in given.values]
        elif isinstance(given, tuple):
            if len(given) != 2:
                raise ValueError(
                    f"`{name}` must be a range (low, high), a Choice or a number. "
                    f"Received: {given!r}"
                )
            self.values = [self._checked(value) for value in given]
            if not self.values[0] < self.values[1]:
                raise ValueError(
                    f"`{name}` must be a range (low, high) with low < high; one number "
                    f"is fixed. Received: {given!r}"
                )
        else:
            self.values = [self._checked(given)]

    def _checked(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(
                f"`{self.name}` must be a range (low, high), a Choice of numbers or a "
                f"number. Received: {self.given!r}"
            )
        lowest = "above 0" if self.positive else "at least 0"
        if not math.isfinite(value) or value < 0 or (self.positive and value == 0):
            raise ValueError(
                f"`{self.name}` must be finite and {lowest}. Received: {self.given!r}"
            )
        return float(value)

    @property
    def always_zero(self) -> bool:
        return not any(self.values)

    def choose(self, hp: Any) -> float:
        """The value of a trial."""
        if isinstance(self.given, Choice):
            # 0 last: the first model that keras-tuner builds has the default values.
            near = min(self.values, key=lambda v: (v == 0, abs(v - self.usual)))
            return hp.Choice(self.name, self.values, default=near)
        if isinstance(self.given, tuple):
            low, high = self.values
            return hp.Float(
                self.name,
                low,
                high,
                sampling="log" if self.positive else "linear",
                default=min(max(self.usual, low), high),
            )
        return self.values[0]


def _plain(value: Any) -> bool:
    """Whether keras-tuner can write a value down."""
    return value is None or isinstance(value, (bool, int, float, str))
