"""How long a step of training takes, and how long the teacher does in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_distill.losses.base import number

_REPEATS = 3


class StepClock:
    """Steps and seconds of an epoch.

    The first step is left out where there are others: the graph is made in it.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """An epoch begins."""
        self._marks = [(-1, time.perf_counter())]

    def tick(self, batch: int) -> None:
        """A batch (the last of several in one execution) has ended."""
        self._marks[2:] = [(batch, time.perf_counter())]

    @property
    def steps(self) -> int:
        """How many have ended."""
        return self._marks[-1][0] + 1

    @property
    def seconds(self) -> float:
        """Mean time of a step; there must be one."""
        (before, start), (last, end) = self._marks[-2:]
        return max(end - start, 1e-9) / (last - before)


class TeacherClock:
    """Seconds that the teacher takes for the rows of one step.

    Inside a step they cannot be taken: on several cores the teacher's pass and the
    student's are under way at the same time. So the teacher runs alone.

    Args:
        run: The teacher's pass, a function of `x`.
        x: Some inputs, batched. They are repeated to as many rows as are wanted.
    """

    def __init__(self, run: Callable[[Any], Any], x: Any) -> None:
        self._run = run
        self._x = x
        self._known: dict[int, float] = {}

    def seconds(self, rows: int) -> float:
        """The shortest of a few runs on that many rows; later it is remembered."""
        if rows not in self._known:
            found = len(keras.tree.flatten(self._x)[0])
            index = np.arange(rows) % found
            x = keras.tree.map_structure(lambda leaf: tf.gather(leaf, index), self._x)
            self._timed(x)  # the graph is made
            self._known[rows] = min(self._timed(x) for _ in range(_REPEATS))
        return self._known[rows]

    def _timed(self, x: Any) -> float:
        began = time.perf_counter()
        for output in keras.tree.flatten(self._run(x)):
            np.asarray(output)  # waits for the device
        return time.perf_counter() - began


class TeacherShare:
    """The teacher's part of the time of a training step.

    Args:
        model: The distiller.
        clock: The teacher's.
    """

    def __init__(self, model: Any, clock: TeacherClock) -> None:
        self._model, self._clock = model, clock
        self.begin()

    def begin(self) -> None:
        """An epoch begins."""
        self._rows: float | None = None

    def note_rows(self) -> None:
        """Training of this epoch has ended: what follows counts other rows."""
        if self._rows is None:
            self._rows = number(self._model._loss_tracker.count)

    def of(self, steps: StepClock) -> float:
        """The part, between 0 and 1."""
        model = self._model
        terms = model.teacher_terms
        if not terms or not bool(model.term_active(terms[0])):
            return 0.0
        replicas = model.distribute_strategy.num_replicas_in_sync
        rows = round((self._rows or 0) / steps.steps / replicas)
        return min(self._clock.seconds(max(rows, 1)) / steps.seconds, 1.0)
