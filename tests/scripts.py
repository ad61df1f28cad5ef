"""Runs a script of the examples as from a command line, but in this process.

A new process would spend most of its time on importing TensorFlow.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import tensorflow as tf

EXAMPLES = Path(__file__).parents[1] / "examples"


@contextlib.contextmanager
def functions(eagerly: bool):
    """Runs `tf.function`s eagerly, or not, inside the block."""
    tf.config.run_functions_eagerly(eagerly)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


def run(script: str, *arguments: str | os.PathLike, eagerly: bool = False) -> None:
    """Runs `examples/<script>` with arguments; what it prints goes to stdout.

    Eagerly is faster where a step is not worth making a graph for it.
    """
    path = EXAMPLES / script
    words = [os.fspath(word) for word in (path, *arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "TFDS_DATA_DIR"}
    folders = [os.fspath(path.parent), *sys.path]
    before = set(sys.modules)
    try:
        with (
            functions(eagerly),
            mock.patch.object(sys, "argv", words),
            mock.patch.object(sys, "path", folders),
            mock.patch.dict(os.environ, environment, clear=True),
        ):
            runpy.run_path(words[0], run_name="__main__")
    finally:
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if EXAMPLES in Path(file).parents:
                del sys.modules[name]
