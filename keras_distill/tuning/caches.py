"""What a teacher says of the training rows, stored once for all trials of a search."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_distill.inputs import rows_of
from keras_distill.losses.base import number
from keras_distill.teachers.base import Teacher
from keras_distill.teachers.cache import Cache

_Asked = tuple[tuple[str, ...], tuple[float, ...]]  # taps, temperatures


class Caches:
    """The caches of a search: one for each thing that trials ask of their teacher.

    Args:
        teacher: The teacher.
        path: Folder of the cache; of all caches where there may be several.
        several: Whether trials may read different layers.
    """

    def __init__(
        self, teacher: Teacher, path: str | os.PathLike[str], several: bool
    ) -> None:
        self._teacher, self._path, self._several = teacher, path, several
        self._opened: dict[_Asked, Cache] = {}
        # Arrays, and what each cache says of them.
        self._known: tuple[Any, dict[_Asked, Any]] = (None, {})

    def carried(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The same call of `fit` on data that carry the teacher's knowledge.

        Args:
            model: The distiller of a trial; it gets the cache as its teacher.
            given: Arguments of its `fit`.

        Raises:
            ValueError: If the cache cannot be made of these data.
        """
        given = dict(given)
        if given.pop("validation_split", 0):
            raise ValueError("`validation_split` cannot be used: give validation_data.")
        batch_size = given.pop("batch_size", None) or 32
        given.setdefault("validation_batch_size", batch_size)
        x = given["x"]
        streamed = isinstance(x, tf.data.Dataset)
        rows = x if streamed else rows_of((x,))
        asked = self._asked(model)
        if asked not in self._opened:
            self._opened[asked] = self._built(rows, asked)
        cache = model.teacher = self._opened[asked]
        if streamed:
            attached = cache.attach(rows).batch(batch_size)
            return given | {"x": attached.prefetch(tf.data.AUTOTUNE)}
        if self._known[0] is not x:
            self._known = x, {}
        known = self._known[1]
        if asked not in known:
            known[asked] = _knowledge(cache.attach(rows))
        carried = {"inputs": x, "kd_teacher": known[asked]}
        return given | {"x": carried, "batch_size": batch_size}

    def _asked(self, model: Any) -> _Asked:
        """What a trial asks its teacher for: taps, and a temperature if it matters."""
        matters = self._teacher.one_temperature
        at = (number(model._teacher_temperature),) if matters else ()
        return tuple(sorted(model._teacher_taps)), at

    def _built(self, rows: Any, asked: _Asked) -> Cache:
        """The cache of what is asked; trials that ask for other things get others."""
        (taps, temperatures), path = asked, self._path
        if self._several or temperatures:
            name = hashlib.sha256(repr(asked).encode()).hexdigest()[:8]
            path = os.path.join(path, name)
        return Cache.build(
            self._teacher, rows, path, taps=taps, temperatures=temperatures
        )


def _knowledge(attached: tf.data.Dataset) -> Any:
    """What a teacher says of all rows, as arrays."""
    chunks = [x["kd_teacher"] for (x,) in attached.batch(1024).as_numpy_iterator()]
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts), *chunks)
