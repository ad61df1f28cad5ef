"""The losses import nothing but Keras: the golden vectors on JAX and PyTorch."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
from losses import golden

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_golden(backend, tmp_path):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    out = tmp_path / "golden.json"
    environment = {
        "KERAS_BACKEND": backend,
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
        # Every formula is compiled to run once: compile in a hurry.
        "XLA_FLAGS": "--xla_backend_optimization_level=0"
        " --xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, golden.__file__, "--quick", "--out", str(out)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["setting"]["backend"] == backend
    assert {row["method"] for row in report["methods"]} == set(golden.FORMULAS)
    wrong = [row for row in report["methods"] if not row["ok"]]
    assert not wrong
