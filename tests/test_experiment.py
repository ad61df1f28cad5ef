"""What the reproductions share: tables of paired runs, and going on."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import scripts


@pytest.fixture
def module(monkeypatch):
    """A module of `examples/reproduce`, by its name."""
    monkeypatch.syspath_prepend(str(scripts.EXAMPLES / "reproduce"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if str(scripts.EXAMPLES) in file:
            del sys.modules[name]


def rows(**values):
    return [
        {"run": run, "seed": seed, "error": value}
        for run, found in values.items()
        for seed, value in enumerate(found)
    ]


def test_differences_are_paired_and_one_run_is_none(module):
    means = module("experiment").means
    table = means(
        rows(plain=[1.0, 2.0, 6.0], other=[2.0, 4.0, 9.0], one=[0.0]), "error", "plain"
    )
    assert table["plain"]["error"] == 3.0
    assert "difference" not in table["plain"]
    assert table["other"]["difference"] == 2.0
    # 1, 2, 3: deviation 1, and 4.303 is Student's quantile for 2 degrees of freedom.
    assert table["other"]["± (95 %)"] == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert "difference" not in table["one"]


def test_runs_go_on_and_are_not_lost(module, tmp_path):
    experiment = module("experiment")
    options = experiment.parser("A test.", "test", seeds=2)
    arguments = ["--out", str(tmp_path / "r.json"), "--runs", str(tmp_path / "runs")]
    chosen = options.parse_args(arguments)

    def made(summarize=lambda rows: {"count": len(rows)}, **setting):
        return experiment.Experiment(chosen, "test", "Test", setting, summarize)

    made(epochs=3).add("a", 0, [{"error": 1.0}])
    again = made(epochs=3)
    assert again.has("a", 0)
    assert not again.has("a", 1)
    with pytest.raises(ZeroDivisionError):
        made(lambda rows: 1 / 0, epochs=3).add("a", 1, [{"error": 2.0}])
    assert made(epochs=3).has("a", 1)
    with pytest.raises(SystemExit, match="another setting"):
        made(epochs=4)
    (tmp_path / "r.json").unlink()
    with pytest.raises(SystemExit, match="left behind"):
        made(epochs=4)
    made(epochs=3).add("a", 0, [{"error": 1.0}])
    assert json.loads((tmp_path / "r.json").read_text())["summary"] == {"count": 1}


def test_gaps_need_their_teacher(module):
    hinton = module("hinton_mnist")
    runs = [
        {"run": "labels", "seed": 0, "errors": 140},
        {"run": "soft", "seed": 0, "errors": 80},
    ]
    assert hinton.gaps(runs) == {}
    runs.append({"run": "teacher", "seed": 0, "errors": 60})
    assert hinton.gaps(runs)["soft"]["gap closed %"] == pytest.approx(75)
    runs[1][hinton.TAUGHT_BY] = 65  # it was trained anew
    assert hinton.gaps(runs)["soft"]["gap closed %"] == pytest.approx(80)


def test_a_teacher_that_is_gone_is_trained_anew(module, tmp_path):
    """As in a clone: the teacher's row is there, and its network is not."""
    hinton, fitnets = module("hinton_mnist"), module("fitnets_mnist")
    train, test = hinton.mnist(smoke=True)
    networks = hinton.Hinton(train, test, hinton.TRIAL, tmp_path)
    thin = fitnets.FitNets(*fitnets.mnist(smoke=True), 1, tmp_path)
    with scripts.functions(eagerly=True):
        (row,) = networks._distilled(0)
        thin.run("soft", 0)
    assert max(row["errors"], row[hinton.TAUGHT_BY]) <= len(test[1])
    kept = {path.name for path in tmp_path.glob("*.keras")}
    assert kept == {"teacher_0.keras", "teacher.keras"}


def test_the_weights_of_every_method_can_be_searched(module, tmp_path):
    methods = module("methods")
    import keras_tuner
    import numpy as np

    random = np.random.default_rng(0)
    data = {
        name: (random.random((16, 8, 8, 3), "float32"), np.arange(16) % 10)
        for name in ("teacher", "student", "validation", "test")
    }
    comparison = methods.Comparison(data, 1, tmp_path, (8, 8), 1)
    for name in ("boundaries (AB)", "overhaul (OFD)", "soft targets (KD)"):
        space = comparison._space(name, 0, 1)
        hp = keras_tuner.HyperParameters()
        hp.Choice("factor", methods.FACTORS, default=10.0)
        distiller = space.build(hp)
        weights = {k: float(v.numpy()) for k, v in distiller.term_weights.items()}
        assert max(weights.values()) > 0
    assert weights["soft"] == pytest.approx(9.0)


def test_gains_are_paired_with_what_they_should_improve_on(module):
    hinton = module("hinton_mnist")
    errors = {
        "labels": (140, 150),
        "soft": (80, 100),
        "2 x 30, labels": (500, 500),
        "2 x 300, labels": (200, 210),
        "2 x 300, T = 8": (150, 160),
    }
    gains = hinton.all_gains(
        [
            {"run": run, "seed": seed, "errors": count}
            for run, counts in errors.items()
            for seed, count in enumerate(counts)
        ]
    )
    assert set(gains) == {"soft", "2 x 300, T = 8"}
    assert gains["soft"]["over"] == "labels"
    assert gains["soft"]["difference"] == pytest.approx(0.55)
    assert gains["2 x 300, T = 8"]["± (95 %)"] == pytest.approx(0)
