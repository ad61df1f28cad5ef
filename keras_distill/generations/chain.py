"""A chain of models, each taught by the one before it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_distill.averaging import AveragedModels
from keras_distill.base import BaseDistiller
from keras_distill.distribute.workers import is_chief
from keras_distill.generations.storage import Record, Storage
from keras_distill.tables import text_table

# Makes what trains a generation, from the one before it (None for the first).
Step = Callable[[keras.Model | None], BaseDistiller]


@dataclasses.dataclass(frozen=True)
class Table:
    """One row per generation, and one for their ensemble.

    Attributes:
        rows: Dicts: `model`, `teacher`, `parameters` and figures. With validation data
            these are what `evaluate` gives on them (`val_...`), else the last logs.
    """

    rows: tuple[dict[str, Any], ...]

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain dicts, ready for JSON."""
        return [dict(row) for row in self.rows]

    def __str__(self) -> str:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        return text_table(
            columns, [[_text(r.get(c)) for c in columns] for r in self.rows]
        )


@dataclasses.dataclass(frozen=True)
class Generations:
    """What a chain of generations returns.

    Attributes:
        models: The trained models, the first generation first.
        histories: Their logs: one dict of lists per generation.
        table: The models beside each other, and their ensemble; print it.
        ensemble: A Keras model: the mean of all generations' probabilities, as
            log-probabilities for models with logits.
    """

    models: list[keras.Model]
    histories: list[dict[str, list[float]]]
    table: Table
    ensemble: keras.Model


@dataclasses.dataclass(frozen=True)
class Chain:
    """What all chains of generations have in common: see `kd.generations.born_again`.

    Attributes:
        steps: One per generation.
        data: Per generation what it is trained on.
    """

    steps: Sequence[Step]
    data: Sequence[Any]

    def run(
        self,
        settings: dict[str, Any],
        compile_args: Any,
        *,
        epochs: int,
        validation_data: Any,
        callbacks: Any,
        directory: str | os.PathLike | None,
        **fit: Any,
    ) -> Generations:
        """Trains what is not finished, and gathers the results."""
        if not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"`epochs` must be an integer above 0. Received: {epochs}")
        if not callable(compile_args) and not isinstance(compile_args, dict):
            raise TypeError(
                "`compile_args` must be a dict of arguments for compile(), or a "
                f"function that returns one. Received: {compile_args!r}"
            )
        settings = {**settings, "epochs": epochs}
        storage = None if directory is None else Storage(directory, settings)
        models: list[keras.Model] = []
        histories = []
        for index, (step, data) in enumerate(zip(self.steps, self.data, strict=True)):
            stored = None if storage is None else storage.load(index)
            if stored is None:
                trained = step(models[-1] if models else None)
                trained.compile(**_fresh(compile_args))
                own = callbacks(index) if callable(callbacks) else callbacks
                kept = [Record()] if storage is None else storage.callbacks(index)
                trained.fit(
                    **as_arguments(data),
                    epochs=epochs,
                    validation_data=validation_data,
                    callbacks=[*keras.tree.flatten(own), *kept],
                    **fit,
                )
                stored = trained.student, kept[0].history
                if storage is not None and is_chief(trained.distribute_strategy):
                    storage.save(index, *stored)
            models.append(stored[0])
            histories.append(stored[1])
        ensemble = AveragedModels(models, name="ensemble")
        figures = [{k: v[-1] for k, v in logs.items()} for logs in histories]
        if validation_data is not None:
            figures = [
                _evaluated(model, compile_args, validation_data)
                for model in [*models, ensemble]
            ]
        return Generations(
            models, histories, _table(models, ensemble, figures), ensemble
        )


def as_arguments(data: Any) -> dict[str, Any]:
    """What `fit` and `evaluate` take, as their arguments by name."""
    if not isinstance(data, tuple):
        return {"x": data}
    return dict(zip(("x", "y", "sample_weight"), data, strict=False))


def _fresh(compile_args: Any) -> dict[str, Any]:
    """Arguments whose optimizer and metrics belong to no other model."""
    if callable(compile_args):
        return compile_args()

    def copy(item: Any) -> Any:
        if isinstance(item, (keras.optimizers.Optimizer, keras.metrics.Metric)):
            config = keras.saving.serialize_keras_object(item)
            return keras.saving.deserialize_keras_object(config)
        return item

    return {k: keras.tree.map_structure(copy, v) for k, v in compile_args.items()}


def _evaluated(model: keras.Model, compile_args: Any, data: Any) -> dict[str, float]:
    judge = BaseDistiller(model)
    judge.compile(**_fresh(compile_args))
    logs = judge.evaluate(**as_arguments(data), verbose=0, return_dict=True)
    return {f"val_{name}": float(value) for name, value in logs.items()}


def _table(
    models: Sequence[keras.Model], ensemble: keras.Model, figures: list[dict]
) -> Table:
    rows = [
        {
            "model": f"generation {index}",
            "teacher": f"generation {index - 1}" if index else "",
            "parameters": model.count_params(),
        }
        for index, model in enumerate(models)
    ]
    rows.append(
        {"model": "ensemble", "teacher": "", "parameters": ensemble.count_params()}
    )
    figures = figures + [{}] * (len(rows) - len(figures))
    return Table(tuple(row | f for row, f in zip(rows, figures, strict=True)))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
