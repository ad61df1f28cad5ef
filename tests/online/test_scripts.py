"""The examples of learning without a strong teacher run, as a user would start them."""

from __future__ import annotations

import re

import pytest
import scripts


@pytest.mark.parametrize(
    ("script", "models"), [("mutual", 8), ("born_again", 3), ("poor_teacher", 5)]
)
def test_example(script, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scripts.run(f"{script}.py", "--smoke")
    lines = re.findall(r"^.+ \d+\.\d %$", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) == models
