"""Kills training runs at random moments, and compares how they end.

A run with `kd.callbacks.Backup`, of one process and of two workers, is killed (SIGKILL)
again and again, in mid-epoch or while the backup is written, and started again each
time, until it ends. Of two workers one is killed, and the other one ended, as the
launcher does. The final weights must be those of a run that nobody killed, bit by bit,
and every row must count once in every epoch. Written to docs/results/faults.json.

    python examples/benchmarks/faults.py [--smoke] [--rounds 20]

`--rounds` is the number of kills of each run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from crew import Crew, choose_strategy
from measure import RESULTS, TRIALS, parser, write

import keras_distill as kd

ROWS, BATCH, EVERY = 330, 16, 3
BATCHES = -(-ROWS // BATCH)
WRITING = "while a backup was written"


@keras.saving.register_keras_serializable(package="faults")
class Ids(keras.layers.Layer):
    """Notes the first feature, the number, of every row that comes by."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: list[int] = []

    def call(self, x: Any) -> Any:
        """Hands its input through."""

        def note(numbers: np.ndarray) -> np.ndarray:
            self.seen += numbers[:, 0].astype(int).tolist()
            return numbers

        noted = tf.numpy_function(note, [x[:, :1]], x.dtype)
        return tf.concat([tf.ensure_shape(noted, (None, 1)), x[:, 1:]], 1)

    def compute_output_spec(self, x: Any) -> Any:
        """As its input."""
        return keras.KerasTensor(x.shape, x.dtype)


class Journal(keras.callbacks.Callback):
    """Notes the rows of every batch when its training has ended; takes some time."""

    def __init__(self, path: Path, ids: Ids, seconds: float) -> None:
        super().__init__()
        self.path = path
        self.ids = ids
        self.seconds = seconds

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Remembers the epoch."""
        self.now = epoch

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Forgets the rows of the batch before."""
        self.ids.seen.clear()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Appends a line: which update it was, of which epoch and rows."""
        update = int(self.model.optimizer.iterations.numpy())
        rows = [row for row in self.ids.seen if row]  # padding has 0
        with open(self.path, "a") as file:
            file.write(json.dumps([update, self.now, rows]) + "\n")
        time.sleep(self.seconds)


def network(width: int, ids: Ids | None = None) -> keras.Model:
    """With everything that has a state of its own."""
    inputs = keras.Input((16,))
    x = inputs if ids is None else ids(inputs)
    x = keras.layers.Dense(width, "relu", name="hidden")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.3, seed=1)(x)
    return keras.Model(inputs, keras.layers.Dense(5)(x))


def train(folder: Path, index: int, epochs: int, seconds: float) -> None:
    """One worker's run, from the beginning or from the backup; leaves its weights."""
    strategy = choose_strategy(1)
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(ROWS, 16)).astype("float32")
    x[:, 0] = np.arange(1, ROWS + 1)
    y = np.arange(ROWS) % 5

    def rows(seed: tf.Tensor) -> tf.data.Dataset:
        data = tf.data.Dataset.from_tensor_slices((x, y))
        return data.shuffle(ROWS, seed=seed[0] + seed[1]).batch(BATCH)

    with strategy.scope():
        ids = Ids()
        link = kd.Link("hidden", "hidden", "mse", adapter="auto")
        distiller = kd.Distiller(network(24, ids), network(48), links=[link])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        distiller.compile("adam", loss, metrics=["accuracy"])
    callbacks = [
        Journal(folder / f"journal-{index}", ids, seconds),
        kd.callbacks.Backup(folder / "backup", save_freq=EVERY),
    ]
    data = kd.data.per_epoch(rows)
    distiller.fit(data, epochs=epochs, callbacks=callbacks, shuffle=False, verbose=0)
    variables = [*distiller.variables, *distiller.optimizer.variables]
    values = {f"{i}: {v.path}": np.array(v.numpy()) for i, v in enumerate(variables)}
    np.savez(folder / f"weights-{index}.npz", **values)


@dataclass(frozen=True)
class Run:
    """A run, and how it is started."""

    folder: Path
    workers: int
    epochs: int
    seconds: float

    def started(self) -> Crew:
        """Its processes."""
        return Crew(self.workers, self._work, self.folder / "errors")

    def _work(self, index: int) -> None:
        train(self.folder, index, self.epochs, self.seconds)

    def finish(self) -> None:
        """Runs to the end."""
        with self.started() as crew:
            crew.wait()

    def done(self) -> int:
        """How many batches have been trained, with those taken back."""
        journal = self.folder / "journal-0"
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    def killed(self, kills: int, spread: int) -> dict[str, int]:
        """Kills it so often over some batches, then ends it; says where kills hit."""
        dice = random.Random(0)
        temporary = self.folder / "backup.tmp"
        found: Counter[str] = Counter()
        for kill in range(kills):
            # Far enough that a backup was written since the start: its temporary file,
            # left by the kill before, is gone.
            target = self.done() + 2 * EVERY + dice.randrange(spread // kills + 1)
            with self.started() as crew:
                while self.done() < target:
                    crew.check()
                    time.sleep(0.0005)
                victim = dice.choice(crew.processes)
                if kill % 2:  # the chief, while it writes the backup
                    victim = crew.processes[0]
                    limit = time.monotonic() + 5
                    while not temporary.exists() and time.monotonic() < limit:
                        pass
                else:
                    time.sleep(dice.uniform(0, 0.02))
                os.kill(victim, signal.SIGKILL)
                os.waitpid(victim, 0)
                found[WRITING if temporary.exists() else "elsewhere"] += 1
        self.finish()
        return dict(found)

    def rows(self) -> dict[str, int]:
        """Rows that are missing in the final state, or in it twice.

        An update that was taken back has the same number as the one that replaced it:
        the later one counts.
        """
        found: Counter[tuple[int, int]] = Counter()
        for index in range(self.workers):
            updates = {}
            text = (self.folder / f"journal-{index}").read_text()
            for update, epoch, rows in map(json.loads, text.splitlines()):
                updates[update] = [(epoch, row) for row in rows]
            for rows in updates.values():
                found.update(rows)
        wanted = Counter(
            (epoch, row) for epoch in range(self.epochs) for row in range(1, ROWS + 1)
        )
        return {
            "rows lost": (wanted - found).total(),
            "rows repeated": (found - wanted).total(),
        }

    def weights(self) -> dict[str, bytes]:
        """The final state of every worker."""
        result = {}
        for index in range(self.workers):
            with np.load(self.folder / f"weights-{index}.npz") as file:
                for name, value in file.items():
                    result[f"worker {index}, {name}"] = value.tobytes()
        return result


def compared(folder: Path, workers: int, kills: int, epochs: int) -> dict[str, Any]:
    """One run left alone, and the same one killed."""
    runs = [
        Run(folder / f"{workers}-{name}", workers, epochs, seconds)
        for name, seconds in (("whole", 0.0), ("killed", 0.01))
    ]
    for run in runs:
        run.folder.mkdir()
    whole, broken = runs
    whole.finish()
    hits = broken.killed(kills, epochs * BATCHES // 2)
    expected, found = whole.weights(), broken.weights()
    different = [name for name, value in expected.items() if found[name] != value]
    print(*(f"differs: {name}" for name in different), sep="\n")
    return {
        "kills": sum(hits.values()),
        f"of them {WRITING}": hits.get(WRITING, 0),
        "batches of the run": epochs * BATCHES,
        "batches trained, with those taken back": broken.done(),
        **broken.rows(),
        "variables": len(expected),
        "variables that differ in any bit": len(different),
    }


def main() -> None:
    """Kills, compares and writes."""
    options = parser("Kills runs, and compares how they end.", "faults").parse_args()
    kills = options.rounds or (2 if options.smoke else 20)
    epochs = 3 if options.smoke else max(3, kills)
    result = {}
    with tempfile.TemporaryDirectory() as name:
        runs = {"one process": 1} | ({} if options.smoke else {"two workers": 2})
        for who, workers in runs.items():
            result[who] = compared(Path(name), workers, kills, epochs)
            print(who, *(f"  {k:<40} {v}" for k, v in result[who].items()), sep="\n")
    path = options.out or (TRIALS if options.smoke else RESULTS) / "faults.json"
    setting = {"rows": ROWS, "batch": BATCH, "epochs": epochs, "backup every": EVERY}
    title = "Runs that are killed and continue"
    write(path, title, {"setting": setting, "outcome": result})
    wrong = ("rows lost", "rows repeated", "variables that differ in any bit")
    if any(found[key] for found in result.values() for key in wrong):
        sys.exit("A continued run is not the uninterrupted one.")


if __name__ == "__main__":
    main()
