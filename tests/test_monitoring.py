"""DistillationBoard: what it writes, read back from the event files."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
import types
import urllib.parse
import urllib.request

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

import keras_distill as kd
from keras_distill.monitoring import DistillationBoard, calibration
from keras_distill.monitoring.clock import StepClock


def written(folder):
    """Scalars by tag: step -> value; and all tags."""
    events = EventAccumulator(str(folder), {"tensors": 0, "images": 0})
    events.Reload()
    tags = events.Tags()["tensors"]
    values = {}
    for tag in tags:
        points = [
            (e.step, tf.make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)
        ]
        values[tag] = dict(points)
    return values, events


def hyperparameters(events):
    """What the page HParams shows, by name."""
    metadata = events.SummaryMetadata("_hparams_/session_start_info")
    data = plugin_data_pb2.HParamsPluginData()
    data.ParseFromString(metadata.plugin_data.content)
    return data.session_start_info.hparams


def fitted(board, x, y, epochs=2, distiller=None, callbacks=(), **compiled):
    distiller = distiller or tiny.distiller()
    tiny.compiled(distiller, **compiled)
    history = distiller.fit(
        x, y, epochs=epochs, batch_size=12, verbose=0, callbacks=[*callbacks, board]
    )
    return distiller, history.history


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def by_hand(probabilities, labels, bins):
    """ECE, one row at a time."""
    groups = {}
    for row, label in zip(probabilities, labels, strict=True):
        confidence = max(row)
        for b in range(bins):
            if b / bins < confidence <= (b + 1) / bins:
                right = list(row).index(confidence) == label
                groups.setdefault(b, []).append((confidence, right))
    total = 0.0
    for rows in groups.values():
        confidence = sum(c for c, _ in rows) / len(rows)
        accuracy = sum(r for _, r in rows) / len(rows)
        total += len(rows) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_is_that_of_a_calculation_by_hand(bins):
    generator = np.random.default_rng(0)
    p = np.exp(log_softmax(generator.normal(size=(200, 4)) * 2))
    y = generator.integers(0, 4, 200)
    found = calibration(p, y, bins)
    assert found.error == pytest.approx(by_hand(p, y, bins), rel=1e-9)
    assert found.rows.sum() == 200


def test_calibration_tells_confidence_and_accuracy_of_every_bin():
    p = [[0.9, 0.1], [0.7, 0.3], [0.65, 0.35], [0.5, 0.5]]
    found = calibration(p, [0, 1, 0, 1], bins=4)
    assert isinstance(found, kd.monitoring.Calibration)
    np.testing.assert_array_equal(found.rows, [0, 1, 2, 1])
    np.testing.assert_allclose(found.confidence, [np.nan, 0.5, 0.675, 0.9])
    np.testing.assert_allclose(found.accuracy, [np.nan, 0.0, 0.5, 1.0])
    assert found.error == pytest.approx((0.5 + 2 * 0.175 + 0.1) / 4)


def test_the_bins_are_those_of_scikit_learn():
    from sklearn.calibration import calibration_curve

    generator = np.random.default_rng(1)
    confidence = generator.uniform(0.5, 1, 300)
    p = np.stack([confidence, 1 - confidence], -1)
    y = (generator.uniform(size=300) > confidence).astype(int)
    found = calibration(p, y, 10)
    accuracy, mean = calibration_curve(y == 0, confidence, n_bins=10)
    filled = found.rows > 0
    np.testing.assert_allclose(found.accuracy[filled], accuracy)
    np.testing.assert_allclose(found.confidence[filled], mean)
    expected = np.sum(found.rows[filled] * abs(accuracy - mean)) / 300
    assert found.error == pytest.approx(expected)


def test_every_chart_of_a_run_is_right(tmp_path):
    x, y = tiny.data(30)
    board = DistillationBoard(tmp_path, (x, y), batch_size=16, hparams={"seed": 3})
    ramp = kd.schedules.Schedule("temperature", lambda epoch: 2.0 + epoch)
    distiller, logs = fitted(
        board, x, y, callbacks=[ramp], metrics=["accuracy"], log_gradient_share=1
    )
    values, events = written(tmp_path / "distillation")
    assert values["temperature"] == {0: 2.0, 1: 3.0}
    assert values["alpha"][1] == pytest.approx(0.1)
    assert values["beta"][1] == pytest.approx(0.9)
    assert values["learning_rate"][1] == pytest.approx(0.1)
    assert values["steps_per_second"][1] > 0
    assert 0 < values["teacher_time_share"][1] <= 1
    for term in ("hard", "soft"):
        share = values[f"gradient_share/{term}"][1]
        assert share == pytest.approx(logs[f"{term}_gradient_share"][1])

    student = log_softmax(np.asarray(distiller.student(x), "float64"))
    teacher = log_softmax(np.asarray(distiller.teacher.model(x), "float64"))
    near = {"rel": 1e-4, "abs": 1e-6}
    for name, log_p in (("student", student), ("teacher", teacher)):
        entropy = -np.mean(np.sum(np.exp(log_p) * log_p, -1))
        assert values[f"entropy/{name}"][1] == pytest.approx(entropy, **near)
        error = by_hand(np.exp(log_p), y, 15)
        assert values[f"ece/{name}"][1] == pytest.approx(error, **near)
    kl = np.mean(np.sum(np.exp(teacher) * (teacher - student), -1))
    assert values["kl"][1] == pytest.approx(kl, **near)
    same = np.mean(student.argmax(-1) == teacher.argmax(-1))
    assert values["agreement"][1] == pytest.approx(same)
    assert {f"class_gain/{c}" for c in range(3)} <= set(values)
    assert all(values[f"class_gain/{c}"][0] == 0 for c in range(3))
    width, height, png = values["reliability"][1][:3]
    image = tf.io.decode_png(png)
    assert image.shape[:2] == (int(height), int(width))
    assert np.ptp(image.numpy()) > 100

    layout = layout_pb2.Layout()
    layout.ParseFromString(values["custom_scalars__config__"][0].item())
    assert [category.title for category in layout.category][:1] == ["Knowledge"]
    shown = hyperparameters(events)
    assert shown["seed"].number_value == 3
    assert shown["optimizer"].string_value == "SGD"
    assert shown["beta"].number_value == pytest.approx(0.9)


def test_gain_is_over_the_baseline_and_rows_limits_what_is_looked_at(tmp_path):
    x, y = tiny.data(30)
    baseline = tiny.mlp()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(7)
    board = DistillationBoard(tmp_path, data, rows=20, baseline=baseline)
    distiller, _ = fitted(board, x, y, epochs=1)
    values, _ = written(tmp_path / "distillation")
    chosen = {
        name: np.asarray(model(x[:20])).argmax(-1)
        for name, model in (("before", baseline), ("after", distiller.student))
    }
    for c in range(3):
        of_class = y[:20] == c
        before, after = (
            np.mean(chosen[name][of_class] == c) for name in ("before", "after")
        )
        gain = values[f"class_gain/{c}"][0]
        assert gain == pytest.approx(after - before, abs=1e-6)


def test_rows_without_a_label_are_left_out_of_what_needs_one(tmp_path):
    x, y = tiny.data(20)
    y[::2] = -1
    distiller, _ = fitted(DistillationBoard(tmp_path, (x, y)), x, y, epochs=1)
    values, _ = written(tmp_path / "distillation")
    p = np.exp(log_softmax(np.asarray(distiller.student(x[1::2]), "float64")))
    assert values["ece/student"][0] == pytest.approx(by_hand(p, y[1::2], 15), rel=1e-4)
    log_p = log_softmax(np.asarray(distiller.student(x), "float64"))
    entropy = -np.mean(np.sum(np.exp(log_p) * log_p, -1))
    assert values["entropy/student"][0] == pytest.approx(entropy, rel=1e-4)


def test_attention_maps_are_images_side_by_side(tmp_path):
    x, y = tiny.images()
    distiller = kd.Distiller(tiny.cnn(), tiny.cnn(8))
    board = DistillationBoard(
        tmp_path, (x, y), attention=("block1", "block2"), images=2
    )
    fitted(board, x, y, epochs=1, distiller=distiller)
    values, _ = written(tmp_path / "distillation")
    image = tf.io.decode_png(values["attention"][0][2])
    assert image.shape[1] > image.shape[0]  # three columns, two rows


def test_attention_is_the_square_over_channels():
    from keras_distill.monitoring.figures import attention_map

    features = np.array([[[[3.0, 4.0], [0.0, 5.0]], [[1.0, 0.0], [0.0, 0.0]]]])
    np.testing.assert_allclose(attention_map(features)[0], [[1, 1], [0.04, 0]])


def test_gates_and_branches_of_one_are_shown(tmp_path):
    stem = keras.Sequential([keras.Input((tiny.FEATURES,)), keras.layers.Dense(4)])
    branches = [
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(tiny.CLASSES)])
        for _ in range(2)
    ]
    x, y = tiny.data(12)
    board = DistillationBoard(tmp_path, (x, y))
    one, logs = fitted(board, x, y, epochs=1, distiller=kd.OneEnsemble(stem, branches))
    values, _ = written(tmp_path / "distillation")
    weights = np.asarray(one.gate(one.stem(x)))
    for index in range(2):
        left, right, count = values[f"gates/branch_{index}"][0].T
        assert count.sum() == len(x)
        assert left[0] == pytest.approx(weights[:, index].min())
        assert right[-1] == pytest.approx(weights[:, index].max())
        gate, accuracy = f"gate_{index}", f"branch_{index}_accuracy"
        assert values[f"gate/{gate}"][0] == pytest.approx(logs[gate][0])
        assert values[f"branch/{accuracy}"][0] == pytest.approx(logs[accuracy][0])
    assert "entropy/student" in values
    assert "entropy/teacher" not in values


def test_the_clock_of_steps_leaves_the_first_one_out(monkeypatch):
    now = iter([100.0, 130.0, 131.0, 134.0, 200.0, 208.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = StepClock()
    for batch in (1, 3, 5):  # two steps in each execution
        clock.tick(batch)
    assert (clock.steps, clock.seconds) == (6, 1.0)
    clock.begin()
    clock.tick(3)
    assert (clock.steps, clock.seconds) == (4, 2.0)


def test_the_teacher_is_timed_on_the_rows_of_a_step(tmp_path):
    class Slow(kd.teachers.Model):
        def __call__(self, x, taps, temperature):
            rows.append(len(x))
            time.sleep(0.01)
            return super().__call__(x, taps, temperature)

    rows = []
    x, y = tiny.data(24)
    board = DistillationBoard(tmp_path, (x[:5], y[:5]))
    stop = kd.schedules.StopTeacher(1)
    fitted(
        board,
        x,
        y,
        distiller=tiny.distiller(known=Slow(tiny.teacher())),
        callbacks=[stop],
    )
    values, _ = written(tmp_path / "distillation")
    assert values["teacher_time_share"][0] > 0
    assert values["teacher_time_share"][1] == 0
    assert rows.count(12) == 2 + 4  # two steps; a first run and three that are timed
    assert set(rows) == {5, 12}


def test_the_folder_is_that_of_the_stock_callback(tmp_path):
    x, y = tiny.data(12)
    stock = keras.callbacks.TensorBoard(tmp_path)
    fitted(DistillationBoard(), x, y, epochs=1, callbacks=[stock])
    values, _ = written(tmp_path / "distillation")
    assert values["beta"][0] == pytest.approx(0.9)
    stocks, _ = written(tmp_path / "train")
    assert {"epoch_hard_loss", "epoch_soft_loss"} <= set(stocks)


def test_a_copy_shares_data_and_models():
    data = tf.data.Dataset.from_tensor_slices(tiny.data()).batch(8)
    board = DistillationBoard("logs", data, baseline=tiny.mlp())
    other = copy.deepcopy(board)
    assert other is not board
    assert other.validation_data is data
    assert other.baseline is board.baseline


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "model"}, "`baseline` has no effect without validation_data"),
        ({"attention": ("a", "b")}, "`attention` has no effect"),
        ({"bins": 0}, "`bins` must be at least 1"),
        ({"rows": 0}, "`rows` must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationBoard("logs", **arguments)


def test_without_a_folder_it_says_so():
    with pytest.raises(ValueError, match="give `log_dir`, or add"):
        fitted(DistillationBoard(), *tiny.data())


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "distillation").touch()
    seen = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(batch)
    )
    board = DistillationBoard(tmp_path / "logs")
    with pytest.raises(ValueError, match=r"distillation' cannot be written"):
        fitted(board, *tiny.data(), callbacks=[note])
    assert not seen


def test_a_log_dir_that_cannot_be_made_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`log_dir` cannot be written: .*file'"):
        DistillationBoard(tmp_path / "file" / "logs")
    DistillationBoard(tmp_path / "new" / "logs")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="may not be written to"):
        DistillationBoard(tmp_path)


def test_validation_data_that_cannot_be_used_fail_before_the_first_step(tmp_path):
    seen = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(batch)
    )
    x, y = tiny.data(12)
    empty = tf.data.Dataset.from_tensor_slices((x, y)).batch(4).take(0)
    with pytest.raises(ValueError, match="`validation_data` has no rows"):
        fitted(DistillationBoard(tmp_path, empty), x, y, callbacks=[note])
    narrow = DistillationBoard(tmp_path, (x[:, :2], y))
    with pytest.raises(ValueError, match="incompatible"):
        fitted(narrow, x, y, callbacks=[note])
    unlabelled = DistillationBoard(tmp_path, x, baseline=tiny.mlp())
    with pytest.raises(ValueError, match="`baseline` needs labels"):
        fitted(unlabelled, x, y, callbacks=[note])
    assert not seen


def test_a_plain_model_is_refused(tmp_path):
    model = tiny.mlp()
    model.compile("sgd", tiny.SPARSE)
    with pytest.raises(TypeError, match="needs a distiller"):
        model.fit(*tiny.data(), verbose=0, callbacks=[DistillationBoard(tmp_path)])


def test_a_cache_needs_the_live_teacher(tmp_path):
    x, y = tiny.data()
    rows = tf.data.Dataset.from_tensor_slices((x, y))
    known = tiny.teacher()
    cache = kd.teachers.Cache.build(known, rows, tmp_path / "cache")
    data = cache.attach(rows).batch(12)
    distiller = tiny.compiled(tiny.distiller(known=cache))
    with pytest.raises(ValueError, match="give DistillationBoard"):
        distiller.fit(data, verbose=0, callbacks=[DistillationBoard(tmp_path, (x, y))])
    board = DistillationBoard(tmp_path / "logs", (x, y), teacher=known)
    distiller.fit(data, verbose=0, callbacks=[board])
    values, _ = written(tmp_path / "logs" / "distillation")
    teacher = log_softmax(np.asarray(known(x), "float64"))
    entropy = -np.mean(np.sum(np.exp(teacher) * teacher, -1))
    assert values["entropy/teacher"][0] == pytest.approx(entropy, rel=1e-3, abs=1e-6)


def test_trials_with_an_own_folder_do_not_mix_and_show_what_was_searched(tmp_path):
    class OfTrial(keras.callbacks.Callback):  # as keras-tuner's own
        trial = types.SimpleNamespace(
            trial_id="07", hyperparameters=types.SimpleNamespace(values={"units": 5})
        )

    x, y = tiny.data(12)
    fitted(DistillationBoard(tmp_path), x, y, epochs=1, callbacks=[OfTrial()])
    _, events = written(tmp_path / "07" / "distillation")
    shown = hyperparameters(events)
    assert shown["units"].number_value == 5
    assert shown["beta"].number_value == pytest.approx(0.9)


def test_every_output_has_its_charts(tmp_path):
    def net(width):
        inputs = keras.Input((tiny.FEATURES,))
        hidden = keras.layers.Dense(width, "relu")(inputs)
        outputs = {
            name: keras.layers.Dense(classes, name=name)(hidden)
            for name, classes in (("kind", 3), ("tone", 2))
        }
        return keras.Model(inputs, outputs)

    x, kind = tiny.data(12)
    y = {"kind": kind, "tone": kind % 2}
    distiller = kd.Distiller(net(3), net(5))
    tiny.compiled(distiller, loss={"kind": tiny.SPARSE, "tone": tiny.SPARSE})
    board = DistillationBoard(tmp_path, (x, y))
    distiller.fit(x, y, verbose=0, callbacks=[board])
    values, _ = written(tmp_path / "distillation")
    for name in ("kind", "tone"):
        p = np.exp(log_softmax(np.asarray(distiller.student(x)[name], "float64")))
        error = by_hand(p, y[name], 15)
        assert values[f"ece/student/{name}"][0] == pytest.approx(error, rel=1e-4)
        assert f"agreement/{name}" in values


class Served:
    """A TensorBoard process, and what it answers."""

    def __init__(self, folder):
        command = [sys.executable, "-m", "tensorboard.main", "--port=0"]
        # What --load_fast would start instead need not be installed.
        command += [f"--logdir={folder}", "--load_fast=false"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self):
        for line in self.process.stderr:
            found = re.search(r"http://\S+", line)
            if found:
                self.address = found[0].rstrip("/")
                return self
        raise RuntimeError("TensorBoard did not start.")

    def __exit__(self, *error):
        self.process.terminate()
        self.process.communicate(timeout=30)

    def bytes_of(self, path, body=None, **query):
        url = f"{self.address}/data/plugin/{path}?{urllib.parse.urlencode(query)}"
        body = None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, body, kind if body else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path, body=None, **query):
        return json.loads(self.bytes_of(path, body, **query))

    def wait_for(self, runs):
        """Until it has read the folder: it begins to serve before."""
        for _ in range(600):
            if runs <= set(self.get("scalars/tags")):
                return
            time.sleep(0.05)
        raise RuntimeError(f"There are no {runs}.")


def test_tensorboard_serves_every_chart(tmp_path):
    x, y = tiny.images(12)
    stem = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()])
    branches = [
        keras.Sequential([keras.Input((192,)), keras.layers.Dense(tiny.CLASSES)])
        for _ in range(2)
    ]
    link = kd.Link("block1", "block1", "mse", adapter="auto")
    temperature = kd.LearnedTemperature()
    known = tiny.cnn(8)
    made = {
        "soft": kd.Distiller(tiny.cnn(), known, temperature=temperature, links=[link]),
        "one": kd.OneEnsemble(stem, branches),
    }
    for name, distiller in made.items():
        attention = ("block1", "block2") if name == "soft" else None
        board = DistillationBoard(validation_data=(x, y), attention=attention)
        stock = keras.callbacks.TensorBoard(tmp_path / name, write_graph=False)
        tiny.compiled(distiller, metrics=["accuracy"], log_gradient_share=1)
        distiller.fit(
            x, y, validation_data=(x, y), epochs=2, verbose=0, callbacks=[stock, board]
        )
    soft, one = (f"{name}/distillation" for name in made)

    with Served(tmp_path) as served:
        served.wait_for({soft, one, "soft/train", "soft/validation"})
        scalars = {run: set(tags) for run, tags in served.get("scalars/tags").items()}
        images = {run: set(tags) for run, tags in served.get("images/tags").items()}
        histograms = served.get("histograms/tags")
        page = served.get("custom_scalars/layout")
        points = served.get("scalars/scalars", run=soft, tag="temperature")
        gates = served.get("histograms/histograms", run=one, tag="gates/branch_0")
        shown = served.get("images/images", run=soft, tag="attention", sample=0)
        blob = urllib.parse.parse_qs(shown[-1]["query"])["blob_key"][0]
        png = served.bytes_of("images/individualImage", blob_key=blob)
        hparams = served.get("hparams/experiment", {"experimentName": ""})
        wanted = {
            "experimentName": "",
            "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"],
            "colParams": [
                {"metric": metric["name"]} for metric in hparams["metricInfos"]
            ],
            "startIndex": 0,
            "sliceSize": 10,
        }
        sessions = served.get("hparams/session_groups", wanted)["sessionGroups"]

    settings = {"temperature", "alpha", "beta", "weight/block1", "learning_rate"}
    knowledge = {
        f"{kind}/{who}" for kind in ("entropy", "ece") for who in ("student", "teacher")
    }
    gains = {f"class_gain/{c}" for c in range(3)}
    shares = {f"gradient_share/{term}" for term in ("hard", "soft", "block1")}
    time_tags = {"steps_per_second", "teacher_time_share"}
    expected = settings | knowledge | gains | shares | time_tags
    assert expected | {"agreement", "kl", "result/val_accuracy"} <= scalars[soft]
    assert {f"gate/gate_{i}" for i in range(2)} <= scalars[one]
    assert {f"branch/branch_{i}_accuracy" for i in range(2)} <= scalars[one]
    assert "branch/ensemble_accuracy" in scalars[one]
    assert {f"gates/branch_{i}" for i in range(2)} <= set(histograms[one])
    assert images[soft] >= {"attention", "reliability"}
    for run in ("soft/train", "soft/validation"):  # one chart: the same tags
        assert {"epoch_loss", "epoch_hard_loss", "epoch_accuracy"} <= scalars[run]
    assert "epoch_temperature" in scalars["soft/train"]

    assert [step for _, step, _ in points] == [0, 1]
    last = made["soft"].temperature.numpy()
    assert points[-1][2] == pytest.approx(last, rel=1e-6)
    assert len(gates) == 2
    assert tf.io.decode_png(png).shape[-1] == 3
    assert {p["name"] for p in hparams["hparamInfos"]} >= {"alpha", "beta", "optimizer"}
    metrics = [m["name"] for m in hparams["metricInfos"]]
    assert "result/val_accuracy" in {m["tag"] for m in metrics}
    found = [s["hparams"] for s in sessions]
    assert any(h.get("beta") == pytest.approx(0.9) for h in found)

    # All on one page: every scalar of the board is in a chart of the layout.
    patterns = [
        tag
        for category in page["category"]
        for chart in category["chart"]
        for tag in chart["multiline"]["tag"]
    ]
    for tag in scalars[soft] | scalars[one]:
        if not tag.startswith("result/") or tag == "result/val_hard_loss":
            assert any(re.search(pattern, tag) for pattern in patterns), tag
