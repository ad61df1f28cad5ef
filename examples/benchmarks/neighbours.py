"""The same distillation with `keras.distillation`, in plain PyTorch, and with ours.

Accuracy: the quickstart's handwritten digits, with 100 and with 1000 labels on 1000
images. The same teacher, initial weights and number of updates for all; the setting is
once what each library does unasked, and once the best of nine on the validation part.

* `keras.distillation.Distiller` has no place for rows without a label. Where there are
  some it gets the labelled rows alone, or all rows and no labels, whichever is better.
* Its default loss takes logits for probabilities; its best setting uses a loss object.

Time and memory: a step of a WRN-16-2 taught by a WRN-40-2, in one process for each
case; the processes take turns, and all have the same number of threads. The PyTorch
cases are there if `torch` is installed.

    python examples/benchmarks/neighbours.py [--smoke] [--rounds 30]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import numpy as np
from measure import RESULTS, TRIALS, median_ratio, parser, write

DEPTHS, WIDTH, ROWS = (40, 16), 2, 64
SMALL = ((16, 10), 1, 8)
KINDS = ("logits", "three links")
TORCH = ("torch", "torch, channels last")
TEMPERATURES = (2.0, 4.0, 8.0)


# -- time and memory -----------------------------------------------------------------


def make_step(library: str, links: bool, smoke: bool) -> Callable[[], Any]:
    """One step of a library, ready to be called."""
    depths, width, rows = SMALL if smoke else (DEPTHS, WIDTH, ROWS)
    random = np.random.default_rng(0)
    x = random.random((rows, 32, 32, 3), "float32")
    y = random.integers(0, 10, rows)
    threads = int(os.environ["OMP_NUM_THREADS"])
    if library in TORCH:
        import torch
        from torch_networks import distillation_step

        torch.set_num_threads(threads)
        return distillation_step(
            *(depths, width, x, y),
            temperature=4.0,
            links=links,
            channels_last=library != "torch",
        )
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    import step_time
    from models import wide_resnet

    data = tf.data.Dataset.from_tensors((x, y)).cache().repeat()
    teacher, student = (wide_resnet(depth, width) for depth in depths)
    make = step_time.ours if library == "ours" else step_time.theirs
    return step_time.step(make(student, teacher, links), data)


def work(library: str, links: bool, smoke: bool) -> None:
    """Does a step for each line of input; prints its seconds and the peak memory."""
    step = make_step(library, links, smoke)
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak}), flush=True)


def in_turn(rounds: int, smoke: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds and peak memory of every step of every case."""
    libraries = ["ours", "keras"]
    if importlib.util.find_spec("torch"):
        libraries += TORCH
    workers = {}
    for library in libraries:
        for kind in KINDS[:1] if smoke else KINDS:
            command = [sys.executable, __file__, "--worker", library, kind]
            command += ["--smoke"] if smoke else []
            workers[f"{library}, {kind}"] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
    found: dict[str, dict[str, list[float]]] = {}
    for name, worker in workers.items():
        if "ready\n" not in iter(worker.stdout.readline, ""):
            raise SystemExit(f"{name}: the process ended before its first step.")
        found[name] = {"wall": [], "cpu": [], "peak": []}
    for number in range(-3, rounds):
        for name, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            figures = json.loads(worker.stdout.readline())
            for key, value in figures.items() if number >= 0 else ():
                found[name][key].append(value)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return found


def costs(rounds: int, smoke: bool) -> dict[str, Any]:
    """Tables of time, memory, and ours over theirs."""
    found = in_turn(rounds, smoke)
    medians = {
        name: {
            "wall ms": 1e3 * statistics.median(figures["wall"]),
            "CPU ms": 1e3 * statistics.median(figures["cpu"]),
            "peak MiB": max(figures["peak"]),
        }
        for name, figures in found.items()
    }
    ratios = {}
    for name, figures in found.items():
        library, kind = name.rsplit(", ", 1)
        if library == "ours":
            continue
        ours = found[f"ours, {kind}"]
        ratios[f"ours / {name}"] = {
            clock: median_ratio(ours[clock], figures[clock])
            for clock in ("wall", "cpu")
        } | {"to reach": 1.0}
    return {"a step": medians, "ratios": ratios}


# -- accuracy ------------------------------------------------------------------------


class Digits:
    """The quickstart's task, with any number of labels.

    Args:
        labels: Number of rows with a label, of 1000.
        epochs: Of the student; the teacher gets three quarters.
    """

    def __init__(self, labels: int, epochs: int) -> None:
        sys.path.insert(0, os.fspath(Path(__file__).parents[1]))
        import quickstart

        from keras_distill import datasets

        self._quickstart, self._epochs = quickstart, epochs
        self._setting = quickstart.SETTINGS["digits"]
        self._data = datasets.load("digits")
        x, y = self._data.train
        few = quickstart.hide_labels(y, labels, self._data.num_classes)
        rows = np.resize(np.flatnonzero(few >= 0), len(x))
        self._all, self._labelled, self._full = (x, few), (x[rows], few[rows]), (x, y)
        self._teachers: dict[int, Any] = {}

    def _network(self, who: str, seed: int) -> Any:
        import keras

        keras.utils.set_random_seed(seed)
        widths = getattr(self._setting, who)
        return self._quickstart.convnet(widths, self._data, who)

    def _options(self, epochs: int) -> dict[str, Any]:
        steps = -(-len(self._all[1]) // self._setting.batch_size)
        return self._quickstart.compile_options(epochs * steps)

    def _fit(self, model: Any, data: Any, epochs: int) -> None:
        model.compile(**self._options(epochs))
        size = self._setting.batch_size
        model.fit(*data, batch_size=size, epochs=epochs, verbose=0)

    def teacher(self, seed: int) -> Any:
        """Trained with all labels."""
        if seed not in self._teachers:
            model = self._network("teacher", seed)
            self._fit(model, self._full, max(1, 3 * self._epochs // 4))
            self._teachers[seed] = model
        return self._teachers[seed]

    def _score(self, student: Any) -> dict[str, float]:
        parts = {"validation": self._data.validation, "test": self._data.test}
        scores = {}
        for name, (x, y) in parts.items():
            chosen = student.predict(x, batch_size=500, verbose=0).argmax(-1)
            scores[name] = 100 * float(np.mean(chosen == y))
        return scores

    def alone(self, seed: int) -> dict[str, float]:
        """Accuracies of a student that has no teacher."""
        student = self._network("student", seed)
        self._fit(student, self._labelled, self._epochs)
        return self._score(student)

    def ours(
        self, seed: int, temperature: float = 4.0, alpha: float = 0.1, beta: float = 0.9
    ) -> dict[str, float]:
        """Accuracies with `kd.Distiller`."""
        import keras_distill as kd

        teacher, student = self.teacher(seed), self._network("student", seed)
        distiller = kd.Distiller(
            student, teacher, temperature=temperature, alpha=alpha, beta=beta
        )
        self._fit(distiller, self._all, self._epochs)
        return self._score(student)

    def keras(
        self,
        seed: int,
        temperature: float = 3.0,
        student_loss_weight: float = 0.5,
        loss: Any = "kl_divergence",
    ) -> dict[str, float]:
        """Accuracies with `keras.distillation.Distiller`."""
        from keras import distillation

        teacher, student = self.teacher(seed), self._network("student", seed)
        distiller = distillation.Distiller(
            teacher=teacher,
            student=student,
            distillation_losses=distillation.LogitsDistillation(temperature, loss),
            student_loss_weight=student_loss_weight,
        )
        # Without the labels all rows can be used; the loss must still be computable.
        x, y = self._labelled if student_loss_weight else self._all
        self._fit(distiller, (x, np.maximum(y, 0)), self._epochs)
        return self._score(student)

    def settings(self, library: str) -> Iterator[dict[str, Any]]:
        """Nine settings of a library."""
        import keras

        for temperature in TEMPERATURES:
            for share in (0.0, 0.1, 0.5):
                if library == "ours":
                    weights = {"alpha": share, "beta": 1.0 - share}
                else:
                    weights = {"student_loss_weight": share}
                    weights |= {"loss": keras.losses.KLDivergence()}
                yield {"temperature": temperature, **weights}


def accuracies(labels: int, seeds: int, epochs: int, trials: int) -> dict[str, Any]:
    """Test accuracies of both libraries with a number of labels."""
    task = Digits(labels, epochs)
    best: dict[str, dict[str, Any]] = {}
    for library in ("keras", "ours"):
        run = getattr(task, library)
        settings = list(task.settings(library))[:trials]
        best[library] = max(settings, key=lambda s: run(100, **s)["validation"])
    cases = {
        "labels alone": task.alone,
        "keras, as documented": task.keras,
        "keras, best": lambda seed: task.keras(seed, **best["keras"]),
        "ours, defaults": task.ours,
        "ours, best": lambda seed: task.ours(seed, **best["ours"]),
    }
    table: dict[str, Any] = {}
    for name, run in cases.items():
        values = [run(seed)["test"] for seed in range(seeds)]
        table[name] = {
            "mean %": statistics.mean(values),
            "deviation": statistics.stdev(values) if seeds > 1 else None,
            "seeds": values,
        }
        if name.endswith("best"):
            chosen = best[name.split(",")[0]]
            texts = (f"{k} {v:g}" for k, v in chosen.items() if k != "loss")
            table[name]["chosen"] = ", ".join(texts)
        print(f"{labels} labels, {name}: {table[name]['mean %']:.2f} %", flush=True)
    return table


def main() -> None:
    """Measures and writes."""
    options = parser("Neighbours: the same task, seeds and budget.", "neighbours")
    options.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options.add_argument("--seeds", type=int, default=3)
    chosen = options.parse_args()
    if chosen.worker:
        library, kind = chosen.worker
        work(library, kind != KINDS[0], chosen.smoke)
        return
    # Many models trace many functions, and TensorFlow takes that for a mistake.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    seeds, epochs, trials, rounds = chosen.seeds, 40, 9, chosen.rounds or 30
    tasks: tuple[int, ...] = (100, 1000)
    if chosen.smoke:
        import tensorflow as tf

        seeds, epochs, trials, rounds, tasks = 1, 1, 1, chosen.rounds or 2, (100,)
        tf.config.run_functions_eagerly(True)  # a few steps are not worth a graph
    depths, width, rows = SMALL if chosen.smoke else (DEPTHS, WIDTH, ROWS)
    result = {
        "setting": {
            "teacher": f"WRN-{depths[0]}-{width}",
            "student": f"WRN-{depths[1]}-{width}",
            "batch": rows,
            "rounds": rounds,
            "threads": int(os.environ["OMP_NUM_THREADS"]),
            "accuracy": f"digits, {epochs} epochs, {seeds} seeds, {trials} trials each",
            "command": "python examples/benchmarks/neighbours.py",
        },
        **costs(rounds, chosen.smoke),
        "accuracy on digits": {
            f"{labels} labels": accuracies(labels, seeds, epochs, trials)
            for labels in tasks
        },
    }
    for name, ratio in result["ratios"].items():
        print(f"{name:<44} {ratio['wall']:6.3f}  {ratio['cpu']:6.3f} CPU")
    default = (TRIALS if chosen.smoke else RESULTS) / "neighbours.json"
    write(chosen.out or default, "Beside the neighbours", result)


if __name__ == "__main__":
    main()
