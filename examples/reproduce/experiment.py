"""What the reproductions share: finished runs in a JSON file, means, and a plot."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "benchmarks"))

from measure import RESULTS, write

RUNS = Path(__file__).parents[2] / "runs"

Row = dict[str, Any]


def parser(description: str, name: str, seeds: int) -> argparse.ArgumentParser:
    """Options of every reproduction: `--seeds`, `--smoke`, `--out`, `--runs`."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--seeds", type=int, default=seeds, help="number of seeds")
    result.add_argument(
        "--smoke", action="store_true", help="a trial of seconds, on little data"
    )
    result.add_argument(
        "--out",
        type=Path,
        help=f"JSON file, default docs/results/{name}.json (with --smoke: under runs/)",
    )
    result.add_argument(
        "--runs",
        type=Path,
        default=RUNS / name,
        help="folder for models and for what goes on after an interruption",
    )
    return result


class Experiment:
    """The finished runs of one script, on disk as soon as each is finished.

    A row is one finished run or one model that came out of it: `run` and `seed` say
    which, `model` which of several models, the other entries are what was measured.

    Args:
        options: What `parser` has read.
        name: Name of the JSON file.
        title: Title of the section in the docs.
        setting: What all runs have in common, and the command. A file with another
            setting is refused, so that no table mixes two of them.
        summarize: Turns the rows into the table of the docs.

    Attributes:
        rows: The finished runs.
        folder: Where runs may keep models and backups.

    Raises:
        SystemExit: If the file or the folder holds runs of another setting.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        name: str,
        title: str,
        setting: dict[str, Any],
        summarize: Callable[[list[Row]], dict[str, Any]],
    ) -> None:
        folder = options.runs / f"smoke_{os.getpid()}" if options.smoke else None
        self.folder: Path = folder or options.runs
        self.path: Path = options.out or (folder or RESULTS) / f"{name}.json"
        self._title, self._summarize = title, summarize
        self._setting = json.loads(json.dumps(setting))
        self.rows: list[Row] = []
        if self.path.exists():
            stored = json.loads(self.path.read_text())
            if stored["setting"] != self._setting:
                raise SystemExit(
                    f"{self.path} holds runs of another setting: {stored['setting']}"
                )
            self.rows = stored["runs"]
        self.folder.mkdir(parents=True, exist_ok=True)
        left = self.folder / "setting.json"
        if left.exists() and json.loads(left.read_text()) != self._setting:
            raise SystemExit(
                f"{self.folder} holds what runs of another setting left behind. Give "
                "another folder with --runs, or delete it."
            )
        left.write_text(json.dumps(self._setting))

    def has(self, run: str, seed: int) -> bool:
        """Whether a run is finished."""
        return any((row["run"], row["seed"]) == (run, seed) for row in self.rows)

    def add(self, run: str, seed: int, models: Iterable[Row]) -> None:
        """Adds what a finished run gave, prints it, and writes the file."""
        for model in models:
            self.rows.append({"run": run, "seed": seed, **model})
            figures = ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in model.items()
            )
            print(f"seed {seed}, {run}: {figures}", flush=True)
        summary: dict[str, Any] = {}
        try:
            summary = self._summarize(self.rows)
        finally:  # a table that fails must not cost a run
            result = {"setting": self._setting, "summary": summary, "runs": self.rows}
            write(self.path, self._title, result)


def name_of(row: Row) -> str:
    """A row's name in tables: its run, and its model if there are several."""
    return f"{row['run']}: {row['model']}" if "model" in row else row["run"]


def means(rows: list[Row], value: str, baseline: str | None = None) -> dict[str, Row]:
    """Mean and spread over the seeds, and the gain over a baseline of the same seed.

    Args:
        rows: Finished runs.
        value: Which entry of the rows to average.
        baseline: Name (`name_of`) of the rows that the others are compared with.

    Returns:
        For each name the number of seeds, the mean, the standard deviation, and with
        a baseline (unless that has several seeds and this is one run) the mean paired
        difference and its 95 % confidence interval (half its width, by Student's
        distribution).
    """
    base = {row["seed"]: row[value] for row in rows if name_of(row) == baseline}
    table: dict[str, Row] = {}
    for name in dict.fromkeys(name_of(row) for row in rows if value in row):
        own = {r["seed"]: r[value] for r in rows if name_of(r) == name}
        line: Row = {"seeds": len(own), value: statistics.mean(own.values())}
        line["deviation"] = deviation(own.values())
        if base and name != baseline and (len(own) > 1 or len(base) == 1):
            gains = [own[seed] - base[seed] for seed in own if seed in base]
            line["difference"] = statistics.mean(gains) if gains else None
            line["± (95 %)"] = half_interval(gains)
        table[name] = line
    return table


def gains(rows: list[Row], value: str, baseline: str) -> dict[str, Row]:
    """The paired differences alone, as `means` gives them, each with its baseline."""
    kept = ("seeds", "difference", "± (95 %)")
    return {
        name: {"over": baseline} | {key: line[key] for key in kept}
        for name, line in means(rows, value, baseline).items()
        if line.get("difference") is not None
    }


def deviation(values: Iterable[float]) -> float | None:
    """Standard deviation of a sample; None for fewer than two values."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else None


def half_interval(values: list[float]) -> float | None:
    """Half the width of the mean's 95 % confidence interval; None for one value."""
    from scipy import stats

    if len(values) < 2:
        return None
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def plot_gains(
    rows: list[Row], value: str, baseline: str, path: Path, label: str
) -> None:
    """One point per run: its difference from the baseline of the same seed.

    Args:
        rows: Finished runs.
        value: Which entry of the rows to show.
        baseline: Name (`name_of`) of the rows that the others are compared with.
        path: The image file.
        label: What the horizontal axis shows.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = {row["seed"]: row[value] for row in rows if name_of(row) == baseline}
    gains: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if value in row and row["seed"] in base and name_of(row) != baseline:
            pair = (row["seed"], row[value] - base[row["seed"]])
            gains.setdefault(name_of(row), []).append(pair)
    names = sorted(gains, key=lambda n: -statistics.mean(g for _, g in gains[n]))
    size = (8, 0.32 * len(names) + 1.2)
    figure, axes = plt.subplots(figsize=size, layout="tight")
    for height, name in enumerate(names):
        for seed, gain in gains[name]:
            axes.plot(gain, height, "o", color=f"C{seed % 10}", alpha=0.6, mec="none")
        mean = statistics.mean(gain for _, gain in gains[name])
        axes.plot([mean, mean], [height - 0.3, height + 0.3], color="black", lw=1.5)
    axes.axvline(0, color="gray", lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.savefig(path, dpi=110)
    plt.close(figure)
