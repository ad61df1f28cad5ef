"""Kills training runs at random moments, and compares how they end.

A run with `kd.callbacks.Backup` is killed (SIGKILL) again and again, in mid-epoch or
while the backup is written, and started again each time, until it ends. Its final
weights must be those of a run that nobody killed, bit by bit, and every row must count
once in every epoch. Written to docs/results/faults.json.

    python examples/benchmarks/faults.py [--smoke] [--rounds 20]

`--rounds` is the number of kills.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from measure import RESULTS, TRIALS, parser, write

import keras_distill as kd

ROWS, BATCH, EVERY = 330, 16, 3


class Journal(keras.callbacks.Callback):
    """Notes every batch whose training has ended, and takes some time for each."""

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__()
        self.path = path
        self.seconds = seconds

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Remembers the epoch."""
        self.now = epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Appends a line: which update it was, and of what."""
        update = int(self.model.optimizer.iterations.numpy())
        with open(self.path, "a") as file:
            file.write(f"{update} {self.now} {batch}\n")
        time.sleep(self.seconds)


def network(width: int) -> keras.Model:
    """With everything that has a state of its own."""
    x = inputs = keras.Input((16,))
    x = keras.layers.Dense(width, "relu", name="hidden")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.3, seed=1)(x)
    return keras.Model(inputs, keras.layers.Dense(5)(x))


def train(folder: Path, epochs: int, seconds: float) -> None:
    """The run, from the beginning or from its backup; leaves `weights.npz`."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(ROWS, 16)).astype("float32")
    y = np.arange(ROWS) % 5

    def rows(seed: tf.Tensor) -> tf.data.Dataset:
        data = tf.data.Dataset.from_tensor_slices((x, y))
        return data.shuffle(ROWS, seed=seed[0] + seed[1]).batch(BATCH)

    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    distiller = kd.Distiller(network(24), network(48), links=[link])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    distiller.compile("adam", loss, metrics=["accuracy"])
    callbacks = [
        Journal(folder / "journal", seconds),
        kd.callbacks.Backup(folder / "backup", save_freq=EVERY),
    ]
    data = kd.data.per_epoch(rows)
    distiller.fit(data, epochs=epochs, callbacks=callbacks, shuffle=False, verbose=0)
    variables = [*distiller.variables, *distiller.optimizer.variables]
    np.savez(folder / "weights.npz", *[np.array(v.numpy()) for v in variables])


def forked(work: Callable[[], None]) -> int:
    """A process that does it; TensorFlow is imported, and not yet in use."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def lines(path: Path) -> int:
    """How many batches the journal has."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed(folder: Path, train_on: Callable[[], None], kills: int, total: int) -> dict:
    """Kills a run so often, spread over its length; returns where each kill hit."""
    dice = random.Random(0)
    journal, temporary = folder / "journal", folder / "backup.tmp"
    found: Counter[str] = Counter()
    for kill in range(kills):
        # Far enough that a backup was written since the start: its temporary file, left
        # by the kill before, is gone.
        target = lines(journal) + 2 * EVERY + dice.randrange(max(total // kills, 1) + 1)
        process = forked(train_on)
        while lines(journal) < target:
            if os.waitpid(process, os.WNOHANG)[0]:
                raise RuntimeError(f"The run ended before kill {kill + 1}.")
            time.sleep(0.0005)
        if kill % 2:  # while the backup is being written
            limit = time.monotonic() + 1
            while not temporary.exists() and time.monotonic() < limit:
                pass
        else:
            time.sleep(dice.uniform(0, 0.02))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found["while a backup was written" if temporary.exists() else "elsewhere"] += 1
    if os.waitpid(forked(train_on), 0)[1]:
        raise RuntimeError("The last start failed.")
    return dict(found)


def counted(journal: Path, epochs: int) -> dict[str, int]:
    """Rows that are missing in the final state, or in it twice.

    An update that was taken back has the same number as the one that replaced it: the
    later one counts.
    """
    updates: dict[int, tuple[int, int]] = {}
    for line in journal.read_text().splitlines():
        number, epoch, batch = map(int, line.split())
        updates[number] = (epoch, batch)
    sizes = [min(BATCH, ROWS - start) for start in range(0, ROWS, BATCH)]
    wanted = Counter((e, b) for e in range(epochs) for b in range(len(sizes)))
    found = Counter(updates.values())

    def rows(batches: Counter) -> int:
        return sum(sizes[batch] * times for (_, batch), times in batches.items())

    return {"lost": rows(wanted - found), "repeated": rows(found - wanted)}


def main() -> None:
    """Kills, compares and writes."""
    options = parser("Kills runs, and compares how they end.", "faults").parse_args()
    kills = options.rounds or (2 if options.smoke else 20)
    epochs = 3 if options.smoke else max(3, kills)
    total = epochs * -(-ROWS // BATCH)
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        whole.mkdir()
        broken.mkdir()
        if os.waitpid(forked(lambda: train(whole, epochs, 0)), 0)[1]:
            raise RuntimeError("The run without kills failed.")
        hits = killed(broken, lambda: train(broken, epochs, 0.01), kills, total // 2)
        with (
            np.load(whole / "weights.npz") as a,
            np.load(broken / "weights.npz") as b,
        ):
            differing = sum(a[key].tobytes() != b[key].tobytes() for key in a)
            variables = len(a.files)
        rows = counted(broken / "journal", epochs)
        done = lines(broken / "journal")
    result = {
        "setting": {"kills": kills, "epochs": epochs, "backup every": EVERY},
        "kills by moment": hits,
        "outcome": {
            "batches of the run": total,
            "batches trained, with those taken back": done,
            "rows lost": rows["lost"],
            "rows repeated": rows["repeated"],
            "variables": variables,
            "variables that differ in any bit": differing,
        },
    }
    for key, value in {**hits, **result["outcome"]}.items():
        print(f"{key:<40} {value}")
    path = options.out or (TRIALS if options.smoke else RESULTS) / "faults.json"
    write(path, "Runs that are killed and continue", result)
    if differing or any(rows.values()):
        sys.exit("The continued run is not the uninterrupted one.")


if __name__ == "__main__":
    main()
