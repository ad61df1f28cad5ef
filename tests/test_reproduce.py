"""Every reproduction runs, and writes its figures and a plot."""

from __future__ import annotations

import json

import pytest
import scripts

FOLDER = scripts.EXAMPLES / "reproduce"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.stem != "experiment")


@pytest.mark.parametrize("script", SCRIPTS)
def test_reproduction(script, tmp_path):
    out = tmp_path / "result.json"
    options = ["--smoke", "--out", out, "--runs", tmp_path / "runs"]
    scripts.run(f"reproduce/{script}", *options, eagerly=True)
    written = json.loads(out.read_text())
    assert {"title", "setting", "summary", "runs", "machine"} == set(written)
    assert all({"run", "seed"} <= set(row) for row in written["runs"])
    assert out.with_suffix(".png").stat().st_size > 5000
