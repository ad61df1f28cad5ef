"""The scripts in examples/ run, as a user would start them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import scripts

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_quickstart(tmp_path, capsys):
    scripts.run("quickstart.py", "--smoke", "--out", tmp_path)
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())
    names = ["teacher", "student alone", "student distilled"]
    assert [row["name"] for row in rows] == names
    assert all(name in printed for name in names)
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert len(list((tmp_path / "logs").rglob("events.*"))) == 6
    student = keras.saving.load_model(tmp_path / "student.keras")
    assert type(student).__module__.startswith("keras.")
    assert student.count_params() == rows[2]["parameters"]


@pytest.mark.parametrize("script", ["import_time.py", "neighbours.py", "step_time.py"])
def test_benchmark(script, tmp_path):
    out = tmp_path / "result.json"
    scripts.run(f"benchmarks/{script}", "--smoke", "--out", out)
    assert {"title", "setting", "machine"} <= set(json.loads(out.read_text()))


@pytest.fixture(scope="module")
def benchmarks():
    sys.path.insert(0, os.fspath(EXAMPLES / "benchmarks"))
    yield
    sys.path.remove(os.fspath(EXAMPLES / "benchmarks"))


def test_folded_batch_normalization_changes_nothing(benchmarks):
    from fold import fold_batch_normalization, foldable
    from models import resnet
    from step_time import randomize_statistics

    model = resnet(8, 4, seed=1)
    randomize_statistics(model, np.random.default_rng(0))
    folded = fold_batch_normalization(model)
    assert len(foldable(model)) == 9
    assert folded.count_params() < model.count_params()
    x = np.random.default_rng(1).random((4, 32, 32, 3), "float32")
    expected = model.predict(x, verbose=0)
    error = np.abs(folded.predict(x, verbose=0) - expected).max()
    assert error < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("depth", "width"), [(16, 2), (40, 2)])
def test_wide_resnet_has_the_papers_size(benchmarks, depth, width):
    from models import wide_resnet

    model = wide_resnet(depth, width)
    trainable = sum(np.prod(w.shape) for w in model.trainable_weights)
    assert trainable == {16: 691_674, 40: 2_243_546}[depth]
    assert model.get_layer("stage3").output.shape == (None, 8, 8, 64 * width)


def test_a_depth_that_does_not_fit_is_refused(benchmarks):
    from models import resnet, wide_resnet

    with pytest.raises(ValueError, match=r"6 n \+ 4.*Received: 20"):
        wide_resnet(20, 1)
    with pytest.raises(ValueError, match=r"6 n \+ 2.*Received: 16"):
        resnet(16)
