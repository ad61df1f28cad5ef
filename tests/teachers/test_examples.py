"""The examples about what teacher and student see."""

from __future__ import annotations

import re

import pytest
import scripts


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("low_resolution.py", ["teacher", "alone", "distilled, three times"]),
        ("mixed_labels.py", ["teacher", "alone", "distilled, all images"]),
    ],
)
def test_smoke(script, names, capsys):
    scripts.run(script, "--smoke")
    printed = capsys.readouterr().out
    for name in names:
        assert re.search(rf"^{name} +\d+\.\d %", printed, re.MULTILINE), name
