"""Objectives: what may be compared between trials, and in which direction."""

from __future__ import annotations

import re
from typing import Any

import keras_tuner
from keras_tuner.errors import FatalValueError

_MAXIMIZED = r"acc|agreement|auc|precision|recall|f1|fbeta|f_score|iou|r2"
_MINIMIZED = r"loss|error|mse|mae|mape|msle|entropy|divergence|ece|perplexity"
_PROPOSED = "'val_accuracy' or kd.tuning.objective('val_hard_loss')"


def objective(name: str) -> keras_tuner.Objective:
    """An objective with its direction, which keras-tuner only knows of some names.

    Args:
        name: Of a log, such as `"val_hard_loss"` or `"val_accuracy"`.

    Raises:
        ValueError: If the log is a training term, which no search can compare, or its
            direction is not known: then use `keras_tuner.Objective(name, direction)`.

    Example:

    >>> from keras_distill import tuning
    >>> tuning.objective("val_hard_loss").direction
    'min'
    """
    trained = name.endswith("_loss") and not name.startswith("val_")
    if name in ("loss", "val_soft_loss") or (trained and name != "hard_loss"):
        raise ValueError(_not_comparable(name))
    if re.search(_MINIMIZED, name):
        return keras_tuner.Objective(name, "min")
    if re.search(_MAXIMIZED, name):
        return keras_tuner.Objective(name, "max")
    raise ValueError(
        f"It is not known whether {name!r} should be small or large. Give "
        f"keras_tuner.Objective({name!r}, 'min' or 'max')."
    )


def check_objective(
    wanted: Any, distiller: Any, evaluated: set[str], validated: bool
) -> None:
    """Raises FatalValueError unless the logs hold an objective that can be compared.

    Args:
        wanted: keras-tuner's objective; several are checked one by one.
        distiller: The compiled distiller.
        evaluated: Names of the logs of its evaluation.
        validated: Whether there are validation data.
    """
    terms = {f"{term}_loss" for term in distiller.term_weights if term != "hard"}
    comparable = {f"val_{log}" for log in evaluated - terms} if validated else set()
    trained = (evaluated | set(distiller.log_names)) - terms - {"loss"}
    for name in [one.name for one in getattr(wanted, "objectives", [wanted])]:
        if name == "loss" or name.removeprefix("val_") in terms:
            raise FatalValueError(_not_comparable(name))
        if name not in comparable | trained:
            missing = "" if validated else " There are no validation data."
            raise FatalValueError(
                f"There is no log {name!r} to be the objective.{missing} There are: "
                f"{', '.join(sorted(comparable) + sorted(trained))}."
            )


def _not_comparable(name: str) -> str:
    return (
        f"{name!r} cannot be the objective: it is a training term, measured with the "
        "trial's own temperature and weights, so that the smallest weights would win. "
        f"Use {_PROPOSED}."
    )
