"""Logs: running means of what is trained and of what is watched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from keras_distill.weighting import note_log


class Logs:
    """Named running means, each weighted by the rows it was taken over.

    Not a Keras layer and not a dict: Keras would save the means with the weights.
    """

    def __init__(self) -> None:
        self._means: dict[str, keras.metrics.Mean] = {}
        self._hidden: set[str] = set()

    def add(self, name: str, shown: bool = True) -> None:
        """Declares a log; one that is not shown only counts."""
        self._means[name] = keras.metrics.Mean(name=name, dtype="float32")
        if not shown:
            self._hidden.add(name)

    def __contains__(self, name: str) -> bool:
        return name in self._means

    @property
    def names(self) -> list[str]:
        """What is shown."""
        return [name for name in self._means if name not in self._hidden]

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        return list(self._means.values())

    def update(self, name: str, values: Any, weight: Any = None) -> None:
        """Adds values to a mean.

        Raises:
            ValueError: If the log was not declared.
        """
        if name not in self._means:
            raise ValueError(f"There is no log {name!r}. Declared: {self.names}")
        note_log(name)
        values = ops.cast(ops.stop_gradient(values), "float32")
        if weight is not None:
            weight = ops.cast(weight, "float32")
        self._means[name].update_state(values, weight)

    def results(self, names: Iterable[str]) -> dict[str, Any]:
        """The means so far."""
        return {name: self._means[name].result() for name in names}

    def count(self, name: str) -> Any:
        """The sum of the weights since the last reset."""
        return self._means[name].count

    def ran(self, name: str) -> bool:
        """Whether anything was added since the last reset (not inside a graph)."""
        return float(ops.convert_to_numpy(self.count(name))) > 0
