"""Training in two stages: first the hints alone, then everything without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill.distiller import Distiller
from keras_distill.links import Link
from keras_distill.losses.base import PACKAGE
from keras_distill.offline.preset import Preset
from keras_distill.teachers.base import Absent


@keras.saving.register_keras_serializable(package=PACKAGE)
class HintStage(Distiller):
    """Trains the links alone, and nothing of the student that they do not depend on.

    Layers above the linked ones run, but their weights, statistics and random
    generators stay as they are. Regularisation losses are not in the total.

    Args:
        student: A built Keras model.
        teacher: As in `Distiller`.
        links: What is trained.
        **options: As in `Distiller`.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any,
        *,
        links: Sequence[Link],
        **options: Any,
    ) -> None:
        options = {"alpha": 0.0, "soft_loss": None} | options
        super().__init__(student, teacher, links=links, **options)
        reached = self._reached_by(self._student_taps)
        # Not a list that Keras tracks: those could not be saved.
        self.__dict__["_above"] = [v for v in student.variables if id(v) not in reached]

    @property
    def trainable_variables(self) -> list[Any]:
        above = {id(v) for v in self.__dict__.get("_above", ())}
        return [v for v in super().trainable_variables if id(v) not in above]

    @property
    def trainable_weights(self) -> list[Any]:
        return self.trainable_variables  # what an optimizer's averages go to

    def regularization(self, others: Sequence[keras.Layer] = ()) -> Any:
        return None

    def train_step(self, data: Any) -> dict[str, Any]:
        states = [v for v in self.__dict__["_above"] if not v.trainable]
        before = [ops.copy(v.value) for v in states]
        logs = super().train_step(data)
        for variable, value in zip(states, before, strict=True):
            variable.assign(value)
        return logs


@keras.saving.register_keras_serializable(package=PACKAGE)
class Staged(Preset):
    """A distiller with hints: links that are trained alone, by `fit_hints`.

    Args:
        student: A built Keras model.
        teacher: As in `Distiller`.
        hints: The links of stage one.
        joint: Whether the hints are ordinary links instead, and there is one stage.
        **options: As in `Distiller`.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any,
        *,
        hints: Sequence[Link],
        joint: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(student, teacher, own=hints if joint else (), **options)
        self.joint = joint
        self.hints: tuple[Link, ...] = self.own_links
        if not joint:
            stage = self._stage(hints)
            self.hints = stage.links
            self._hint_adapters = stage._adapters

    def fit_hints(
        self,
        x: Any,
        y: Any = None,
        epochs: int = 1,
        optimizer: Any = None,
        **fit: Any,
    ) -> keras.callbacks.History:
        """Stage one: trains the student up to the guided layers, and the adapters.

        Only the hints are differentiated: no labels, no soft targets, no
        regularisation. What the guided layers do not depend on stays bit by bit as it
        is: weights, statistics of normalisation and random generators.

        Args:
            x: Data, as in `fit`; labels in them are ignored.
            y: Ignored too, unless a hint's loss needs labels.
            epochs: Number of epochs.
            optimizer: As in `compile`; None for a new one with the configuration of
                the compiled one.
            **fit: Further arguments of `fit`.

        Returns:
            Keras's History, with `loss` and one `<hint>_loss` for each hint.

        Raises:
            ValueError: If there is no such stage (`joint=True`), no optimizer, or if
                validation is asked for: hints are computed in training only.
        """
        if self.joint:
            raise ValueError(
                "This distiller trains in one stage, in which the links are part of "
                "`fit`: it has no `fit_hints`."
            )
        for argument in ("validation_data", "validation_split"):
            if fit.get(argument):
                raise ValueError(
                    f"`{argument}` is not available in `fit_hints`: evaluation runs "
                    "the student alone, and the hints need the teacher."
                )
        stage = self._stage(self.hints)
        with self.distribute_strategy.scope():
            stage.compile(self._hint_optimizer(optimizer), **self._hint_options())
        return stage.fit(x, y, epochs=epochs, **fit)

    def _stage(self, hints: Sequence[Link]) -> HintStage:
        with self.distribute_strategy.scope():
            return HintStage(
                self.student,
                self.teacher,
                links=hints,
                student_inputs=self.student_inputs,
                unlabelled=self.unlabelled,
            )

    def _hint_optimizer(self, optimizer: Any) -> Any:
        if optimizer is not None:
            return optimizer
        if not self.compiled:
            raise ValueError(
                "`fit_hints` takes its optimizer from `compile`: compile first, or "
                "give `optimizer=`."
            )
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        return type(optimizer).from_config(optimizer.get_config())

    def _hint_options(self) -> dict[str, Any]:
        """What of `compile` holds for stage one too."""
        if not self.compiled:
            return {}
        names = ("check_finite", "skip_nonfinite", "across_replicas")
        return {name: self._options[name] for name in names} | {
            "run_eagerly": self.run_eagerly,
            "jit_compile": self._jit_compile_argument,
            "steps_per_execution": self.steps_per_execution,
        }

    def _remembered_teacher(self) -> dict[str, Any]:
        memory = super()._remembered_teacher()
        if isinstance(self.teacher, Absent):
            return memory
        # Without them the hints could not be made again while there is no teacher.
        taps = [tap for hint in self.hints for tap in _flat(hint.teacher_layer)]
        specs = self.teacher.tap_specs(taps) if taps else {}
        shapes = {tap: list(spec.shape) for tap, spec in specs.items()}
        return memory | {"taps": memory["taps"] | shapes}


def _flat(layers: Any) -> list[str]:
    return keras.tree.flatten(layers)
