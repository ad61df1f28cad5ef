"""compile: everything that Keras's accepts, and what fit makes of it."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd


def softmax_student():
    inputs = keras.Input((tiny.FEATURES,))
    x = keras.layers.Dense(8, "relu", name="hidden")(inputs)
    outputs = keras.layers.Dense(tiny.CLASSES, "softmax", name="probabilities")(x)
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize(
    ("loss", "one_hot"),
    [
        ("sparse_categorical_crossentropy", False),
        ("categorical_crossentropy", True),
        ("SparseCategoricalCrossentropy", False),
        ("mse", True),
        (keras.losses.sparse_categorical_crossentropy, False),
        (keras.losses.CategoricalFocalCrossentropy(), True),
        ("crossentropy", False),
        ("crossentropy", True),
        (["sparse_categorical_crossentropy"], False),
        ({"probabilities": "sparse_categorical_crossentropy"}, False),
    ],
)
def test_losses_and_metrics_in_any_spelling(loss, one_hot):
    x, y = tiny.data(8)
    truth = np.eye(3, dtype="float32")[y] if one_hot else y
    student = softmax_student()
    plain = keras.Model(student.inputs, student.outputs)
    plain.compile("sgd", loss, metrics=["accuracy"], run_eagerly=True)
    expected = plain.evaluate(x, truth, verbose=0, return_dict=True)
    distiller = tiny.compiled(tiny.distiller(student), loss, metrics=["accuracy"])
    logs = {k: v[0] for k, v in tiny.history(distiller, x, truth).items()}
    assert logs["hard_loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert logs["accuracy"] == pytest.approx(expected["accuracy"], rel=1e-5)


@pytest.mark.parametrize(
    "metrics",
    [
        ["accuracy"],
        [[keras.metrics.SparseCategoricalAccuracy("accuracy")]],
        {"logits": ["accuracy"]},
    ],
    ids=str,
)
def test_metrics_in_any_structure(metrics):
    distiller = tiny.compiled(tiny.distiller(), metrics=metrics)
    logs = tiny.history(distiller, *tiny.data(8))
    assert [name for name in logs if "accuracy" in name]


def test_weighted_metrics_are_weighted_and_metrics_are_not():
    x, y = tiny.data(8)
    weight = np.array([1, 0, 0, 0, 0, 0, 0, 0], "float32")
    distiller = tiny.distiller()
    tiny.compiled(distiller, metrics=["accuracy"], weighted_metrics=["accuracy"])
    right = np.argmax(distiller.student(x), -1) == y
    logs = tiny.history(distiller, x, y, sample_weight=weight)
    assert logs["weighted_accuracy"][0] == right[0]
    assert logs["accuracy"][0] == pytest.approx(np.mean(right))


def test_loss_weights_of_one_output():
    x, y = tiny.data(8)
    distiller = tiny.compiled(tiny.distiller(), [tiny.SPARSE], loss_weights=[3.0])
    expected = 3 * float(tiny.SPARSE(y, distiller.student(x)))
    logs = tiny.history(distiller, x, y)
    assert logs["hard_loss"][0] == pytest.approx(expected, rel=1e-5)


def test_without_a_loss_there_is_no_hard_term():
    x, y = tiny.data(8)
    distiller = tiny.compiled(tiny.distiller(), loss=None, metrics=["accuracy"])
    logs = tiny.history(distiller, x, y, validation_data=(x, y))
    # Nothing is minimised in evaluation, so there is no `val_loss`, not one of 0.
    assert set(logs) == {"loss", "soft_loss", "agreement", "accuracy", "val_accuracy"}
    assert logs["loss"][0] == pytest.approx(0.9 * logs["soft_loss"][0], rel=1e-5)


def weights_after(batch_size=4, rows=16, **compile_args):
    x, y = tiny.data(rows)
    keras.utils.set_random_seed(1)
    link = kd.Link("hidden", "hidden", kd.losses.Hint(), adapter="auto")
    distiller = tiny.distiller(links=[link])
    tiny.compiled(distiller, metrics=["accuracy"], **compile_args)
    logs = tiny.history(distiller, x, y, batch_size=batch_size)
    return tiny.values(distiller.trainable_variables), logs


@pytest.fixture(scope="module")
def reference():
    return weights_after()


@pytest.mark.parametrize(
    "options",
    [
        {"run_eagerly": False},
        {"run_eagerly": False, "steps_per_execution": 2},
        {"run_eagerly": False, "steps_per_execution": 3},
        {"run_eagerly": False, "jit_compile": True},
        {"run_eagerly": False, "jit_compile": False},
        {"run_eagerly": False, "jit_compile": True, "skip_nonfinite": True},
    ],
    ids=str,
)
def test_every_way_to_run_gives_the_same_weights(options, reference):
    weights, logs = weights_after(**options)
    for a, b in zip(weights, reference[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for name, value in reference[1].items():
        assert logs[name][0] == pytest.approx(value[0], rel=1e-4), name


def test_jit_compile_auto_is_off_without_a_gpu():
    distiller = tiny.distiller().compile("sgd", tiny.SPARSE)
    if not tf.config.list_physical_devices("GPU"):
        assert not distiller.jit_compile
    assert distiller.get_compile_config()["jit_compile"] == "auto"


def test_the_optimizer_is_built_by_compile():
    distiller = tiny.distiller().compile("adam", tiny.SPARSE)
    assert distiller.optimizer.built
    assert len(distiller.optimizer.variables) > 2 * 4


@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_clipping_is_the_optimizers(name):
    x, y = tiny.data(8)
    distiller = tiny.distiller(alpha=100.0)
    optimizer = keras.optimizers.SGD(1.0, **{name: 1e-3})
    tiny.compiled(distiller, optimizer=optimizer)
    before = tiny.values(distiller.trainable_variables)
    tiny.history(distiller, x, y)
    moved = [
        a - b
        for a, b in zip(tiny.values(distiller.trainable_variables), before, strict=True)
    ]
    size = {
        "clipnorm": max(np.linalg.norm(m) for m in moved),
        "global_clipnorm": np.sqrt(sum(np.sum(m**2) for m in moved)),
        "clipvalue": max(np.abs(m).max() for m in moved),
    }[name]
    assert size == pytest.approx(1e-3, rel=1e-2)


def test_gradient_accumulation():
    x, y = tiny.data(16)
    distiller = tiny.distiller()
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    tiny.compiled(distiller, optimizer=optimizer)
    start = distiller.student.get_weights()
    tiny.history(distiller, x, y, batch_size=8)
    once = distiller.student.get_weights()
    distiller.student.set_weights(start)
    tiny.compiled(distiller, optimizer=keras.optimizers.SGD(0.1))
    tiny.history(distiller, x, y, batch_size=16)
    for a, b in zip(once, distiller.student.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_train_on_batch_and_test_on_batch():
    x, y = tiny.data(8)
    distiller = tiny.compiled(tiny.distiller(), metrics=["accuracy"])
    logs = distiller.train_on_batch(x, y, return_dict=True)
    assert {"loss", "hard_loss", "soft_loss", "agreement", "accuracy"} == set(logs)
    logs = distiller.test_on_batch(x, y, return_dict=True)
    assert {"loss", "hard_loss", "accuracy"} == set(logs)


def test_validation_split_and_initial_epoch():
    x, y = tiny.data(16)
    distiller = tiny.compiled(tiny.distiller())
    logs = tiny.history(
        distiller, x, y, validation_split=0.25, epochs=3, initial_epoch=1
    )
    assert len(logs["val_loss"]) == 2
    assert distiller._epoch.numpy() == 2


@pytest.mark.parametrize("form", ["dataset", "generator", "PyDataset", "steps"])
def test_data_in_any_form(form):
    x, y = tiny.data(16)
    arrays = tiny.compiled(tiny.distiller(), optimizer=keras.optimizers.SGD(0.0))
    expected = tiny.history(arrays, x, y, batch_size=8)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            part = slice(8 * index, 8 * index + 8)
            return x[part], y[part]

    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    given, more = {
        "dataset": (dataset, {}),
        "generator": (((x[i : i + 8], y[i : i + 8]) for i in (0, 8)), {}),
        "PyDataset": (Batches(), {}),
        "steps": (dataset.repeat(), {"steps_per_epoch": 2}),
    }[form]
    logs = tiny.history(arrays, given, **more)
    for name, value in expected.items():
        assert logs[name][0] == pytest.approx(value[0], rel=1e-5), name
