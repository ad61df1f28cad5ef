"""Starts one script as several workers on this machine.

    python -m keras_distill.launch --workers 2 [--restarts 3] script.py arguments...

Every worker runs the script with its own place in the variable `TF_CONFIG`, so that
`tf.distribute.MultiWorkerMirroredStrategy()` finds the others, on free ports of
127.0.0.1. One worker runs without it, on its own. Their output comes out line by line
behind the worker's name.

A worker that ends with an error, is killed or never comes ends the run: the others are
stopped, because a worker cannot join a cluster that runs already, and the last line
says which one it was, and with what error. With `--restarts` all are started again, and
a script whose `fit` has `kd.callbacks.Backup` goes on where the last backup was
written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

HOST = "127.0.0.1"
GRACE = 10.0  # seconds between asking a worker to end and killing it
POLL = 0.1  # seconds


class Stopped(Exception):
    """The launcher was told to end by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Failed(Exception):
    """Workers are gone, and the run with them.

    Attributes:
        status: Exit status for the launcher.
    """

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


_printing = threading.Lock()

# How a traceback ends: the name of an exception, and what it says.
_ERROR = re.compile(r"(?:\w+\.)*(\w*(?:Error|Exception)(?:: .*)?)$")


class Worker:
    """One process, and the threads that hand on its output.

    Args:
        index: Its place, from 0.
        command: What it runs.
        ports: The ports of all workers.
    """

    def __init__(self, index: int, command: Sequence[str], ports: list[int]) -> None:
        self.name = f"worker {index}"
        self.port = ports[index]
        self.came = False
        self.error = ""
        # In a session of its own: Ctrl-C reaches the launcher, which passes it on.
        self.process = subprocess.Popen(
            command,
            env=_environment(index, ports),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._threads = [
            threading.Thread(target=self._hand_on, args=(source, target))
            for source, target in (
                (self.process.stdout, sys.stdout),
                (self.process.stderr, sys.stderr),
            )
        ]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def _hand_on(self, source: IO[bytes], target: Any) -> None:
        with source:
            for line in source:
                text = line.decode(errors="replace").rstrip("\r\n")
                if found := _ERROR.match(text):
                    self.error = found[1]
                with _printing:
                    print(f"[{self.name}] {text}", file=target, flush=True)

    def status(self) -> int | None:
        """As `subprocess.Popen.poll`: None while it runs."""
        return self.process.poll()

    def look(self) -> None:
        """Notes whether it is in the cluster: whether its port is open."""
        if not self.came:
            with contextlib.suppress(OSError):
                socket.create_connection((HOST, self.port), timeout=POLL).close()
                self.came = True

    def send(self, number: int) -> None:
        """Sends a signal to it and to its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def finish(self) -> None:
        """Waits for the last lines of its output."""
        for thread in self._threads:
            thread.join(timeout=2)  # a grandchild may hold the pipe open


def _environment(index: int, ports: list[int]) -> dict[str, str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("TF_CONFIG", None)
    if len(ports) > 1:
        cluster = {"worker": [f"{HOST}:{port}" for port in ports]}
        task = {"type": "worker", "index": index}
        environment["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    return environment


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def _ended(worker: Worker) -> str:
    status = worker.status()
    assert status is not None
    if status < 0:
        return f"{worker.name} was killed by {signal.Signals(-status).name}"
    error = f" ({worker.error})" if worker.error else ""
    return f"{worker.name} ended with status {status}{error}"


def _watch(workers: list[Worker], start_timeout: float) -> None:
    """Returns when all workers have ended well.

    Raises:
        Failed: If one did not, or does not come although another one waits for it.
    """
    several = len(workers) > 1
    deadline = None
    while True:
        running = [w for w in workers if w.status() is None]
        bad = [w for w in workers if w.status()]
        if bad:
            for worker in bad:
                worker.finish()  # what it says last is its error
            status = bad[0].status() or 0
            raise Failed(
                ", ".join(map(_ended, bad)), status if status > 0 else 128 - status
            )
        if not running:
            return
        if several and not all(w.came for w in workers):
            for worker in running:
                worker.look()
            missing = [w.name for w in workers if not w.came]
            if deadline is None and len(missing) < len(workers):
                deadline = time.monotonic() + start_timeout
            if missing and deadline is not None and time.monotonic() > deadline:
                raise Failed(
                    f"{', '.join(missing)} did not come within {start_timeout:g} s "
                    "of the first one",
                    1,
                )
        time.sleep(POLL)


def _stop(workers: list[Worker], number: int) -> None:
    """Ends the workers that still run: first with a signal, then by killing them."""
    for worker in workers:
        if worker.status() is None:
            worker.send(number)
    deadline = time.monotonic() + GRACE
    while any(w.status() is None for w in workers) and time.monotonic() < deadline:
        time.sleep(POLL)
    for worker in workers:
        if worker.status() is None:
            worker.send(signal.SIGKILL)
            worker.process.wait()


def run_once(command: Sequence[str], count: int, start_timeout: float) -> None:
    """Runs all workers to their end.

    Raises:
        Failed: If a worker is gone; the others are stopped by then.
        Stopped: If a signal came; the workers have got it, and ended.
    """
    workers: list[Worker] = []
    number: int = signal.SIGTERM
    try:
        ports = free_ports(count)
        for index in range(count):
            workers.append(Worker(index, command, ports))
        _watch(workers, start_timeout)
    except Stopped as stopped:
        number = stopped.number
        raise
    finally:
        _stop(workers, number)
        for worker in workers:
            worker.finish()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into `Stopped`, once."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: Any) -> None:
        for other in numbers:  # a second one must not disturb the end
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _at_least(minimum: float, kind: type) -> Any:
    def read(text: str) -> Any:
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {text}")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is no number
    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m keras_distill.launch",
        description="Starts one script as several workers on this machine.",
    )
    add = parser.add_argument
    add("--workers", type=_at_least(1, int), required=True, help="how many processes")
    add(
        "--restarts",
        type=_at_least(0, int),
        default=0,
        help="how often all are started again after one is gone (default: never)",
    )
    add(
        "--start-timeout",
        type=_at_least(0, float),
        default=300.0,
        metavar="SECONDS",
        help="how long the first worker waits for the others (default: %(default)g)",
    )
    add("script", help="a Python script")
    add("arguments", nargs=argparse.REMAINDER, help="handed on to the script")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, and returns its exit status."""
    options = _parser().parse_args(arguments)
    if not os.path.isfile(options.script):
        _parser().error(f"there is no script {options.script!r}")
    command = [sys.executable, options.script, *options.arguments]
    left = options.restarts
    with _signals():
        while True:
            try:
                run_once(command, options.workers, options.start_timeout)
                return 0
            except Stopped as stopped:
                print(f"launch: {stopped}", file=sys.stderr, flush=True)
                return 128 + stopped.number
            except Failed as failed:
                what = f"launch: {failed}; all workers were stopped"
                if not left:
                    print(what, file=sys.stderr, flush=True)
                    return failed.status
                left -= 1
                print(
                    f"{what} and start again ({left} restarts left)",
                    file=sys.stderr,
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
