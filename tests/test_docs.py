"""The README and the documentation say what is so: their Python blocks run."""

from __future__ import annotations

import json
import re
import runpy
import types
from pathlib import Path

import pytest

import keras_distill

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [
    path
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("[!_]*/*.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
    if BLOCK.search(path.read_text())
]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_python_blocks_of_a_page_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    namespace = {"__name__": path.stem}
    for block in BLOCK.finditer(text):
        # Empty lines in front: an error names the line in the page.
        before = text.count("\n", 0, block.start(1))
        code = compile("\n" * before + block[1], str(path), "exec")
        exec(code, namespace)  # noqa: S102


def test_every_public_module_is_on_the_page_of_the_interface():
    page = (ROOT / "docs" / "api.md").read_text()
    listed = set(re.findall(r"^ *(keras_distill[\w.]*)$", page, re.MULTILINE))
    modules = {
        f"keras_distill.{name}"
        for name in keras_distill.__all__
        if isinstance(getattr(keras_distill, name), types.ModuleType)
    }
    assert modules <= listed


def test_the_readme_names_only_what_exists():
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"`kd\.(\w+)`", text)):
        assert name in keras_distill.__all__


def test_the_page_of_results_is_made_from_json(tmp_path):
    (tmp_path / "speed.json").write_text(
        '{"title": "Speed", "setting": {"batch": 64}, "note": "x",'
        ' "times": {"a": {"wall": 1.23456, "cpu": 2}, "b": {"wall": 3.0}},'
        ' "rows": [{"name": "t", "share": null}, {"name": "s", "share": 0.5}],'
        ' "machine": {"cores": 2}}'
    )
    page = runpy.run_path(str(ROOT / "docs" / "results.py"))["page"](tmp_path)
    assert "## Speed" in page
    assert "Setting: batch 64." in page
    assert "| a | 1.235 | 2 |" in page
    assert "| b | 3 |  |" in page
    assert "| t |  |\n| s | 0.5 |" in page
    assert "Measured on: cores 2." in page


def test_the_page_of_results_leaves_single_runs_in_the_file(tmp_path):
    (tmp_path / "gain.json").write_text(
        '{"title": "Gain", "setting": {"command": "python gain.py"},'
        ' "summary": {'
        ' "a": {"mean": 1.5, "seeds": 3, "difference": 0.5, "± (95 %)": 0.25},'
        ' "b": {"mean": 2.5, "seeds": 2, "difference": 1.5, "± (95 %)": 0.25}},'
        ' "runs": [{"run": "secret", "seed": 0}]}'
    )
    (tmp_path / "gain.png").touch()
    made = runpy.run_path(str(ROOT / "docs" / "results.py"))
    page = made["page"](tmp_path)
    assert "```sh\npython gain.py\n```" in page
    assert "![gain](results/gain.png)" in page
    assert "| a | 1.5 | 3 | 0.5 | 0.25 |" in page
    assert "secret" not in page
    guide = made["fill"]("x\n<!-- gains gain -->\nold\n<!-- end -->\ny", tmp_path)
    assert "| a | +0.50 | ±\N{NO-BREAK SPACE}0.25 | better |" in guide
    assert "| b |" not in guide  # of too few seeds
    assert "old" not in guide
    assert made["fill"](guide, tmp_path) == guide


def test_plans_are_made_from_json(tmp_path):
    made = runpy.run_path(str(ROOT / "docs" / "results.py"))
    found = (ROOT / "docs" / "results" / "cache_scale.json").read_text()
    (tmp_path / "sizes.json").write_text(found)
    guide = made["fill"]("<!-- plan sizes -->\n<!-- end -->", tmp_path)
    rows = [line for line in guide.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(json.loads(found)["plan on paper"])
    assert rows[2].startswith("| 1.3 | 1\N{NO-BREAK SPACE}000 | dense | ")
