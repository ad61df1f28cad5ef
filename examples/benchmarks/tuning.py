"""What a search costs, what it leaves behind, and what tuning gains on the digits.

* How long the search of the command line takes: a teacher, 12 trials, the best student.
* What stays in memory after each of 30 trials, against a search of plain keras-tuner on
  the same student, each in a process of its own: live `tf.Variable`s and bytes.
* How long a trial takes with the teacher's cache, and with the teacher itself, against
  plain training of the same student; the three in turn.
* Whether the tuned distiller is better than one with the default temperature and
  weights, in the quickstart's setting (1000 images, 100 labels). The best trial is the
  one with the best validation accuracy: the fair comparison is that on the test part.

Written to docs/results/tuning.json:

    python examples/benchmarks/tuning.py [--smoke] [--rounds 6] [--only PART]

With `--only` one part is measured again and the others stay as they are in the file.
"""

from __future__ import annotations

import concurrent.futures
import gc
import json
import logging
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_tuner
import numpy as np
import tensorflow as tf
from measure import RESULTS, TRIALS, interleaved, median_ratio, parser, write

import keras_distill as kd

sys.path.append(os.fspath(Path(__file__).parents[1]))

from quickstart import SETTINGS, compile_options, convnet, hide_labels

# Every trial traces functions, and TensorFlow takes that for a mistake.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

DATA = kd.datasets.load("digits")
SETTING = SETTINGS["digits"]
TITLE = "Tuning: what a search costs, leaves behind and gains"
OWN = ("title", "machine")  # what `write` adds
PLAIN, LIVE, CACHED = "plain training", "the teacher itself", "the teacher's cache"


def student() -> keras.Model:
    """The quickstart's."""
    return convnet(SETTING.student, DATA, "student")


class Plain(keras_tuner.HyperModel):
    """A search of keras-tuner that knows no teacher."""

    def build(self, hp: Any) -> keras.Model:
        """The student, with another learning rate in each trial."""
        model = student()
        options = compile_options(1000)
        rate = hp.Float("learning_rate", 1e-4, 1e-2, sampling="log")
        model.compile(**options | {"optimizer": keras.optimizers.Adam(rate)})
        return model


def hypermodel(
    teacher: keras.Model, cache: Path | None = None, updates: int = 1000
) -> kd.tuning.DistillationHyperModel:
    """A search over temperature, alpha and beta."""
    return kd.tuning.DistillationHyperModel(
        student, teacher, cache=cache, **compile_options(updates)
    )


def searcher(model: Any, directory: Path, name: str, trials: int) -> Any:
    """A random search for the best validation accuracy."""
    return keras_tuner.RandomSearch(
        model,
        "val_accuracy",
        max_trials=trials,
        seed=0,
        directory=directory,
        project_name=name.replace(" ", "-"),
    )


# -- the command line -----------------------------------------------------------------


def command_line(trials: int, epochs: int, directory: Path) -> dict[str, Any]:
    """The whole of `python -m keras_distill.tune`, with its start."""
    command = [sys.executable, "-m", "keras_distill.tune", "--dataset", "digits"]
    command += ["--trials", str(trials), "--epochs", str(epochs)]
    before, started = children(), time.perf_counter()
    subprocess.run(
        [*command, "--output", os.fspath(directory / "command")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {
        "trials": trials,
        "epochs of each": epochs,
        "seconds": time.perf_counter() - started,
        "seconds of CPU": children() - before,
        "seconds to reach": 240,
    }


def children() -> float:
    """Seconds of CPU that the processes started by this one have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# -- what stays in memory -------------------------------------------------------------


def left_behind(case: str, trials: int, epochs: int, directory: str) -> dict[str, Any]:
    """Variables and MiB of this process after each trial of a search."""
    variables: list[int] = []
    memory: list[float] = []

    class Watched(keras_tuner.RandomSearch):
        def on_trial_end(self, trial: Any) -> None:
            super().on_trial_end(trial)
            keras.backend.clear_session()
            gc.collect()
            variables.append(
                sum(issubclass(type(o), tf.Variable) for o in gc.get_objects())
            )
            status = Path("/proc/self/status").read_text()
            line = next(li for li in status.splitlines() if li.startswith("RssAnon"))
            memory.append(int(line.split()[1]) / 1024)

    if case == PLAIN:
        model: Any = Plain()
    else:
        teacher = convnet(SETTING.teacher, DATA, "teacher")
        cache = Path(directory) / "memory-cache" if case == CACHED else None
        model = hypermodel(teacher, cache)
    search = Watched(
        model,
        "val_accuracy",
        max_trials=trials,
        seed=0,
        directory=directory,
        project_name=f"memory {case}",
    )
    search.search(
        *DATA.train,
        validation_data=DATA.validation,
        epochs=epochs,
        batch_size=SETTING.batch_size,
        verbose=0,
    )
    return {"variables": variables, "memory": memory}


def memory(trials: int, epochs: int, directory: Path) -> dict[str, Any]:
    """Growth after the first trial, which loads what all trials need."""
    found = {}
    for case in (PLAIN, LIVE, CACHED):
        with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")
        ) as process:
            found[case] = process.submit(
                left_behind, case, trials, epochs, os.fspath(directory)
            ).result()
    growth = {case: one["memory"][-1] - one["memory"][0] for case, one in found.items()}
    return {
        case: {
            "variables after the first trial": one["variables"][0],
            f"after trial {trials}": one["variables"][-1],
            "MiB after the first trial": one["memory"][0],
            "MiB more at the end": growth[case],
            "over plain": growth[case] / growth[PLAIN],
            "to reach": None if case == PLAIN else 1.2,
        }
        for case, one in found.items()
    }


# -- what a trial costs ---------------------------------------------------------------


def one_more(search: Any, epochs: int) -> Callable[[], None]:
    """A function that runs one more trial of a search."""

    def run() -> None:
        search.oracle.max_trials += 1
        search.search(
            *DATA.train,
            validation_data=DATA.validation,
            epochs=epochs,
            batch_size=SETTING.batch_size,
            verbose=0,
        )

    return run


def cost(rounds: int, epochs: int, directory: Path) -> dict[str, Any]:
    """Trials in turn; the cache is built in the rounds that are not counted."""
    teacher = convnet(SETTING.teacher, DATA, "teacher")
    cases = {
        PLAIN: Plain(),
        CACHED: hypermodel(teacher, directory / "cost-cache"),
        LIVE: hypermodel(teacher),
    }
    times = interleaved(
        {
            name: one_more(searcher(model, directory, f"cost {name}", 0), epochs)
            for name, model in cases.items()
        },
        rounds,
        warm_up=1,
    )
    return {
        name: {
            "seconds": statistics.median(clocks["wall"]),
            "seconds of CPU": statistics.median(clocks["cpu"]),
            "over plain": median_ratio(clocks["wall"], times[PLAIN]["wall"]),
            "over plain, CPU": median_ratio(clocks["cpu"], times[PLAIN]["cpu"]),
            "to reach": 1.1 if name == CACHED else None,
        }
        for name, clocks in times.items()
    }


# -- what tuning gains ----------------------------------------------------------------


def gain(seed: int, trials: int, epochs: tuple[int, int], directory: Path) -> Any:
    """Validation and test accuracy of a default and a tuned distiller of one seed."""
    keras.utils.set_random_seed(seed)
    images, labels = (part[: SETTING.images] for part in DATA.train)
    few = hide_labels(labels, SETTING.labels, DATA.num_classes)
    batches = -(-SETTING.images // SETTING.batch_size)
    fit = {"batch_size": SETTING.batch_size, "verbose": 0}

    teacher = convnet(SETTING.teacher, DATA, "teacher")
    teacher.compile(**compile_options(epochs[0] * batches))
    teacher.fit(images, labels, epochs=epochs[0], **fit)

    model = hypermodel(
        teacher, directory / f"gain-cache-{seed}", updates=epochs[1] * batches
    )
    search = searcher(model, directory, f"gain {seed}", trials)
    search.search(images, few, validation_data=DATA.validation, epochs=epochs[1], **fit)
    best = kd.tuning.results(search)[0]

    accuracies = {"teacher": accuracy(teacher)}
    start = student().get_weights()
    tuned = {name: best[name] for name in ("temperature", "alpha", "beta")}
    for name, chosen in {"default": {}, "tuned": tuned}.items():
        keras.utils.set_random_seed(seed)
        distiller = kd.Distiller(student(), teacher, **chosen)
        distiller.student.set_weights(start)
        distiller.compile(**compile_options(epochs[1] * batches))
        distiller.fit(images, few, epochs=epochs[1], **fit)
        accuracies[name] = accuracy(distiller)
    return {"chosen": tuned, "accuracies": accuracies}


def accuracy(model: keras.Model) -> dict[str, float]:
    """On the validation and the test part, in percent."""
    parts = {"validation": DATA.validation, "test": DATA.test}
    return {
        name: 100 * model.evaluate(*part, verbose=0, return_dict=True)["accuracy"]
        for name, part in parts.items()
    }


def gains(
    seeds: int, trials: int, epochs: tuple[int, int], directory: Path
) -> dict[str, Any]:
    """Means over seeds, each with a teacher, a search and first weights of its own."""
    runs = []
    for seed in range(seeds):
        runs.append(gain(seed, trials, epochs, directory))
        print(f"seed {seed}: {runs[-1]}", flush=True)
    accuracies: dict[str, Any] = {}
    for name in ("teacher", "default", "tuned"):
        accuracies[name] = {}
        for part in ("validation", "test"):
            values = [run["accuracies"][name][part] for run in runs]
            accuracies[name][f"{part}, mean"] = statistics.mean(values)
            accuracies[name][f"{part}, each seed"] = [round(v, 1) for v in values]
    both = [
        [run["accuracies"][name]["test"] for run in runs]
        for name in ("tuned", "default")
    ]
    return {
        "Tuned and default distillers: accuracy in percent": accuracies,
        "What the searches chose": {
            f"seed {seed}": run["chosen"] for seed, run in enumerate(runs)
        },
        "Tuned over default": {
            "points of test accuracy": float(np.mean(both[0]) - np.mean(both[1])),
            "seeds in which tuned is better on the test part": sum(
                a > b for a, b in zip(*both, strict=True)
            ),
            "seeds": seeds,
        },
    }


def main() -> None:
    """Measures and writes."""
    options = parser("What a search costs, leaves and gains.", "tuning")
    options.add_argument("--only", choices=["command", "memory", "cost", "gain"])
    options = options.parse_args()
    rounds = options.rounds or (1 if options.smoke else 6)
    trials, many, epochs, seeds = 12, 30, 10, 3
    long = SETTING.teacher_epochs, SETTING.student_epochs
    if options.smoke:
        trials, many, epochs, seeds, long = 2, 2, 1, 1, (1, 1)
    out = options.out or (TRIALS if options.smoke else RESULTS) / "tuning.json"
    setting = {
        "data": f"digits, {SETTING.images} rows for training",
        "student, channels": str(SETTING.student),
        "teacher, channels": str(SETTING.teacher),
        "batch": SETTING.batch_size,
        "rounds": rounds,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "command": lambda: {
                "The command line": command_line(trials, epochs, folder)
            },
            "memory": lambda: {
                f"What is left after {many} trials of {min(epochs, 2)} epochs": memory(
                    many, min(epochs, 2), folder
                )
            },
            "cost": lambda: {
                f"A trial of {epochs} epochs": cost(rounds, epochs, folder)
            },
            "gain": lambda: gains(seeds, trials, long, folder),
        }
        result: dict[str, Any] = {}
        if options.only:
            parts = {options.only: parts[options.only]}
            if out.exists():
                result = json.loads(out.read_text())
        for part, measure in parts.items():
            found = measure()
            print(part, json.dumps(found, indent=2), flush=True)
            result |= found | {"setting": setting}
            # `machine` says when and where the last part was measured.
            write(out, TITLE, {k: v for k, v in result.items() if k not in OWN})


if __name__ == "__main__":
    main()
