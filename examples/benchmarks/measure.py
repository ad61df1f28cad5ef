"""What the benchmarks share: taking turns, medians, and the file with the result."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "docs" / "results"
TRIALS = Path(__file__).parents[2] / "runs" / "benchmarks"


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Options of every benchmark: `--smoke`, `--rounds`, `--out`."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--rounds", type=int, help="measurements of each case")
    result.add_argument("--smoke", action="store_true", help="a trial of seconds")
    result.add_argument(
        "--out",
        type=Path,
        help=f"JSON file, default docs/results/{name}.json (with --smoke: under runs/)",
    )
    return result


def interleaved(
    cases: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 3
) -> dict[str, dict[str, list[float]]]:
    """Runs the cases in turn, so that a busy machine slows all of them.

    Returns:
        For each case the seconds of each round: `wall`, and `cpu`, the time that this
        process spent on all cores, which other processes disturb less.
    """
    times: dict[str, dict[str, list[float]]] = {
        name: {"wall": [], "cpu": []} for name in cases
    }
    for number in range(-warm_up, rounds):
        for name, run in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number >= 0:
                times[name]["wall"].append(wall)
                times[name]["cpu"].append(cpu)
        if sys.stdout.isatty():
            print(f"\rround {max(number + 1, 0)}/{rounds}", end="", flush=True)
    print()
    return times


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def write(path: Path, title: str, result: dict[str, Any]) -> None:
    """Writes a result, with when and on what it was measured, as JSON."""
    packages = ("keras", "tensorflow", "numpy")
    machine = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "load at the end": round(os.getloadavg()[0], 1),
        "processor": _processor(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"title": title, **result, "machine": machine}, indent=2)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)  # whole, or as it was
    print(f"written: {os.path.relpath(path)}")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()
