"""The launcher, with scripts that need nothing but Python."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from keras_distill import launch

HEAD = """
import json, os, pathlib, signal, socket, sys, time

config = json.loads(os.environ.get("TF_CONFIG", "null"))
index = config["task"]["index"] if config else None
here = pathlib.Path(__file__).parent


def serve():
    host, port = config["cluster"]["worker"][index].split(":")
    return socket.create_server((host, int(port)))
"""


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(HEAD + text)
        return str(path)

    return write


def test_every_worker_knows_its_place(script, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "of another run")
    path = script(
        "(here / str(index)).write_text(json.dumps(config))\n"
        "print('place', index, sys.argv[1:])\n"
        "print('warning', index, file=sys.stderr)"
    )
    assert launch.main(["--workers", "2", path, "--epochs", "3"]) == 0
    found = capfd.readouterr()
    for index in range(2):
        assert f"[worker {index}] place {index} ['--epochs', '3']\n" in found.out
        assert f"[worker {index}] warning {index}\n" in found.err
    first, second = ((tmp_path / str(i)).read_text() for i in range(2))
    assert '"index": 0' in first
    assert first.replace('"index": 0', '"index": 1') == second
    assert second.count("127.0.0.1:") == 2


def test_one_worker_runs_on_its_own(script, capfd, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "of another run")
    assert launch.main(["--workers", "1", script("print(config)")]) == 0
    assert capfd.readouterr().out == "[worker 0] None\n"


@pytest.mark.parametrize(
    ("death", "status", "message"),
    [
        ("sys.exit(3)", 3, "worker 1 ended with status 3"),
        (
            "raise OSError('the disk is gone')",
            1,
            "worker 1 ended with status 1 (OSError: the disk is gone)",
        ),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "worker 1 was killed by SIGKILL",
        ),
    ],
)
def test_a_worker_that_dies_ends_the_others(script, capfd, death, status, message):
    path = script(f"if index == 1:\n    {death}\ntime.sleep(60)")
    start = time.monotonic()
    assert launch.main(["--workers", "3", path]) == status
    assert time.monotonic() - start < 30
    errors = capfd.readouterr().err
    assert f"launch: {message}; all workers were stopped\n" in errors
    assert "worker 0 " not in errors


def test_a_worker_that_ignores_the_end_is_killed(script, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.3)
    path = script(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "(here / str(index)).touch()\n"
        "while not (here / str(1 - index)).exists():\n"
        "    time.sleep(0.01)\n"
        "if index == 1:\n    sys.exit(1)\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    assert launch.main(["--workers", "2", path]) == 1
    assert time.monotonic() - start < 30


def test_a_worker_that_never_comes_is_named(script, capfd):
    path = script(
        "if index == 0:\n    server = serve()\n    server.accept()\ntime.sleep(60)"
    )
    arguments = ["--workers", "2", "--start-timeout", "0.3", path]
    assert launch.main(arguments) == 1
    assert "worker 1 did not come within 0.3 s" in capfd.readouterr().err


def test_all_are_started_again(script, tmp_path, capfd):
    path = script(
        "with open(here / 'starts', 'a') as file:\n"
        "    file.write(str(index))\n"
        "while (here / 'starts').stat().st_size % 2:\n"
        "    time.sleep(0.01)\n"
        "starts = (here / 'starts').stat().st_size // 2\n"
        "if index == 1 and starts < 3:\n    sys.exit(5)\n"
        "if starts < 3:\n    time.sleep(60)"
    )
    assert launch.main(["--workers", "2", "--restarts", "3", path]) == 0
    assert sorted((tmp_path / "starts").read_text()) == ["0"] * 3 + ["1"] * 3
    assert "(1 restarts left)" in capfd.readouterr().err


def test_restarts_end(script, capfd):
    assert launch.main(["--workers", "1", "--restarts", "1", script("1 / 0")]) == 1
    errors = capfd.readouterr().err
    assert errors.count("\n[worker 0] ZeroDivisionError") == 2
    assert errors.endswith(
        "worker 0 ended with status 1 (ZeroDivisionError: division by zero); "
        "all workers were stopped\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(script, tmp_path, number):
    path = script(
        "def end(number, frame):\n"
        "    print('got', signal.Signals(number).name)\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGINT, end)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "(here / str(index)).touch()\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, launch.__file__, "--workers", "2", "--restarts", "3", path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not all((tmp_path / str(i)).exists() for i in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    for index in range(2):
        assert f"[worker {index}] got {number.name}\n" in printed
    assert f"launch: stopped by {number.name}\n" in errors


def test_the_command_line_is_checked(tmp_path, capfd):
    missing = str(tmp_path / "missing.py")
    for arguments, message in (
        (["--workers", "0", __file__], "must be at least 1, not 0"),
        (["--workers", "2", "--restarts", "-1", __file__], "at least 0, not -1"),
        (["--workers", "2", missing], "there is no script"),
        (["--workers", "two", __file__], "invalid int value: 'two'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            launch.main(arguments)
        assert stopped.value.code == 2
        assert message in capfd.readouterr().err
