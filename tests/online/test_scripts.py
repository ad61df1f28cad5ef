"""The examples of learning without a strong teacher run, as a user would start them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "models"), [("mutual", 8), ("born_again", 3), ("poor_teacher", 5)]
)
def test_example(script, models, tmp_path):
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{script}.py", "--smoke"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(re.findall(r"^.+ \d+\.\d %$", result.stdout, re.MULTILINE)) == models
