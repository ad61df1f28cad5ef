"""BYOT: what it computes, where rows leave, and what it deploys."""

from __future__ import annotations

import json
import pathlib

import keras
import numpy as np
import pytest
import tiny
from keras import layers

import keras_distill as kd
from keras_distill.selfdistill.multi_exit import ExitNetwork, bottleneck

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(rows=16, shape=(8, 8, 3), classes=3, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, *shape)).astype("float32")
    return x, generator.integers(0, classes, rows).astype("int32")


def net(softmax=False, dropout=0.0):
    """Three convolutions `block0` to `block2`, on grids of 8, 4 and 2."""
    x = inputs = keras.Input((8, 8, 3))
    for index in range(3):
        stride = 2 if index else 1
        x = layers.Conv2D(4 + index, 3, stride, "same", name=f"conv{index}")(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU(name=f"block{index}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dropout(dropout)(x) if dropout else x
    x = layers.Dense(3, name="classes")(x)
    x = layers.Activation("softmax")(x) if softmax else x
    return keras.Model(inputs, x, name="net")


def byot(model=None, exits=("block0", "block1"), **kwargs):
    return kd.BeYourOwnTeacher.from_model(model or net(), exits, **kwargs)


def compiled(distiller, loss=SPARSE, **kwargs):
    kwargs = {"run_eagerly": True} | kwargs
    optimizer = kwargs.pop("optimizer", None) or keras.optimizers.SGD(0.05)
    return distiller.compile(optimizer, loss, **kwargs)


def fit(distiller, x, y=None, **kwargs):
    kwargs = {"verbose": 0, "shuffle": False, "batch_size": 8} | kwargs
    return distiller.fit(x, y, **kwargs).history


def predict(distiller, x, **kwargs):
    return distiller.predict(x, **({"verbose": 0} | kwargs))


# -- golden values ------------------------------------------------------------------


def _linear(kernel, name):
    model = keras.Sequential(
        [
            keras.Input((kernel.shape[0],)),
            layers.Dense(kernel.shape[1], use_bias=False),
        ],
        name=name,
    )
    model.set_weights([kernel])
    return model


def test_golden_values_and_gradients():
    with np.load(GOLDEN / "byot_paper.npz") as file:
        golden = dict(file)
    hyper = json.loads(str(golden["meta"]))["hyperparameters"]
    # The file counts from the deepest exit, we from the shallowest.
    order = [3, 2, 1, 0]
    features = [golden[f"student_feature_{i}"].reshape(16, -1) for i in order]
    logits = [golden[f"student_logits_{i}"] for i in order]
    # Row b of the data is unit vector b: the kernels of the bottlenecks hold the
    # features, and those of the classifiers turn them into the file's logits.
    kernels = [
        np.linalg.pinv(f.astype("float64")) @ z
        for f, z in zip(features, logits, strict=True)
    ]
    identity = [
        keras.Sequential([keras.Input((16,)), layers.Activation("linear")])
        for _ in range(3)
    ]
    ends = [_linear(f, f"features_{i}") for i, f in enumerate(features)]
    classifiers = [_linear(k, f"classifier_{i}") for i, k in enumerate(kernels)]
    network = ExitNetwork([*identity, ends[3]], ends[:3], classifiers)
    distiller = kd.BeYourOwnTeacher(
        network,
        temperature=hyper["temperature"],
        alpha=hyper["alpha"],
        feature_weight=hyper["lambda_"],
    )
    compiled(distiller, optimizer=keras.optimizers.SGD(1.0))
    x = np.eye(16, dtype="float32")
    logs = fit(distiller, x, golden["labels"], batch_size=16)
    assert logs["loss"][0] == pytest.approx(float(golden["loss"]), rel=1e-5)
    for index, position in enumerate(order):
        value = float(golden["out_ce"][position])
        assert logs[f"exit_{index}_loss"][0] == pytest.approx(value, rel=1e-5)
    assert logs["soft_loss"][0] == pytest.approx(golden["out_kl_t2"].sum(), rel=1e-5)
    assert logs["feature_loss"][0] == pytest.approx(golden["out_l2"].sum(), rel=1e-5)
    for index, position in enumerate(order):
        d_logits = golden[f"grad_student_logits_{position}"]
        d_features = golden[f"grad_student_feature_{position}"].reshape(16, -1)
        expected = {
            ends[index]: d_features + d_logits @ kernels[index].T,
            classifiers[index]: features[index].T @ d_logits,
        }
        before = {ends[index]: features[index], classifiers[index]: kernels[index]}
        for model, gradient in expected.items():
            found = before[model] - model.get_weights()[0]
            error = np.linalg.norm(found - gradient)
            assert error <= 2e-3 * np.linalg.norm(gradient) + 1e-6, model.name


# -- training -----------------------------------------------------------------------


def test_logs_and_metrics():
    x, y = data()
    distiller = compiled(byot(alpha=0.25, feature_weight=0.5), metrics=["accuracy"])
    logs = fit(distiller, x, y, validation_data=(x, y))
    names = [f"exit_{i}_{kind}" for i in range(3) for kind in ("loss", "accuracy")]
    assert set(names) <= set(logs)
    assert {f"val_{name}" for name in names} <= set(logs)
    value = {name: values[0] for name, values in logs.items()}
    assert value["accuracy"] == pytest.approx(value["exit_2_accuracy"])
    total = value["exit_2_loss"]
    total += 0.75 * (value["exit_0_loss"] + value["exit_1_loss"])
    total += 0.25 * value["soft_loss"] + 0.5 * value["feature_loss"]
    assert value["loss"] == pytest.approx(total, rel=1e-5)
    for index in range(3):
        logits = np.asarray(distiller.deploy(index)(x))
        loss = float(SPARSE(y, logits))
        assert value[f"val_exit_{index}_loss"] == pytest.approx(loss, rel=1e-4)
        accuracy = np.mean(logits.argmax(-1) == y)
        assert value[f"val_exit_{index}_accuracy"] == pytest.approx(accuracy)


def test_the_deepest_exit_is_not_taught_by_the_others():
    x, y = data(8)
    distiller = compiled(byot(feature_weight=1.0), optimizer=keras.optimizers.SGD(1.0))
    distiller.term_weights["output"] = 0.0
    distiller.term_weights["exits"] = 0.0
    before = distiller.student.classifiers[-1].get_weights()
    last = distiller.student.trunk[-1].get_layer("conv2").get_weights()
    fit(distiller, x, y)
    after = distiller.student.classifiers[-1].get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    after = distiller.student.trunk[-1].get_layer("conv2").get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(last, after, strict=True))


def test_without_labels_the_deepest_exit_still_teaches():
    x, _ = data()
    logs = fit(compiled(byot()), x)
    assert "exit_0_loss" not in logs
    assert logs["soft_loss"][0] > 0


def test_dropout_does_not_blur_the_features_that_teach():
    distiller = byot(net(dropout=0.5))
    x, _ = data(4)
    features = distiller.student.everything(x, training=True)[1][-1]
    assert np.count_nonzero(np.asarray(features) == 0) < np.asarray(features).size / 4
    top = [layer.name for layer in distiller.student.classifiers[-1].layers]
    assert top[-1] == "classes"
    assert any(name.startswith("dropout") for name in top)


def test_probabilities_and_mixed_precision():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        distiller = byot(net(softmax=True))
        x, y = data()
        compiled(distiller, "sparse_categorical_crossentropy")
        logs = fit(distiller, x, y)
        assert np.isfinite(logs["loss"]).all()
        for index in range(3):
            p = predict(distiller, x, exit=index).astype("float32")
            np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-2)
        assert predict(distiller, x, threshold=0.5).shape == (16, 3)
    finally:
        keras.config.set_dtype_policy(before)


def test_jit_compile():
    x, y = data()
    results = []
    for options in ({"run_eagerly": True}, {"run_eagerly": False, "jit_compile": True}):
        keras.utils.set_random_seed(0)
        distiller = compiled(byot(exits=["block1"]), **options)
        results.append(fit(distiller, x, y)["loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_an_mlp_has_exits_too():
    x = inputs = keras.Input((6,))
    for index in range(2):
        x = layers.Dense(5, "relu", name=f"hidden{index}")(x)
    model = keras.Model(inputs, layers.Dense(3)(x))
    distiller = compiled(byot(model, ["hidden0"]))
    x, y = data(8, (6,))
    assert np.isfinite(fit(distiller, x, y)["loss"][0])
    kinds = [type(la).__name__ for la in distiller.student.bottlenecks[0].layers]
    assert kinds == ["InputLayer", "Dense", "BatchNormalization", "ReLU"]


def test_a_bottleneck_reaches_the_networks_last_grid():
    model = bottleneck((None, 9, 8, 6), (None, 4, 2, 20), 32, "b")
    convolutions = [la for la in model.layers if isinstance(la, layers.Conv2D)]
    assert [la.kernel_size for la in convolutions] == [(1, 1), (2, 4), (1, 1)]
    assert [la.strides for la in convolutions] == [(1, 1), (2, 4), (1, 1)]
    assert convolutions[-1].output.shape == (None, 4, 2, 32)
    assert model.output_shape == (None, 32)


# -- prediction ---------------------------------------------------------------------


def _sure(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True)).max(-1)


def test_rows_leave_at_the_first_exit_that_is_sure():
    x, _ = data(23)
    distiller = byot()
    for model in distiller.student.classifiers:  # so that rows differ in confidence
        model.set_weights([3 * w for w in model.get_weights()])
    exits = [predict(distiller, x, exit=index) for index in range(3)]
    np.testing.assert_allclose(exits[2], predict(distiller, x), rtol=1e-6)
    sure = np.stack([_sure(logits) for logits in exits[:2]])
    threshold = float(np.median(sure))
    chosen = np.where(sure[0] >= threshold, 0, np.where(sure[1] >= threshold, 1, 2))
    assert set(chosen) == {0, 1, 2}
    expected = np.stack(exits)[chosen, np.arange(23)]
    found = predict(distiller, x, threshold=threshold, batch_size=10)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(predict(distiller, x, threshold=0.0), exits[0], 1e-4)
    np.testing.assert_allclose(predict(distiller, x, threshold=1.0), exits[2], 1e-4)


def test_rows_that_left_are_not_computed_further():
    x, _ = data(12)
    distiller = byot()
    rows = []
    part = distiller._predictors.part

    def counting(index):
        model = part(index)

        class Counting:
            def predict_on_batch(self, x):
                rows.append((index, len(x)))
                return model.predict_on_batch(x)

        return Counting()

    distiller._predictors.part = counting
    predict(distiller, x, threshold=0.0, batch_size=8)
    assert rows == [(0, 8), (0, 4)]
    rows.clear()
    sure = _sure(predict(distiller, x, exit=0))
    predict(distiller, x, threshold=float(np.median(sure)))
    assert rows[:2] == [(0, 12), (1, int((sure < np.median(sure)).sum()))]


def test_predicting_from_a_data_set():
    import tensorflow as tf

    x, y = data(12)
    distiller = byot()
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(5)
    for choice in ({"exit": 1}, {"threshold": 0.4}):
        np.testing.assert_allclose(
            predict(distiller, batches, **choice),
            predict(distiller, x, **choice),
            rtol=1e-4,
            atol=1e-6,
        )


# -- saving and deploying -----------------------------------------------------------


def test_every_exit_is_deployed_as_a_plain_model(tmp_path):
    x, _ = data(4)
    model = net()
    distiller = byot(model)
    sizes = []
    for index in range(3):
        deployed = distiller.deploy(index)
        sizes.append(deployed.count_params())
        expected = np.asarray(distiller.student.everything(x, False)[0][index])
        np.testing.assert_allclose(np.asarray(deployed(x)), expected, 1e-5, 1e-6)
        deployed.save(tmp_path / "exit.keras")
        plain = tiny.loaded_without_package(tmp_path / "exit.keras")
        np.testing.assert_allclose(np.asarray(plain(x)), expected, 1e-5, 1e-6)
    assert sizes[2] == model.count_params()
    assert distiller.deploy(np.int64(2)).get_config() == model.get_config()
    found = np.asarray(distiller.deploy(2)(x))
    np.testing.assert_allclose(found, np.asarray(model(x)), rtol=1e-5)


def test_saved_and_loaded_it_goes_on_as_before(tmp_path):
    x, y = data()
    distiller = byot(temperature=2.0, alpha=0.3)
    compiled(distiller, optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    fit(distiller, x, y)
    distiller.term_weights["soft"] = 1.5  # more than alpha may be
    predict(distiller, x, threshold=0.5)  # leaves nothing that would be saved
    distiller.save(tmp_path / "byot.keras")
    loaded = keras.saving.load_model(tmp_path / "byot.keras")
    for index in range(3):
        expected = predict(distiller, x, exit=index)
        np.testing.assert_array_equal(predict(loaded, x, exit=index), expected)
        found = np.asarray(loaded.deploy(index)(x))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    loaded.run_eagerly = True
    assert loaded.term_weights["soft"].numpy() == 1.5
    first, second = fit(distiller, x, y), fit(loaded, x, y)
    assert first == second


def test_a_resnet_and_a_nested_backbone():
    """Exits in a nested model, after blocks with skip connections."""
    backbone = keras.applications.MobileNetV2(
        (32, 32, 3), alpha=0.35, weights=None, include_top=False
    )
    inputs = keras.Input((32, 32, 3))
    x = layers.GlobalAveragePooling2D()(backbone(inputs))
    model = keras.Model(inputs, layers.Dense(4, activation="softmax")(x))
    distiller = byot(model, [f"{backbone.name}/block_5_add"])
    x, _ = data(2, (32, 32, 3))
    found = np.asarray(distiller(x, training=False))
    expected = np.asarray(model(x, training=False))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert distiller.deploy(1).get_config() == model.get_config()


def _only_pooling():
    inputs = keras.Input((8, 8, 3))
    x = layers.ReLU(name="block0")(inputs)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: byot(exits=[]), "`exits` must be a list of at least one layer"),
        (lambda: byot(exits="block0"), "`exits` must be a list .* Received: 'block0'"),
        (
            lambda: byot(exits=["block1", "block0"]),
            "`exits`: 'block1' does not come before 'block0'",
        ),
        (lambda: byot(exits=["block0", "block0"]), "'block0' does not come before"),
        (lambda: byot(exits=["classes"]), "'classes' does not come before 'pool'"),
        (lambda: byot(exits=["block7"]), r"no layer 'block7'.*'block"),
        (lambda: byot(_only_pooling(), ["block0"]), "does not end in a classifier"),
        (lambda: byot(alpha=1.5), "`alpha` must be from 0 to 1. Received: 1.5"),
        (lambda: byot(temperature=-1), "`temperature` must be above 0"),
        (lambda: byot(feature_weight=-1), "`feature_weight` must be"),
        (lambda: byot().deploy(3), "index of an exit, 0 to 2. Received: 3"),
        (lambda: byot().predict(0, exit=-1), "index of an exit, 0 to 2. Received: -1"),
        (lambda: byot().predict(0, threshold=2), "`threshold` must be from 0 to 1"),
        (lambda: byot().predict(0, exit=0, threshold=0.5), "not both"),
        (lambda: ExitNetwork([net()], [], [net()]), "at least two parts of the trunk"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
