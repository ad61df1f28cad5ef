"""Terms: weights that live in variables, and what a term counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

from keras_distill.losses.base import check_weight, number


class Counted(NamedTuple):
    """A term that counts other than by the batch's rows: by those with a label.

    Attributes:
        value: The unweighted scalar.
        rows: By how many rows the epoch's mean weights it.
    """

    value: Any
    rows: Any


class TermWeights(MutableMapping):
    """The weights of the terms by name; assigning a number takes effect at once.

    Reading gives the variable (`.numpy()` its value). Weights stay in the graph as
    variables, so no step is traced anew.
    """

    def __init__(self, create: Callable[[str, float], Any]) -> None:
        self._create = create
        self._variables: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._variables:
            raise KeyError(f"There is no term {name!r}. Terms: {list(self._variables)}")
        return self._variables[name]

    def __setitem__(self, name: str, value: Any) -> None:
        variable = self[name]
        check_weight(name, value)
        variable.assign(number(value))

    def __delitem__(self, name: str) -> None:
        raise TypeError("A term cannot be removed. Set its weight to 0.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)

    def __repr__(self) -> str:
        values = {name: round(number(v), 6) for name, v in self._variables.items()}
        return f"TermWeights({values})"

    def add(self, name: str, value: float) -> None:
        """Creates the variable of a new term."""
        check_weight(name, value)
        if name in self._variables:
            raise ValueError(f"There is a term {name!r} already. Give `name=`.")
        self._variables[name] = self._create(name, number(value))
