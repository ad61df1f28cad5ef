"""Several outputs: matching, weights, labels, logs."""

from __future__ import annotations

from collections import OrderedDict

import keras
import numpy as np
import pytest
import tiny

import keras_distill as kd

SIZES = {"shape": 3, "color": 4}


def heads(sizes=SIZES, structure=dict, width=8):
    """One trunk with a Dense head per output, as a dict or a list."""
    inputs = keras.Input((tiny.FEATURES,))
    x = keras.layers.Dense(width, "relu", name="hidden")(inputs)
    outputs = {n: keras.layers.Dense(s, name=n)(x) for n, s in sizes.items()}
    return keras.Model(inputs, outputs if structure is dict else list(outputs.values()))


def data(rows=16):
    x, _ = tiny.data(rows)
    rng = np.random.default_rng(1)
    y = {n: rng.integers(0, s, rows).astype("int32") for n, s in SIZES.items()}
    return x, y


def packed(y, structure):
    return y if structure is dict else [y["shape"], y["color"]]


def frozen(student, teacher, loss, **kwargs):
    compile_args = kwargs.pop("compile_args", {})
    distiller = kd.Distiller(student, teacher, **kwargs)
    optimizer = keras.optimizers.SGD(0.0)
    return tiny.compiled(distiller, loss, optimizer, **compile_args)


def soft(distiller, x, name, weight=None):
    """The soft loss of one output."""
    own, known = (
        dict(zip(m.output_names, keras.tree.flatten(m(x)), strict=True))
        for m in (distiller.student, distiller.teacher.model)
    )
    return float(kd.losses.SoftTarget(4.0)(known[name], own[name], weight))


def hard(distiller, x, y, name):
    model = distiller.student
    own = dict(zip(model.output_names, keras.tree.flatten(model(x)), strict=True))
    return float(tiny.SPARSE(y[name], own[name]))


FORMS = [
    (structure, losses, True)
    for structure in (dict, list)
    for losses in ("one", "same structure", "dict")
]


@pytest.mark.parametrize(
    ("structure", "losses", "run_eagerly"), [*FORMS, (list, "dict", False)]
)
def test_losses_in_any_form(structure, losses, run_eagerly):
    x, y = data()
    loss = {
        "one": tiny.SPARSE,
        "same structure": packed(dict.fromkeys(SIZES, tiny.SPARSE), structure),
        "dict": dict.fromkeys(SIZES, tiny.SPARSE),
    }[losses]
    metrics = {"shape": ["accuracy"], "color": ["accuracy"]}
    distiller = frozen(
        heads(SIZES, structure),
        heads(SIZES, structure),
        loss,
        compile_args={"metrics": metrics, "run_eagerly": run_eagerly},
    )
    truth = packed(y, structure)
    logs = {k: v[0] for k, v in tiny.history(distiller, x, truth).items()}
    expected = sum(soft(distiller, x, name) for name in SIZES)
    assert logs["soft_loss"] == pytest.approx(expected, rel=1e-5)
    expected = sum(hard(distiller, x, y, name) for name in SIZES)
    assert logs["hard_loss"] == pytest.approx(expected, rel=1e-5)
    wanted = {"shape_agreement", "color_agreement", "shape_accuracy", "color_accuracy"}
    assert wanted <= set(logs)
    assert "agreement" not in logs
    found = distiller.evaluate(x, truth, verbose=0, return_dict=True)
    assert found["shape_accuracy"] == pytest.approx(logs["shape_accuracy"])


def test_outputs_are_matched_by_name():
    x, _ = data()
    teacher = heads({"other": 7, "color": 4})
    student = heads()
    distiller = frozen(student, teacher, None)
    logs = tiny.history(distiller, x)
    assert logs["soft_loss"][0] == pytest.approx(soft(distiller, x, "color"), rel=1e-5)
    assert "color_agreement" in logs
    assert "shape_agreement" not in logs


def test_one_output_each_always_match():
    student, teacher = tiny.mlp(), heads({"other": 3})
    distiller = frozen(student, teacher, None)
    assert "agreement" in tiny.history(distiller, tiny.data()[0])


@pytest.mark.parametrize("weights", [{"color": 3.0, "shape": 0.5}, [0.5, 3.0]])
def test_output_weights_by_name_or_in_order(weights):
    x, _ = data()
    distiller = frozen(
        heads(SIZES, list), heads(SIZES, list), None, output_weights=weights
    )
    assert distiller.output_names == ["shape", "color"]
    expected = 0.5 * soft(distiller, x, "shape") + 3 * soft(distiller, x, "color")
    logs = tiny.history(distiller, x)
    assert logs["soft_loss"][0] == pytest.approx(expected, rel=1e-5)


def test_an_output_without_weight_has_1():
    x, _ = data()
    distiller = frozen(heads(), heads(), None, output_weights={"color": 2.0})
    expected = soft(distiller, x, "shape") + 2 * soft(distiller, x, "color")
    logs = tiny.history(distiller, x)
    assert logs["soft_loss"][0] == pytest.approx(expected, rel=1e-5)


def test_loss_weights_and_losses_for_some_outputs():
    x, y = data()
    weights = {"shape": 2.0, "color": 0.5}
    loss = dict.fromkeys(SIZES, tiny.SPARSE)
    distiller = frozen(heads(), heads(), loss, compile_args={"loss_weights": weights})
    expected = sum(weights[n] * hard(distiller, x, y, n) for n in SIZES)
    logs = tiny.history(distiller, x, y)
    assert logs["hard_loss"][0] == pytest.approx(expected, rel=1e-5)


def test_sample_weights_by_output():
    x, y = data()
    weights = {
        "shape": np.linspace(0, 1, 16).astype("float32"),
        "color": np.linspace(2, 0, 16).astype("float32"),
    }
    loss = dict.fromkeys(SIZES, tiny.SPARSE)
    distiller = frozen(heads(), heads(), loss)
    logs = tiny.history(distiller, x, y, sample_weight=weights)
    expected = sum(soft(distiller, x, n, weights[n]) for n in SIZES)
    assert logs["soft_loss"][0] == pytest.approx(expected, rel=1e-5)
    own = distiller.student(x)
    expected = sum(float(tiny.SPARSE(y[n], own[n], weights[n])) for n in SIZES)
    assert logs["hard_loss"][0] == pytest.approx(expected, rel=1e-5)


def test_links_need_one_weight():
    x, y = data()
    weights = {n: np.ones(16, "float32") * i for i, n in enumerate(SIZES)}
    link = kd.Link("hidden", "hidden", "mse")
    loss = dict.fromkeys(SIZES, tiny.SPARSE)
    distiller = frozen(heads(), heads(), loss, links=[link])
    tiny.history(distiller, x, y, sample_weight=np.ones(16, "float32"))
    with pytest.raises(ValueError, match="Links need one weight per row"):
        tiny.history(distiller, x, y, sample_weight=weights)


def test_unlabelled_rows_per_output():
    x, y = data()
    some = {n: v.copy() for n, v in y.items()}
    some["shape"][:5] = -1
    loss = dict.fromkeys(SIZES, tiny.SPARSE)
    distiller = frozen(heads(), heads(), loss)
    own = distiller.student(x)
    expected = float(tiny.SPARSE(y["shape"][5:], own["shape"][5:]))
    expected += float(tiny.SPARSE(y["color"], own["color"]))
    logs = tiny.history(distiller, x, some)
    assert logs["hard_loss"][0] == pytest.approx(expected, rel=1e-5)
    total = sum(soft(distiller, x, name) for name in SIZES)
    assert logs["soft_loss"][0] == pytest.approx(total, rel=1e-5)


def test_a_distiller_with_several_outputs_saves(tmp_path):
    x, y = data()
    loss = dict.fromkeys(SIZES, "sparse_categorical_crossentropy")
    distiller = kd.Distiller(heads(), heads(), output_weights={"color": 2.0})
    tiny.compiled(distiller, loss)
    tiny.history(distiller, x, y)
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    for a, b in zip(
        keras.tree.flatten(distiller.predict(x, verbose=0)),
        keras.tree.flatten(loaded.predict(x, verbose=0)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    loaded.teacher = distiller.teacher
    tiny.history(loaded, x, y)


def test_outputs_in_a_dict_that_keeps_its_order():
    inputs = keras.Input((tiny.FEATURES,))
    outputs = OrderedDict(
        (name, keras.layers.Dense(tiny.CLASSES, name=name)(inputs)) for name in "za"
    )
    student = keras.Model(inputs, outputs)
    x, y = tiny.data()
    labels = {"z": y, "a": (y + 1) % tiny.CLASSES}
    distiller = kd.BaseDistiller(student)
    distiller.compile("sgd", tiny.SPARSE, run_eagerly=True)
    found = distiller.evaluate(x, labels, verbose=0, return_dict=True)
    expected = sum(float(tiny.SPARSE(labels[n], student(x)[n])) for n in "za")
    assert found["hard_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_head_that_is_called_twice_is_matched_by_place():
    def network():
        inputs = [keras.Input((tiny.FEATURES,)) for _ in range(2)]
        head = keras.layers.Dense(tiny.CLASSES, name="head")
        return keras.Model(inputs, [head(one) for one in inputs])

    student, teacher = network(), network()
    teacher.set_weights(student.get_weights())
    x, _ = tiny.data()
    distiller = tiny.compiled(kd.Distiller(student, teacher), loss=None)
    logs = tiny.history(distiller, (x, -x))
    assert logs["soft_loss"][0] == pytest.approx(0, abs=1e-6)
