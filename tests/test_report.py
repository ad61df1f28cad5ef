"""The comparison of models, and their export."""

from __future__ import annotations

import json
import os

import keras
import numpy as np
import pytest

from keras_distill import report


def _fixed(scores, width=1):
    """A model that hands on `scores[row]`; `width` only makes it larger."""
    scores = np.asarray(scores, "float32")
    inputs = keras.Input((len(scores),))
    wide = keras.layers.Dense(width, use_bias=False, name="wide")(inputs)
    table = keras.layers.Dense(scores.shape[1], use_bias=False, name="table")(inputs)
    zero = keras.layers.Dense(scores.shape[1], use_bias=False, name="zero")(wide)
    model = keras.Model(inputs, keras.layers.Add()([table, zero]))
    model.get_layer("table").set_weights([scores])
    model.get_layer("zero").set_weights([np.zeros((width, scores.shape[1]))])
    return model


def _chooses(classes, num_classes=3, **kwargs):
    return _fixed(np.eye(num_classes)[classes], **kwargs)


X = np.eye(8, dtype="float32")
Y = np.array([0, 1, 2, 0, 1, 2, 0, 1])
TEACHER = [0, 1, 2, 0, 1, 2, 0, 2]  # 7 of 8 are right
ALONE = [0, 1, 2, 1, 2, 0, 1, 2]  # 3 of 8
HELPED = [0, 1, 2, 0, 1, 0, 1, 2]  # 5 of 8


@pytest.fixture(scope="module")
def table():
    models = {
        "teacher": _chooses(TEACHER, width=500),
        "alone": [_chooses(ALONE), _chooses(TEACHER)],
        "helped": [_chooses(HELPED), _chooses(Y)],
    }
    return report.compare(models, (X, Y), repeats=3, verbose=False)


def test_accuracy_is_the_mean_over_seeds_with_its_spread(table):
    assert table["teacher"].accuracy == 7 / 8
    assert table["teacher"].accuracy_spread is None
    assert table["alone"].accuracy == (3 + 7) / 16
    assert table["alone"].accuracy_spread == pytest.approx(np.std([3, 7], ddof=1) / 8)


def test_agreement_is_the_share_of_rows_with_the_teachers_class(table):
    assert table["teacher"].agreement is None
    assert table["alone"].agreement == (4 + 8) / 16
    assert table["helped"].agreement == (6 + 7) / 16


def test_positions_without_a_label_are_padding():
    def tags(classes):  # two positions in each of two rows
        flat = _fixed(np.eye(3)[classes].reshape(2, 6))
        return keras.Model(flat.input, keras.layers.Reshape((2, 3))(flat.output))

    models = {"teacher": tags([[0, 1], [2, 0]]), "student": tags([[0, 2], [2, 1]])}
    data = np.eye(2, dtype="float32"), np.array([[0, 1], [1, -1]])
    found = report.compare(models, data, repeats=1, verbose=False)
    assert found["teacher"].accuracy == pytest.approx(2 / 3)
    assert found["student"].accuracy == pytest.approx(1 / 3)
    assert found["student"].agreement == pytest.approx(2 / 3)


def test_gap_closed_is_measured_from_student_to_teacher(table):
    assert table["teacher"].gap_closed is None
    assert table["alone"].gap_closed is None
    assert table["helped"].gap_closed == pytest.approx((13 - 10) / (14 - 10))


def test_size_and_time(table):
    teacher, student = table["teacher"], table["alone"]
    assert teacher.parameters == 8 * 500 + 8 * 3 + 500 * 3
    assert student.parameters == 8 + 8 * 3 + 3
    assert teacher.file_bytes - student.file_bytes > 4 * 5000
    assert 0 < student.latency < 1


def test_the_optimizer_does_not_count_for_the_size():
    plain, trained = _chooses(ALONE, width=500), _chooses(ALONE, width=500)
    trained.compile(optimizer="adam", loss="mse")
    trained.optimizer.build(trained.trainable_variables)
    models = {"plain": plain, "trained": trained}
    table = report.compare(models, (X, Y), repeats=1, verbose=False)
    assert abs(table["plain"].file_bytes - table["trained"].file_bytes) < 1000


def test_the_table_as_text_markdown_and_json(table):
    text = str(table).splitlines()
    assert len(text) == 5
    assert text[2].split()[:2] == ["teacher", "5,524"]
    assert "62.5 % ± 35.4" in text[3]
    assert text[4].endswith("75 %")
    lines = table.markdown().splitlines()
    assert [line.count("|") for line in lines] == [8] * 5
    assert lines[2].startswith("| teacher | 5,524 |")
    assert json.loads(json.dumps(table.as_dicts()))[0]["name"] == "teacher"


def test_the_table_is_printed(capsys):
    report.compare({"one": _chooses(ALONE)}, (X, Y), repeats=1)
    assert "37.5 %" in capsys.readouterr().out


def test_roles_can_be_named_and_one_teacher_per_seed():
    models = {
        "helped": [_chooses(HELPED), _chooses(ALONE)],
        "alone": [_chooses(ALONE), _chooses(ALONE)],
        "teacher": [_chooses(TEACHER), _chooses(ALONE)],
    }
    table = report.compare(
        models, (X, Y), teacher="teacher", student="alone", repeats=1, verbose=False
    )
    assert table["helped"].agreement == (6 + 8) / 16
    assert table["helped"].gap_closed == pytest.approx(0.5)
    assert table["alone"].gap_closed is None


def test_no_gap_is_reported_where_the_teacher_is_not_better():
    models = {"t": _chooses(ALONE), "s": _chooses(HELPED), "d": _chooses(TEACHER)}
    table = report.compare(models, (X, Y), repeats=1, verbose=False)
    assert table["d"].gap_closed is None


@pytest.mark.parametrize(
    "labels", [np.where(np.arange(8) < 4, Y, -1), np.eye(3)[Y], Y[:, None]]
)
def test_kinds_of_labels(labels):
    result = report.compare({"m": _chooses(HELPED)}, (X, labels), verbose=False)
    assert result["m"].accuracy == (1.0 if labels.min() < 0 else 5 / 8)


@pytest.mark.parametrize(
    ("models", "kwargs", "message"),
    [
        ({}, {}, "`models` is empty"),
        ({"a": []}, {}, r"`models\['a'\]` is an empty list"),
        ({"a": None, "b": None}, {"teacher": "c"}, "`teacher` must be one of a, b"),
        ({"a": None, "b": None}, {"student": "a"}, "must differ.*'a' for both"),
    ],
)
def test_what_cannot_be_compared_is_refused(models, kwargs, message):
    with pytest.raises(ValueError, match=message):
        report.compare(models, (X, Y), **kwargs)


def test_an_output_of_one_unit_is_refused():
    with pytest.raises(ValueError, match=r"`models\['m'\]`.*two classes.*\(8, 1\)"):
        report.compare({"m": _fixed(np.ones((8, 1)))}, (X, Y), repeats=1)


def test_other_numbers_of_teachers_are_refused():
    models = {"t": [_chooses(TEACHER)] * 2, "s": [_chooses(ALONE)] * 3}
    with pytest.raises(ValueError, match="2 teachers, 3 models for 's'"):
        report.compare(models, (X, Y), repeats=1)


def test_what_is_exported_predicts_the_same(tmp_path):
    import tensorflow as tf

    model = _chooses(HELPED)
    paths = report.export(model, os.fspath(tmp_path / "out"), "small")
    assert paths["keras"].endswith("small.keras")
    expected = model.predict(X, verbose=0)
    loaded = keras.saving.load_model(paths["keras"])
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), expected)
    served = tf.saved_model.load(paths["saved_model"])
    np.testing.assert_array_equal(served.serve(X), expected)
    assert sorted(os.listdir(tmp_path / "out")) == ["small", "small.keras"]


def test_an_export_replaces_only_what_it_wrote(tmp_path):
    model = _chooses(HELPED)
    paths = report.export(model, tmp_path)
    assert report.export(model, tmp_path) == paths
    assert sorted(os.listdir(tmp_path)) == ["student", "student.keras"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(ValueError, match="notes' exists and is no SavedModel"):
        report.export(model, tmp_path, "notes")
    assert os.listdir(tmp_path / "notes") == ["mine.txt"]
