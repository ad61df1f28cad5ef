"""A generalist and specialists for classes that it confuses, as one teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distill.heads import Head, with_mask_of
from keras_distill.teachers.base import Teacher
from keras_distill.teachers.ensemble import as_teacher

# Stands for log 0: finite, so that differences of two of them are no NaN.
LOG_ZERO = -1e30


class Specialists(Teacher):
    r"""A generalist, helped by specialists where it is likely to be confused.

    The generalist gives `p_g` over all classes. Specialist m tells the classes `S_m`
    apart: its probabilities `p_m` are over these and a last one, the dustbin, that
    stands for all others. With A(x) the specialists whose classes include one of the
    generalist's `top` most likely ones, the whole says the `q` that minimises

    $$\mathrm{KL}(p_g \| q) + \sum_{m \in A(x)} \mathrm{KL}(p_m \| q)$$

    where in the second term `q` is summed over the classes in m's dustbin. Where no
    specialist is active, `q` is `p_g`. It is found at temperature 1; the outputs are
    `log q`, so that a soft loss softens it afterwards.

    The paper descends the gradient for each row. Here `q` is the fixed point of

    $$q_c \leftarrow \frac{1}{1 + |A|} \Big(p_g(c) + \sum_{m: c \in S_m} p_m(c)
      + \sum_{m: c \notin S_m} p_m(\text{dustbin}) \frac{q_c}{\sum_{k \notin S_m} q_k}
      \Big)$$

    (expectation maximisation: each dustbin is shared out in proportion to `q`), which
    has no step size, never raises the sum above and needs one step where one
    specialist is active. With several the error falls by a constant factor in each
    step, slowly where they contradict each other: more `steps` make it smaller. Classes
    of the same specialists move together, so that a step costs as much as specialists
    times such groups, whatever the number of classes.

    Every model runs on every row: for training, keep the outputs in a
    `kd.teachers.Cache`. Features are the generalist's.

    Args:
        generalist: A model or teacher with one output over C classes.
        specialists: Models or teachers with one output over `len(classes[m]) + 1`.
        classes: For each specialist the ids of its classes, in the order of its
            outputs. They may overlap; no specialist has them all.
        top: How many of the generalist's most likely classes call specialists.
        steps: Number of steps to `q`.

    Raises:
        TypeError: If class ids are no integers.
        ValueError: If there are no specialists, a model has another number of outputs
            or classes, class ids are out of range or repeated, or `top` or `steps` is
            out of range.

    Example:

    ```python
    teacher = kd.teachers.Specialists(
        generalist, [cats_and_dogs, vehicles], [[3, 5], [0, 1, 8, 9]]
    )
    distiller = kd.Distiller(student, teacher)
    ```

    References:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015,
        section 5 (arXiv 1503.02531).
    """

    def __init__(
        self,
        generalist: Any,
        specialists: Sequence[Any],
        classes: Sequence[Sequence[int]],
        *,
        top: int = 1,
        steps: int = 100,
    ) -> None:
        if not specialists:
            raise ValueError("`specialists` must hold at least one model.")
        if len(classes) != len(specialists):
            raise ValueError(
                f"`classes` must have one list per specialist ({len(specialists)}). "
                f"Received: {len(classes)} lists"
            )
        self.generalist = as_teacher(generalist)
        self.specialists = [as_teacher(specialist) for specialist in specialists]
        self._head = _only_head("generalist", self.generalist)
        count = self._head.classes
        self.classes = tuple(
            _checked_ids(f"classes[{m}]", ids, count) for m, ids in enumerate(classes)
        )
        self._heads = []
        for m, (teacher, ids) in enumerate(
            zip(self.specialists, self.classes, strict=True)
        ):
            head = _only_head(f"specialists[{m}]", teacher)
            if (head.classes, head.shape[1:-1]) != (
                len(ids) + 1,
                self._head.shape[1:-1],
            ):
                raise ValueError(
                    f"specialists[{m}] must have {len(ids) + 1} outputs, one for each "
                    "of its classes and a dustbin, in the positions of the "
                    f"generalist. Received: {head.shape}; the generalist has "
                    f"{self._head.shape}"
                )
            self._heads.append(head)
        for argument, value, most in (("top", top, count), ("steps", steps, None)):
            if not isinstance(value, int) or not 1 <= value <= (most or value):
                limit = f", at most {most}" if most else ""
                raise ValueError(
                    f"`{argument}` must be an integer of at least 1{limit}. "
                    f"Received: {value!r}"
                )
        self.top = top
        self.steps = steps
        self.names = self.generalist.names
        self.outputs = keras.tree.pack_sequence_as(
            self.generalist.outputs,
            [keras.KerasTensor((*self._head.shape[:-1], count))],
        )

        member = np.zeros((len(self.classes), count), bool)
        for row, ids in zip(member, self.classes, strict=True):
            row[list(ids)] = True
        self._member = member
        # Classes that belong to the same specialists form a group.
        patterns, group = np.unique(member, axis=1, return_inverse=True)
        self._group = group.reshape(-1)
        self._log_outside = np.where(patterns, LOG_ZERO, 0).astype("float32")

    def __call__(
        self, x: Any, taps: Sequence[str], temperature: Any
    ) -> tuple[Any, dict[str, Any]]:
        outputs, features = self.generalist(x, taps, 1.0)
        (output,) = keras.tree.flatten(outputs)
        general = _log_probabilities(self._head, output)
        special = [
            _log_probabilities(head, keras.tree.flatten(teacher(x, (), 1.0)[0])[0])
            for head, teacher in zip(self._heads, self.specialists, strict=True)
        ]
        log_q = with_mask_of(output, self.combine(general, special))
        return keras.tree.pack_sequence_as(self.outputs, [log_q]), features

    def combine(self, general: Any, special: Sequence[Any]) -> Any:
        """What all say together.

        Args:
            general: The generalist's log-probabilities, float32 `(..., C)`.
            special: Each specialist's log-probabilities, float32
                `(..., len(classes[m]) + 1)`, the dustbin last.

        Returns:
            `log q`, float32 `(..., C)`.
        """
        active = self._active(general)  # (..., M), 1 or 0
        log_count = ops.log(1 + ops.sum(active, -1, keepdims=True))
        off = LOG_ZERO * (1 - active)
        dustbins = ops.stack([log_p[..., -1] for log_p in special], -1) + off
        known = general
        for m, (log_p, ids) in enumerate(zip(special, self.classes, strict=True)):
            place = np.zeros(len(self._group), "int32")
            place[list(ids)] = np.arange(len(ids))
            spread = ops.take(log_p, place, -1) + off[..., m : m + 1]
            outside = ops.convert_to_tensor(~self._member[m])
            known = ops.logaddexp(known, ops.where(outside, LOG_ZERO, spread))
        groups = range(self._log_outside.shape[1])
        columns = [np.flatnonzero(self._group == k).astype("int32") for k in groups]
        mass = ops.stack(
            [ops.logsumexp(ops.take(known, ids, -1), -1) for ids in columns], -1
        )
        log_q = self._solved(mass, dustbins, log_count)
        return known + ops.take(log_q - mass, self._group.astype("int32"), -1)

    def _active(self, general: Any) -> Any:
        _, chosen = ops.top_k(general, self.top, sorted=False)
        calls = ops.convert_to_tensor(self._member.T.astype("float32"))
        return ops.max(ops.take(calls, chosen, 0), -2)

    def _solved(self, mass: Any, dustbins: Any, log_count: Any) -> Any:
        """Log q of the groups `(..., K)`, from what is known of each and dustbins."""
        outside = ops.convert_to_tensor(self._log_outside)  # (M, K)

        def step(_: Any, log_q: Any) -> Any:
            rest = ops.logsumexp(log_q[..., None, :] + outside, -1)
            factor = (dustbins - rest)[..., :, None] + outside
            factor = ops.logsumexp(factor, -2)
            return ops.logaddexp(mass, log_q + factor) - log_count

        start = mass - ops.logsumexp(mass, -1, keepdims=True)
        return ops.fori_loop(0, self.steps, step, start)

    def fingerprint(self) -> str:
        parts = [t.fingerprint() for t in (self.generalist, *self.specialists)]
        text = repr((parts, self.classes, self.top, self.steps))
        return hashlib.sha256(text.encode()).hexdigest()

    def resolve(self, layer: Any) -> Any:
        return self.generalist.resolve(layer)

    def tap_specs(self, taps: Sequence[str]) -> dict[str, Any]:
        return self.generalist.tap_specs(taps)

    def heads(self) -> list[Head]:
        shape = (*self._head.shape[:-1], self._head.classes)
        return [Head(self._head.name, shape, "log_probabilities")]

    @property
    def variables(self) -> list[Any]:
        parts = (self.generalist, *self.specialists)
        return [v for teacher in parts for v in teacher.variables]

    def __repr__(self) -> str:
        return f"teachers.Specialists({len(self.specialists)} specialists)"


def _only_head(argument: str, teacher: Teacher) -> Head:
    if teacher.one_temperature:
        raise ValueError(
            f"`{argument}`: {teacher!r} has outputs for one temperature, which the "
            "specialists' probabilities cannot be read from. Use combine='geometric'."
        )
    heads = teacher.heads()
    if len(heads) != 1:
        raise ValueError(
            f"`{argument}` must have one output. Received: {teacher!r} with "
            f"{[head.name for head in heads]}"
        )
    return heads[0]


def _checked_ids(argument: str, ids: Sequence[int], count: int) -> tuple[int, ...]:
    found = np.asarray(list(ids))
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise TypeError(f"`{argument}` must be a list of integers. Received: {ids!r}")
    wrong = found.size and (found.min() < 0 or found.max() >= count)
    if wrong or not 0 < len(set(found.tolist())) == found.size < count:
        raise ValueError(
            f"`{argument}` must hold 1 to {count - 1} different classes, from 0 to "
            f"{count - 1}, so that some are left for the dustbin. Received: {ids!r}"
        )
    return tuple(found.tolist())


def _log_probabilities(head: Head, output: Any) -> Any:
    return ops.log_softmax(ops.cast(head.logits(output), "float32"))
