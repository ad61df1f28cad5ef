"""Schedules: temperature and weights that change while a distiller trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops


class Schedule(keras.callbacks.Callback):
    """Sets a temperature or the weight of a term, every epoch or every step.

    Values are numbers that are assigned to variables, so nothing is traced anew. The
    value is a function of the epoch (of the optimizer's iterations) alone: a run that
    continues after `kd.callbacks.Backup` has the same values.

    Args:
        name: `"temperature"`, `"alpha"`, `"beta"` or the name of a term.
        values: Function of the epoch (step), counted from 0, or a Keras
            `LearningRateSchedule`.
        every: `"epoch"` or `"step"`.

    Raises:
        TypeError: If `values` cannot be called.
        ValueError: If `every` is neither; when training begins, if the distiller has
            nothing of that name; when a value is not finite or out of range.

    Example:

    ```python
    ramp = kd.schedules.Schedule("beta", kd.schedules.linear(0.0, 0.9, over=10))
    distiller.fit(x, y, epochs=2, callbacks=[ramp])
    ```
    """

    def __init__(self, name: str, values: Any, *, every: str = "epoch") -> None:
        super().__init__()
        if not callable(values):
            raise TypeError(
                "`values` must be a function of the epoch or a Keras "
                f"LearningRateSchedule. Received: {values!r}"
            )
        if every not in ("epoch", "step"):
            raise ValueError(f"`every` must be 'epoch' or 'step'. Received: {every!r}")
        self.name = name
        self.values = values
        self.every = every

    def on_train_begin(self, logs: Any = None) -> None:
        if self.name in ("temperature", "alpha", "beta"):
            if getattr(self.model, self.name, None) is None:
                raise ValueError(f"This distiller has no {self.name!r} to schedule.")
        elif self.name not in self.model.term_weights:
            raise ValueError(
                f"There is no term {self.name!r} to schedule. Terms: "
                f"{list(self.model.term_weights)}"
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self.every == "epoch":
            self._assign(epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.every == "step":
            iterations = self.model.optimizer.iterations
            self._assign(int(ops.convert_to_numpy(iterations)))

    def _assign(self, position: int) -> None:
        value = float(ops.convert_to_numpy(self.values(position)))
        if self.name in ("temperature", "alpha", "beta"):
            setattr(self.model, self.name, value)
        else:
            self.model.term_weights[self.name] = value

    def __repr__(self) -> str:
        return f"Schedule({self.name!r}, every={self.every!r})"


class StopTeacher(keras.callbacks.Callback):
    """Early-stopped distillation: from some epoch on the student learns alone.

    All weights of terms that need the teacher become 0, so the teacher is not run any
    more, and a step costs what a plain one costs.

    Args:
        epoch: First epoch without a teacher, counted from 0.

    Raises:
        ValueError: If `epoch` is negative.

    Example:

    ```python
    stop = kd.schedules.StopTeacher(1)
    distiller.fit(x, y, epochs=2, callbacks=[stop])
    ```

    References:
        Cho, Hariharan, On the Efficacy of Knowledge Distillation, ICCV 2019
        (arXiv 1910.01348).
    """

    def __init__(self, epoch: int) -> None:
        super().__init__()
        if epoch < 0:
            raise ValueError(f"`epoch` must be at least 0. Received: {epoch}")
        self.epoch = epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        terms = getattr(self.model, "teacher_terms", None)
        if terms is None:
            raise ValueError(
                "StopTeacher needs a distiller with a teacher. "
                f"Received: {self.model!r}"
            )
        if epoch >= self.epoch:
            for term in terms:
                self.model.term_weights[term] = 0.0


def linear(start: float, end: float, *, over: int) -> Callable[[int], float]:
    """From `start` to `end` in a straight line over some epochs, then constant.

    Example:

    >>> [linear(0.0, 1.0, over=4)(epoch) for epoch in (0, 2, 4, 9)]
    [0.0, 0.5, 1.0, 1.0]
    """
    _check_length(over)
    return lambda position: start + (end - start) * min(position / over, 1.0)


def cosine(start: float, end: float, *, over: int) -> Callable[[int], float]:
    """From `start` to `end` along half a cosine over some epochs, then constant.

    Example:

    >>> round(cosine(4.0, 1.0, over=2)(1), 6)
    2.5
    """
    _check_length(over)

    def value(position: int) -> float:
        part = (1 + math.cos(math.pi * min(position / over, 1.0))) / 2
        return end + (start - end) * part

    return value


def sigmoid_ramp_up(*, over: int, scale: float = 1.0) -> Callable[[int], float]:
    r"""ONE's ramp: `scale * exp(-5 (1 - e / R)²)` for R epochs, then `scale`.

    Example:

    >>> round(sigmoid_ramp_up(over=80)(0), 6)
    0.006738

    References:
        Lan, Zhu, Gong, Knowledge Distillation by On-the-Fly Native Ensemble,
        NeurIPS 2018 (arXiv 1806.04606).
    """
    _check_length(over)
    return lambda position: scale * math.exp(-5 * (1 - min(position / over, 1.0)) ** 2)


def _check_length(over: int) -> None:
    if over < 1:
        raise ValueError(f"`over` must be at least 1 epoch or step. Received: {over}")
