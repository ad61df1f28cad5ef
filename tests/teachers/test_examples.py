"""The examples about what teacher and student see."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("low_resolution.py", ["teacher", "alone", "distilled, three times"]),
        ("mixed_labels.py", ["teacher", "alone", "distilled, all images"]),
    ],
)
def test_smoke(script, names):
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, "--smoke"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for name in names:
        assert re.search(rf"^{name} +\d+\.\d %", result.stdout, re.MULTILINE), name
