"""The search space of a distillation, for keras-tuner."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import keras_tuner
import tensorflow as tf
from keras_tuner.errors import FailedTrialError, FatalValueError

from keras_distill.distiller import Distiller
from keras_distill.inputs import rows_of
from keras_distill.losses.base import number
from keras_distill.teachers.cache import Cache
from keras_distill.teachers.ensemble import as_teacher
from keras_distill.tuning.caches import Caches
from keras_distill.tuning.folder import check_folder
from keras_distill.tuning.objectives import check_objective
from keras_distill.tuning.spaces import Choice, Numbers

_TEMPERATURE, _BETA = (1, 20), (0, 1)
_FIT = tuple(inspect.signature(keras.Model.fit).parameters)[1:]  # names, in order


class DistillationHyperModel(keras_tuner.HyperModel):
    """What a search may change in a distillation; for every tuner of keras-tuner.

    One teacher serves all trials. The hyperparameters are called `soft_loss`,
    `temperature`, `alpha` and `beta`, where they are searched, beside those that
    `build_student` and `links` ask for. A trial with alpha = beta = 0 and no link would
    learn nothing: it is marked as failed and not run.

    Args:
        build_student: `build_student(hp)` or `build_student()`: a new, built Keras
            model each time.
        teacher: A model, a list of models or a `kd.teachers.Teacher`.
        temperature: T of the soft loss, on a log scale: a range `(low, high)`, a
            `Choice`, or a number.
        alpha: Weight of the compiled loss, in the same way.
        beta: Weight of the soft loss, in the same way.
        links: `kd.Link` objects without adapter instances, or a function of `hp` that
            makes new ones.
        soft_loss: `"auto"`, a loss (its temperature, if it has one, is searched), None,
            or a `Choice` of those.
        cache: A directory for `kd.teachers.Cache`: the teacher then runs once over the
            data in the whole search, also with several worker processes.
            `tuner.search` then takes arrays or an unbatched data set, and `batch_size`.
            What it says of arrays is kept in memory, beside them; for a data set it is
            read from the directory in every epoch.
        optimizer: A name, an optimizer (each trial gets a new one of its config), or a
            function of `hp` (or of nothing) that makes one.
        loss: The compiled loss.
        metrics: Compiled metrics; each trial gets its own.
        distiller: What is made of student and teacher: `kd.Distiller` or anything that
            takes its arguments, such as a `functools.partial` of it.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a range is empty, reversed or below zero, or an argument is
            without effect. Classes or layers that do not fit are found when the tuner
            is made, before the first trial.

    Example:

    ```python
    model = kd.tuning.DistillationHyperModel(
        build_student,
        teacher,
        temperature=(1, 20),
        alpha=kd.tuning.Choice([0.0, 0.1, 0.5]),
        beta=0.9,
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    tuner = keras_tuner.RandomSearch(
        model, kd.tuning.objective("val_hard_loss"), max_trials=12
    )
    ```
    """

    def __init__(
        self,
        build_student: Callable[..., keras.Model],
        teacher: Any,
        *,
        temperature: Any = _TEMPERATURE,
        alpha: Any = (0, 1),
        beta: Any = _BETA,
        links: Any = (),
        soft_loss: Any = "auto",
        cache: str | os.PathLike[str] | None = None,
        optimizer: Any,
        loss: Any,
        metrics: Any = (),
        distiller: Callable[..., Any] = Distiller,
    ) -> None:
        super().__init__()
        if not callable(build_student) or isinstance(build_student, keras.Model):
            raise TypeError(
                "`build_student` must be a function that makes a new student. "
                f"Received: {build_student!r}"
            )
        self.build_student = build_student
        self.teacher = as_teacher(teacher)
        if cache is not None and isinstance(self.teacher, Cache):
            raise ValueError("`cache` has no effect: the teacher is a cache already.")
        self.temperature = Numbers("temperature", temperature, 4.0, positive=True)
        self.alpha = Numbers("alpha", alpha, 0.1, positive=False)
        self.beta = Numbers("beta", beta, 0.9, positive=False)
        _check_links(links)
        self.links = links
        choice = soft_loss if isinstance(soft_loss, Choice) else Choice([soft_loss])
        self._losses = dict(zip(choice.labels, choice.values, strict=True))
        self.cache = cache
        self.optimizer = optimizer
        self.loss = loss
        self.metrics = metrics
        self.distiller = distiller
        self._check_effects(temperature, beta)
        self._last_student: Any = None
        self._caches = None
        if cache is not None:
            self._caches = Caches(self.teacher, cache, several=callable(links))
        self._checked: tuple[str, bool] | None = None
        self._identity: dict[str, Any] = {}

    def _check_effects(self, temperature: Any, beta: Any) -> None:
        losses = self._losses.values()
        if any(isinstance(getattr(t, "temperature", 0), keras.Layer) for t in losses):
            raise ValueError(
                "A loss with a LearnedTemperature cannot be searched: all trials would "
                "share it. Give `distiller` a function that makes one for each."
            )
        tempered = any(map(_has_temperature, losses))
        if temperature != _TEMPERATURE and not tempered:
            raise ValueError(
                "`temperature` has no effect: the soft loss has none. "
                f"Received: {temperature!r}"
            )
        searched = tempered and isinstance(temperature, tuple)
        if searched and self.cache is not None and self.teacher.one_temperature:
            raise ValueError(
                f"{self.teacher!r} has other outputs at each temperature: with `cache` "
                "give one `temperature` or a Choice, each of which gets a cache of its "
                "own. An ensemble with combine='geometric' serves any. "
                f"Received: {temperature!r}"
            )
        if beta != _BETA and all(loss is None for loss in losses):
            raise ValueError(
                f"`beta` has no effect with `soft_loss=None`. Received: {beta!r}"
            )
        learns = not self.beta.always_zero and any(loss is not None for loss in losses)
        if self.alpha.always_zero and not learns and not self.links:
            raise ValueError(
                "With alpha = beta = 0 and no links there is nothing to learn from. "
                f"Received: alpha={self.alpha.given!r}, beta={self.beta.given!r}"
            )

    # -- one trial ------------------------------------------------------------------

    def build(self, hp: Any) -> Any:
        """The compiled distiller of a trial; keras-tuner calls it."""
        student = self._student(hp)
        # What may be 0 is asked last, so that a grid never meets alpha = beta = 0 in
        # several trials in a row, which keras-tuner takes for a broken program.
        links = _call(self.links, hp) if callable(self.links) else self.links
        label, arguments = self._soft_arguments(hp)
        loss = self._losses[label]
        alpha = self.alpha.choose(hp)
        if loss is not None:
            scope = [key for key, value in self._losses.items() if value is not None]
            with self._only_with(hp, scope):
                arguments["beta"] = self.beta.choose(hp)
        weights = [alpha, arguments.get("beta", 0), *(link.weight for link in links)]
        if not any(number(weight) for weight in weights):
            raise FailedTrialError("alpha = beta = 0: there is nothing to learn from.")
        if links:
            arguments["links"] = links
        made = self.distiller(student, self.teacher, alpha=alpha, **arguments)
        made.compile(
            optimizer=self._optimizer(hp), loss=self.loss, metrics=_copies(self.metrics)
        )
        return made

    def fit(self, hp: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Trains a trial; keras-tuner calls it with what `tuner.search` was given.

        Raises:
            keras_tuner.errors.FatalError: Before the first step, which ends the search:
                if the tuner's folder holds another search, the objective is in no log
                or cannot be compared between trials, or the cache cannot be made of
                these data.
        """
        given = dict(zip(_FIT, args, strict=False)) | kwargs
        for callback in given.get("callbacks") or []:
            tuner = getattr(callback, "tuner", None)
            if isinstance(tuner, keras_tuner.Tuner):
                try:
                    self.check_folder(tuner, write=True)
                except ValueError as error:
                    raise FatalValueError(str(error)) from error
        if self._caches is not None:
            try:
                given = self._caches.carried(model, given)
            except (OSError, TypeError, ValueError) as error:
                raise FatalValueError(f"The teacher's cache: {error}") from error
        self._check_objective(model, given)
        return model.fit(**given)

    def _check_objective(self, model: Any, given: dict[str, Any]) -> None:
        """Raises FatalError if the search's objective cannot be one.

        An evaluation tells which logs there are; they are the same in every trial.
        """
        for callback in given.get("callbacks") or []:
            wanted = getattr(callback, "objective", None)
            if not isinstance(wanted, keras_tuner.Objective):
                continue
            split = given.get("validation_split")
            validated = given.get("validation_data") is not None or bool(split)
            checked = str(wanted), validated
            if checked == self._checked:
                continue
            rows = _some_rows(given)
            if rows is None:
                continue
            logs = model.evaluate(rows, verbose=0, return_dict=True)
            check_objective(wanted, model, set(logs), validated)
            self._checked = checked

    def check_folder(self, tuner: Any, write: bool = False) -> None:
        """Raises ValueError if the trials in a tuner's folder are of another search."""
        if not self._identity:
            hp = keras_tuner.HyperParameters()
            self.build(hp)
            self._identity = {
                "teacher": self.teacher.fingerprint(),
                "space": hp.get_config()["space"],
                **{
                    n: getattr(self, n).values for n in ("temperature", "alpha", "beta")
                },
                "soft_loss": list(self._losses),
            }
        wanted = tuner.oracle.objective
        objectives = [
            [one.name, one.direction] for one in getattr(wanted, "objectives", [wanted])
        ]
        check_folder(tuner, {**self._identity, "objective": objectives}, write)

    # -- parts of a trial -----------------------------------------------------------

    def _student(self, hp: Any) -> keras.Model:
        student = _call(self.build_student, hp)
        if not isinstance(student, keras.Model):
            raise TypeError(
                f"`build_student` must return a keras.Model. Received: {student!r}"
            )
        if self._last_student is not None and self._last_student() is student:
            raise ValueError(
                "`build_student` returned the same model again: every trial would "
                "continue the one before. Build a new one."
            )
        self._last_student = weakref.ref(student)
        return student

    def _soft_arguments(self, hp: Any) -> tuple[Any, dict[str, Any]]:
        """The label of the soft loss, and what says it and its temperature."""
        labels = list(self._losses)
        label = hp.Choice("soft_loss", labels) if len(labels) > 1 else labels[0]
        loss = self._losses[label]
        if not _has_temperature(loss):
            return label, {"soft_loss": loss}
        scope = [key for key, value in self._losses.items() if _has_temperature(value)]
        with self._only_with(hp, scope):
            temperature = self.temperature.choose(hp)
        if isinstance(loss, str):
            return label, {"soft_loss": loss, "temperature": temperature}
        loss = copy.copy(loss)
        loss.temperature = temperature
        return label, {"soft_loss": loss}

    def _only_with(self, hp: Any, labels: Sequence[Any]) -> Any:
        """A scope for hyperparameters that only some soft losses have."""
        if len(self._losses) == 1:
            return contextlib.nullcontext()
        return hp.conditional_scope("soft_loss", list(labels))

    def _optimizer(self, hp: Any) -> Any:
        given = self.optimizer
        if isinstance(given, keras.optimizers.Optimizer):
            return type(given).from_config(given.get_config())
        return _call(given, hp) if callable(given) else given


def _check_links(links: Any) -> None:
    """Raises ValueError if trials would train the same adapter one after the other."""
    for link in () if callable(links) else links:
        for adapter in (link.adapter, link.teacher_adapter):
            if isinstance(adapter, keras.Layer):
                raise ValueError(
                    f"All trials would share the adapter of {link!r}. Give `links` a "
                    "function that makes new links."
                )


def _has_temperature(loss: Any) -> bool:
    return loss == "auto" if isinstance(loss, str) else hasattr(loss, "temperature")


def _call(function: Any, hp: Any) -> Any:
    """Calls a function of `hp`, or of nothing."""
    parameters = inspect.signature(function).parameters.values()
    wants = [
        p
        for p in parameters
        if p.name == "hp"
        or (
            p.default is p.empty
            and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        )
    ]
    return function(hp) if wants else function()


def _copies(metrics: Any) -> Any:
    """The metrics with fresh ones for those that have a state."""
    return keras.tree.map_structure(
        lambda metric: (
            type(metric).from_config(metric.get_config())
            if isinstance(metric, keras.metrics.Metric)
            else metric
        ),
        list(metrics) if isinstance(metrics, tuple) else metrics,
    )


def _some_rows(given: dict[str, Any]) -> tf.data.Dataset | None:
    """One batch for an evaluation; None where the data can be read only once."""
    data = given.get("validation_data")
    if data is None:
        x, y = given["x"], given.get("y")
        data = x if y is None else (x, y)
    if isinstance(data, tf.data.Dataset):
        return data.take(1)
    if isinstance(data, keras.utils.PyDataset):
        return tf.data.Dataset.from_tensors(data[0])
    if not isinstance(data, tuple):
        return None
    count = given.get("validation_batch_size") or given.get("batch_size") or 32
    some = keras.tree.map_structure(lambda leaf: leaf[:count], data)
    return rows_of(some).batch(count)
