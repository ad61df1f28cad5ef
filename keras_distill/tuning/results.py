"""What a search found: as a table, as a distiller, as a figure."""

from __future__ import annotations

import csv
import math
import os
from typing import Any

import numpy as np

from keras_distill.files import save_figure, whole
from keras_distill.tables import text_table


class Results(list):
    """Trials as dicts, the best first; prints as a table."""

    @property
    def columns(self) -> list[str]:
        """All keys, in the order of their first use."""
        return list(dict.fromkeys(key for row in self for key in row))

    def __str__(self) -> str:
        columns = [name for name in self.columns if name != "message"]
        rows = [[_shown(row.get(name)) for name in columns] for row in self]
        return text_table(columns, rows)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as CSV."""
        with (
            whole(path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self)


def results(tuner: Any) -> Results:
    """The trials of a search, those that ended well first and the best at the top.

    Args:
        tuner: A tuner of keras-tuner, during or after a search.

    Returns:
        A list of dicts with `trial`, `status`, the objective under its name, `epochs`
        (up to the best one), the hyperparameters, and for a trial that failed its last
        `message`. `print` shows a table, `.to_csv(path)` writes one.

    Raises:
        ValueError: If the tuner's folder holds the trials of another search.

    Example:

    ```python
    table = kd.tuning.results(tuner)
    print(table)
    table.to_csv("trials.csv")
    ```
    """
    _check(tuner)
    oracle = tuner.oracle
    sign = -1 if oracle.objective.direction == "max" else 1
    trials = sorted(
        oracle.trials.values(),
        key=lambda t: (1, 0) if _no_score(t) else (0, sign * t.score),
    )
    rows = Results()
    for trial in trials:
        row = {
            "trial": trial.trial_id,
            "status": trial.status,
            oracle.objective.name: trial.score,
            "epochs": None if trial.best_step is None else trial.best_step + 1,
            **trial.hyperparameters.values,
        }
        if trial.message:
            row["message"] = trial.message.strip().splitlines()[-1]
        rows.append(row)
    return rows


def _no_score(trial: Any) -> bool:
    """Whether a trial has none; one that diverged has failed with NaN."""
    return trial.score is None or math.isnan(trial.score)


def best_distiller(tuner: Any) -> Any:
    """The distiller of the best trial, with the weights of its best epoch.

    It is compiled and has the teacher itself, also after a search with a cache.

    Raises:
        ValueError: If no trial has ended well, or the tuner's folder holds the trials
            of another search.
    """
    _check(tuner)
    found = tuner.get_best_models(1)
    if not found:
        raise ValueError("No trial of this search has ended well.")
    return found[0]


def plot(tuner: Any, path: str | os.PathLike[str]) -> None:
    """Draws the objective over T and alpha, and how much each parameter mattered.

    Where T or alpha was not searched another number takes its place. How much a
    parameter mattered is the share of the variance of the trials' ranks that its own
    ranks (the values, for a choice of names) explain; with few trials it is rough.

    Args:
        tuner: A tuner of keras-tuner after a search.
        path: Of the image; its ending says the format.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If fewer than two trials have ended well.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    rows, scores = _completed(tuner)
    shares = importance(tuner)
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    numbers = [
        name
        for name in sorted(shares, key=lambda n: (n != "temperature", n != "alpha"))
        if all(isinstance(row.get(name), (int, float)) for row in rows)
    ]
    objective = tuner.oracle.objective.name
    if len(numbers) > 1:
        x, y = ([row[name] for row in rows] for name in numbers[:2])
        points = left.scatter(x, y, c=scores, cmap="viridis", edgecolors="black")
        figure.colorbar(points, ax=left, label=objective)
        left.set(xlabel=numbers[0], ylabel=numbers[1])
    elif numbers:
        left.scatter([row[numbers[0]] for row in rows], scores)
        left.set(xlabel=numbers[0], ylabel=objective)
    left.set_title("The trials")
    if "temperature" in numbers:
        left.set_xscale("log")
        left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        left.xaxis.set_major_formatter("{x:g}")
        left.xaxis.set_minor_formatter(NullFormatter())
    names = sorted(shares, key=lambda name: shares[name])
    right.barh(names, [shares[name] for name in names])
    right.set(
        xlim=(0, 1),
        xlabel="share of the variance of the ranks",
        title="How much each parameter mattered",
    )
    save_figure(figure, path)


def importance(tuner: Any) -> dict[str, float]:
    """How much each parameter mattered, between 0 and 1: see `plot`."""
    rows, scores = _completed(tuner)
    ranks = _ranks(scores)
    shares = {}
    for name in rows.columns[4:]:
        values = [row.get(name) for row in rows]
        if name.startswith("tuner/") or name == "message" or len(set(values)) < 2:
            continue
        if all(isinstance(value, (int, float)) for value in values):
            share = _explained_by_line(_ranks(values), ranks)
        else:
            share = _explained_by_groups(values, ranks)
        shares[name] = share
    return shares


def _check(tuner: Any) -> None:
    """keras-tuner asks no hypermodel when it finds a folder with a finished search."""
    check = getattr(getattr(tuner, "hypermodel", None), "check_folder", None)
    if check is not None:
        check(tuner)


def _completed(tuner: Any) -> tuple[Results, list[float]]:
    objective = tuner.oracle.objective.name
    rows = Results(row for row in results(tuner) if row["status"] == "COMPLETED")
    if len(rows) < 2:
        raise ValueError(
            f"At least two trials must have ended well. Received: {len(rows)}"
        )
    return rows, [row[objective] for row in rows]


def _ranks(values: Any) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


def _explained_by_line(values: np.ndarray, ranks: np.ndarray) -> float:
    if np.ptp(ranks) == 0:
        return 0.0
    return float(np.corrcoef(values, ranks)[0, 1] ** 2)


def _explained_by_groups(values: list[Any], ranks: np.ndarray) -> float:
    if np.ptp(ranks) == 0:
        return 0.0
    groups = [ranks[[v == value for v in values]] for value in set(values)]
    between = sum(len(g) * (g.mean() - ranks.mean()) ** 2 for g in groups)
    return float(between / np.sum((ranks - ranks.mean()) ** 2))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
