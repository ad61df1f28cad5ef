"""A search by keras-tuner's chief and three workers, one of which is killed.

Run as a script: `tuning_workers.py <directory>`. TensorFlow is imported once; each
process is forked before it is used. What they did is in `trials.json` (the results, as
the chief has them), `began`, `ended` (a worker and a trial a line) and `taught` (how
many rows the teacher was given, a call a line).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_tuner
import tensorflow as tf
import tiny
from keras_tuner.src.distribute import oracle_chief

import keras_distill as kd

WORKERS = ("worker-0", "worker-1", "worker-2")
TRIALS = 5
DIRECTORY = Path(sys.argv[1])


def note(name: str, *what: Any) -> None:
    """Appends a line; other processes do so too."""
    with open(DIRECTORY / name, "a") as file:
        file.write(" ".join(map(str, what)) + "\n")


def noted(name: str) -> list[list[str]]:
    path = DIRECTORY / name
    text = path.read_text() if path.exists() else ""
    return [line.split() for line in text.splitlines()]


class Eager(kd.Distiller):
    """Without tracing: a trial takes milliseconds."""

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        return super().compile(*args, run_eagerly=True, **kwargs)


class Notes(keras.callbacks.Callback):
    """Says which trials a worker runs; worker-1 is killed the first time."""

    def __init__(self, me: str) -> None:
        super().__init__()
        self.me = me

    def on_train_begin(self, logs: Any = None) -> None:
        killed = any(worker == self.me for worker, _ in noted("began"))
        note("began", self.me, self.model.temperature.numpy())
        # All have a trial before one goes on: then the killed one has begun another
        # than the others.
        while {worker for worker, _ in noted("began")} != set(WORKERS):
            time.sleep(0.01)
        if self.me == "worker-1" and not killed:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, logs: Any = None) -> None:
        note("ended", self.me, self.model.temperature.numpy())


def search() -> Any:
    """The same in every process, as in a user's script; returns the tuner."""
    me = os.environ["KERASTUNER_TUNER_ID"]
    original = kd.teachers.Model.__call__

    def counted(self, x, *args):
        tf.numpy_function(lambda n: note("taught", n), [tf.shape(x)[0]], [])
        return original(self, x, *args)

    kd.teachers.Model.__call__ = counted
    model = kd.tuning.DistillationHyperModel(
        tiny.mlp,
        tiny.teacher(),
        alpha=0.5,
        cache=DIRECTORY / "cache",
        optimizer=keras.optimizers.SGD(0.1),
        loss=tiny.SPARSE,
        distiller=Eager,
    )
    tuner = keras_tuner.RandomSearch(
        model,
        kd.tuning.objective("val_hard_loss"),
        max_trials=TRIALS,
        seed=1,
        directory=DIRECTORY,
        project_name="search",
    )
    x, y = tiny.data(24)
    tuner.search(
        x, y, validation_data=(x, y), batch_size=24, verbose=0, callbacks=[Notes(me)]
    )
    return tuner


def chief() -> None:
    # It looks every 20 seconds whether the workers have ended.
    oracle_chief.time = SimpleNamespace(sleep=lambda seconds: time.sleep(0.05))
    rows = kd.tuning.results(search())
    (DIRECTORY / "trials.json").write_text(json.dumps(rows))


def forked(name: str, port: int, work: Callable[[], Any]) -> int:
    """Runs `work` in a new process, to keras-tuner known by this name."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ |= {
            "KERASTUNER_TUNER_ID": name,
            "KERASTUNER_ORACLE_IP": "127.0.0.1",
            "KERASTUNER_ORACLE_PORT": str(port),
        }
        work()
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    running = {forked("chief", free, chief)}
    names = {forked(name, free, search): name for name in WORKERS}
    killed = next(pid for pid, name in names.items() if name == "worker-1")
    assert os.WTERMSIG(os.waitpid(killed, 0)[1]) == signal.SIGKILL
    running |= names.keys() - {killed}
    running.add(forked("worker-1", free, search))
    for pid in running:
        assert os.waitpid(pid, 0)[1] == 0
