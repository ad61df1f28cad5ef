"""The command that runs a search: progress, stopping and going on."""

from __future__ import annotations

import csv
import json

import keras
import pytest

from keras_distill import tune


@pytest.fixture
def small(monkeypatch):
    """Few rows and narrow networks."""
    load = tune.datasets.load

    def few(name):
        data = load(name)
        object.__setattr__(data, "train", tuple(part[:64] for part in data.train))
        return data

    monkeypatch.setattr(tune.datasets, "load", few)
    monkeypatch.setattr(tune, "_WIDTHS", {"teacher": (4,), "student": (2,)})


def test_a_search_that_was_stopped_goes_on(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["--epochs", "1", "--trials", "3", "--output", str(out)]
    begin = tune.Search.on_trial_begin

    def stop_in_the_second(self, trial):
        begin(self, trial)
        if len(self.oracle.end_order) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(tune.Search, "on_trial_begin", stop_in_the_second)
    assert tune.main(command) == 130
    printed = capsys.readouterr().out
    assert "1/3 trials" in printed
    assert "left  best val_accuracy" in printed
    assert "Add --resume" in printed
    first = json.loads((out / "search" / "trial_0" / "trial.json").read_text())
    teacher = (out / "teacher.keras").read_bytes()

    monkeypatch.setattr(tune.Search, "on_trial_begin", begin)
    assert tune.main([*command, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "1/3 trials" not in printed  # the first is not run again
    assert "3/3 trials  0:00 left" in printed
    again = json.loads((out / "search" / "trial_0" / "trial.json").read_text())
    assert again == first
    assert (out / "teacher.keras").read_bytes() == teacher
    with open(out / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["trial"] for row in rows) == ["0", "1", "2"]
    assert {row["status"] for row in rows} == {"COMPLETED"}
    assert (out / "trials.png").stat().st_size > 1000
    student = keras.saving.load_model(out / "student.keras")
    assert student.output_shape == (None, 10)


def test_folders_of_other_searches_are_refused(tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit) as stop:
            tune.main([*arguments, "--output", str(tmp_path)])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "there is no search in" in refused("--resume")
    settings = {"dataset": "digits", "epochs": 3, "seed": 0}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert "there is a search in" in refused()
    assert "has other settings" in refused("--resume", "--epochs", "5")
    assert "must be at least 1" in refused("--trials", "0")
