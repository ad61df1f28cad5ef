"""Processes that train, alone or together, each with TensorFlow to itself.

They are forked from one that has imported TensorFlow and not used it yet: only so can
each have its own devices, its own strategy and its own place in a cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from keras_distill.launch import HOST, free_ports


class Crew:
    """Workers; those that still run at the end of the `with` are killed.

    Args:
        workers: How many. Several find each other by `TF_CONFIG`.
        work: What each does, given its index.
        errors: File for what they print as errors.
    """

    def __init__(
        self, workers: int, work: Callable[[int], object], errors: Path
    ) -> None:
        self.errors = errors
        ports = free_ports(workers)
        self.processes = [self._forked(i, ports, work) for i in range(workers)]

    def _forked(self, index: int, ports: list[int], work: Callable) -> int:
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process
        status = 1
        try:
            flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
            os.dup2(os.open(self.errors, flags), 2)
            if len(ports) > 1:
                cluster = {"worker": [f"{HOST}:{port}" for port in ports]}
                task = {"type": "worker", "index": index}
                os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
            work(index)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)

    def check(self) -> None:
        """Raises RuntimeError if a worker has ended."""
        if any(os.waitpid(process, os.WNOHANG)[0] for process in self.processes):
            raise self._failure("A worker has ended.")

    def wait(self) -> None:
        """Waits for the end; raises RuntimeError if a worker failed."""
        statuses = [os.waitpid(process, 0)[1] for process in self.processes]
        if any(statuses):
            raise self._failure("A worker failed.")

    def _failure(self, what: str) -> RuntimeError:
        return RuntimeError(f"{what}\n{self.errors.read_text()[-3000:]}")


def choose_strategy(devices: int, gpus: bool = False) -> tf.distribute.Strategy:
    """The strategy of this worker: of its cluster, or over devices of its own.

    Args:
        devices: How many; on the CPU they are logical ones.
        gpus: Whether they are GPUs.
    """
    if not gpus:
        tf.config.set_visible_devices([], "GPU")
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if gpus:
        found = tf.config.list_physical_devices("GPU")
        tf.config.set_visible_devices(found[:devices], "GPU")
    elif devices > 1:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * devices,
        )
    if devices == 1:
        return tf.distribute.get_strategy()
    kind = "GPU" if gpus else "CPU"
    return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(devices)])
