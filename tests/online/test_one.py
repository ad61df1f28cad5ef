"""ONE: what it computes, what it logs, and what it deploys."""

from __future__ import annotations

import json
import pathlib

import keras
import numpy as np
import pytest
import tiny
from keras import layers

import keras_distill as kd
from keras_distill.online.one import ramp

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(rows=16, shape=(8, 8, 3), classes=3, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, *shape)).astype("float32")
    return x, generator.integers(0, classes, rows).astype("int32")


def net(head="logits", seed=None, dropout=0.0):
    """Two convolutions; the layer `shared` is where the tests cut."""
    kernel = {"kernel_initializer": keras.initializers.HeNormal(seed=seed)}
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, 2, name="shared", activation="relu", **kernel)(inputs)
    x = layers.Conv2D(6, 3, name="own", **kernel)(x)
    x = layers.BatchNormalization()(x)
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    x = layers.Dropout(dropout)(x) if dropout else x
    if head == "softmax":
        x = layers.Dense(3, activation="softmax", name="classes", dtype="float32")(x)
    elif head == "sigmoid":
        x = layers.Dense(1, activation="sigmoid", name="classes")(x)
    else:
        x = layers.Dense(3, name="classes", dtype="float32")(x)
    return keras.Model(inputs, x, name="net")


def one(model=None, **kwargs):
    kwargs = {"num_branches": 2} | kwargs
    return kd.OneEnsemble.from_model(model or net(), "shared", **kwargs)


def compiled(ensemble, loss=SPARSE, **kwargs):
    kwargs = {"run_eagerly": True} | kwargs
    optimizer = kwargs.pop("optimizer", None) or keras.optimizers.SGD(0.05)
    return ensemble.compile(optimizer, loss, **kwargs)


def fit(ensemble, x, y=None, **kwargs):
    kwargs = {"verbose": 0, "shuffle": False, "batch_size": 8} | kwargs
    return ensemble.fit(x, y, **kwargs).history


# -- golden values ------------------------------------------------------------------


def _linear(inputs, kernel, name):
    model = keras.Sequential(
        [keras.Input((inputs,)), layers.Dense(kernel.shape[-1], use_bias=False)],
        name=name,
    )
    model.set_weights([kernel])
    return model


@pytest.mark.parametrize("name", ["one", "one__edge_identical_branches"])
def test_golden_values_and_gradients(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    hyper = json.loads(str(golden["meta"]))["hyperparameters"]
    keys = [f"student_branch_logits_{i}" for i in range(hyper["branches"])]
    rows = len(golden["labels"])
    # Row b of the data is unit vector b, so that a kernel holds the batch's logits
    # and its gradient is the gradient of the logits.
    stem = keras.Sequential([keras.Input((rows,)), layers.Activation("linear")])
    branches = [_linear(rows, golden[key], key) for key in keys]
    gate = _linear(rows, golden["student_gate"], "gate")
    ensemble = kd.OneEnsemble(
        stem,
        branches,
        gate=gate,
        temperature=hyper["temperature"],
        ramp_up=int(hyper["rampup_epochs"]),
    )
    compiled(ensemble, optimizer=keras.optimizers.SGD(1.0))
    epoch = int(hyper["epoch"])
    logs = fit(
        ensemble,
        np.eye(rows, dtype="float32"),
        golden["labels"],
        batch_size=rows,
        initial_epoch=epoch,
        epochs=epoch + 1,
    )
    np.testing.assert_allclose(logs["loss"], golden["loss_exact_kl"], rtol=2e-6)
    np.testing.assert_allclose(logs["ensemble_loss"], golden["out_ce_ensemble"], 2e-6)
    for index, value in enumerate(golden["out_ce_branches"]):
        np.testing.assert_allclose(logs[f"branch_{index}_loss"], value, rtol=2e-6)
    for key, model in [*zip(keys, branches, strict=True), ("student_gate", gate)]:
        gradient = golden[key] - model.get_weights()[0]
        error = np.linalg.norm(gradient - golden[f"grad_{key}"])
        assert error <= 2e-3 * np.linalg.norm(golden[f"grad_{key}"]) + 1e-6, key


def test_golden_ramp_up():
    with np.load(GOLDEN / "one_rampup.npz") as file:
        length, epochs = float(file["rampup_length"]), file["epochs"]
        found = [float(ramp(epoch, length)) for epoch in epochs]
        np.testing.assert_allclose(found, file["weights"], rtol=1e-6)
    assert ramp(3, 0) == 1.0


# -- training -----------------------------------------------------------------------


def test_one_copied_branch_trains_exactly_as_the_original():
    x, y = data()
    model = net(seed=1)
    ensemble = one(
        model, num_branches=1, init="copy", ensemble_weight=0.0, soft_weight=0.0
    )
    options = {"run_eagerly": False, "jit_compile": False}
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    compiled(ensemble, optimizer=optimizer, **options)
    found = fit(ensemble, x, y, epochs=3)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), SPARSE, jit_compile=False)
    expected = model.fit(x, y, 8, 3, verbose=0, shuffle=False).history
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(found["branch_0_loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(
        np.asarray(ensemble.deploy(0)(x)), np.asarray(model(x)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("seed", [None, 3])
def test_fresh_branches_differ_and_copies_agree(seed):
    model = net(seed=seed)
    original = model.get_layer("own").get_weights()[0]
    kernels = [b.get_layer("own").get_weights()[0] for b in one(model).branches]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    kernels = [
        b.get_layer("own").get_weights()[0] for b in one(model, init="copy").branches
    ]
    assert all(np.array_equal(kernel, original) for kernel in kernels)


def test_the_given_model_is_not_changed():
    x, y = data()
    model = net()
    before, config = model.get_weights(), model.get_config()
    ensemble = one(model)
    stem = ensemble.stem.get_layer("shared").get_weights()
    fit(compiled(ensemble), x, y)
    assert model.get_config() == config
    after = model.get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    original = model.get_layer("shared").get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(stem, original, strict=True))
    trained = ensemble.stem.get_layer("shared").get_weights()[0]
    assert np.abs(trained - stem[0]).max() > 0


NAMES = ["ensemble_loss", "ensemble_accuracy"] + [
    f"{name}_{i}{suffix}"
    for i in range(2)
    for name, suffix in (("branch", "_loss"), ("branch", "_accuracy"), ("gate", ""))
]


def test_logs_and_metrics():
    x, y = data()
    ensemble = compiled(one(), metrics=["accuracy"])
    logs = fit(ensemble, x, y, validation_data=(x, y))
    assert set(NAMES) | {"soft_loss"} <= set(logs)
    assert {f"val_{name}" for name in NAMES} | {"val_soft_loss"} <= set(logs)
    assert logs["gate_0"][0] + logs["gate_1"][0] == pytest.approx(1)
    assert logs["accuracy"] == pytest.approx(logs["ensemble_accuracy"])
    assert logs["hard_loss"] == pytest.approx(logs["ensemble_loss"])
    values = {name: logs[name][0] for name in logs}
    total = sum(values[n] for n in ("branch_0_loss", "branch_1_loss", "ensemble_loss"))
    assert values["loss"] == pytest.approx(total + values["soft_loss"], rel=1e-5)
    # What the branches predict says what was logged.
    for index in range(2):
        logits = np.asarray(ensemble.deploy(index)(x))
        accuracy = np.mean(logits.argmax(-1) == y)
        assert values[f"val_branch_{index}_accuracy"] == pytest.approx(accuracy)
        loss = float(SPARSE(y, logits))
        assert values[f"val_branch_{index}_loss"] == pytest.approx(loss, rel=1e-5)


def test_weights_temperature_and_ramp_up_act_without_a_new_trace():
    x, y = data(8)
    ensemble = one(ramp_up=2)
    compiled(ensemble, optimizer=keras.optimizers.SGD(0.0), run_eagerly=False)
    ensemble.term_weights["branch"] = 0.0
    ensemble.term_weights["ensemble"] = 0.0
    logs = fit(ensemble, x, y, epochs=4)
    shares = np.array(logs["loss"]) / np.array(logs["soft_loss"])
    np.testing.assert_allclose(shares, np.exp([-5, -1.25, 0, 0]), rtol=1e-5)
    ensemble.term_weights["soft"] = 2.0
    ensemble.temperature = 1.0
    again = fit(ensemble, x, y, initial_epoch=2, epochs=3)
    assert again["loss"][0] == pytest.approx(2 * again["soft_loss"][0], rel=1e-5)
    assert again["soft_loss"][0] != pytest.approx(logs["soft_loss"][0], rel=1e-3)


def test_missing_labels_and_weights():
    x, y = data(8)
    ensemble = compiled(one(), optimizer=keras.optimizers.SGD(0.0))
    half = np.where(np.arange(8) < 4, y, -1)
    partly = fit(ensemble, x, half)
    for index in range(2):
        logits = np.asarray(
            ensemble.branches[index](ensemble.stem(x, training=True), training=True)
        )
        expected = float(SPARSE(y[:4], logits[:4]))
        assert partly[f"branch_{index}_loss"][0] == pytest.approx(expected, rel=1e-5)
        accuracy = np.mean(logits[:4].argmax(-1) == y[:4])
        assert partly[f"branch_{index}_accuracy"][0] == pytest.approx(accuracy)
    weighted = fit(ensemble, x, y, sample_weight=np.array([2.0] * 4 + [0.0] * 4))
    assert weighted["branch_0_loss"] == pytest.approx(partly["branch_0_loss"], rel=1e-5)
    table = {0: 3.0, 1: 1.0, 2: 1.0}
    by_class = fit(ensemble, x, y, class_weight=table)
    by_row = fit(ensemble, x, y, sample_weight=np.vectorize(table.get)(y))
    assert by_class["loss"] == pytest.approx(by_row["loss"], rel=1e-6)
    none = fit(ensemble, x)
    assert none["loss"] == pytest.approx(none["soft_loss"])
    assert "branch_0_loss" not in none


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_a_model_with_probabilities_keeps_them(head):
    x, y = data(8, classes=2)
    ensemble = one(net(head))
    loss = "binary_crossentropy" if head == "sigmoid" else None
    compiled(ensemble, loss or "sparse_categorical_crossentropy", metrics=["accuracy"])
    logs = fit(ensemble, x, y)
    assert logs["accuracy"] == pytest.approx(logs["ensemble_accuracy"])
    p = [np.asarray(ensemble.deploy(i)(x)) for i in range(2)]
    gate = np.asarray(ensemble.gate(ensemble.stem(x)))
    if head == "sigmoid":
        p = [np.concatenate([1 - q, q], -1) for q in p]
    mixed = sum(g[:, None] * np.log(q) for g, q in zip(gate.T, p, strict=True))
    expected = np.exp(mixed) / np.exp(mixed).sum(-1, keepdims=True)
    expected = expected[:, 1:] if head == "sigmoid" else expected
    np.testing.assert_allclose(np.asarray(ensemble(x)), expected, rtol=1e-5)
    plain = np.asarray(ensemble.deploy("ensemble")(x))
    np.testing.assert_allclose(plain, expected, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = net()
    finally:
        keras.config.set_dtype_policy(before)
    x, y = data()
    ensemble = compiled(one(model))
    scaled = isinstance(ensemble.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    logs = fit(ensemble, x, y)
    assert np.isfinite(logs["loss"]).all()
    branch = ensemble.deploy(0)
    assert branch.get_config() == model.get_config()
    shared = ensemble.stem(x)
    assert shared.dtype == policy.removeprefix("mixed_")
    np.testing.assert_allclose(
        np.asarray(branch(x)), np.asarray(ensemble.branches[0](shared)), rtol=1e-6
    )


def test_jit_compile():
    x, y = data()
    results = []
    for options in ({"run_eagerly": True}, {"run_eagerly": False, "jit_compile": True}):
        keras.utils.set_random_seed(0)
        ensemble = compiled(one(), **options)
        results.append(fit(ensemble, x, y)["loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


# -- parts given by the user --------------------------------------------------------


def _parts(classes=(3, 3)):
    stem = keras.Sequential([keras.Input((5,)), layers.Dense(4, "relu")], name="s")
    branches = [
        keras.Sequential([keras.Input((4,)), layers.Dense(count)], name="same")
        for count in classes
    ]
    return stem, branches


def test_parts_of_ones_own():
    stem, branches = _parts()
    ensemble = compiled(kd.OneEnsemble(stem, branches, name="mine"))
    x, y = data(8, (5,))
    fit(ensemble, x, y)
    assert ensemble.stem is stem
    assert ensemble.branches == branches
    deployed = ensemble.deploy(1)
    expected = np.asarray(branches[1](stem(x)))
    np.testing.assert_allclose(np.asarray(deployed(x)), expected, rtol=1e-6)
    expected = ensemble.predict(x, verbose=0)
    found = np.asarray(ensemble.deploy("ensemble")(x))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_default_gate():
    gate = one().gate
    kinds = [type(layer).__name__ for layer in gate.layers[1:]]
    assert kinds == [
        "GlobalAveragePooling2D",
        "Dense",
        "BatchNormalization",
        "ReLU",
        "Softmax",
    ]
    assert gate.layers[3].synchronized
    assert gate.count_params() == 4 * 2 + 2 + 4 * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: one(num_branches=0), "`num_branches` must be an integer from 1"),
        (lambda: one(num_branches=1.5), "`num_branches` must be .* Received: 1.5"),
        (lambda: one(init="same"), "`init` must be 'fresh' or 'copy'. .*'same'"),
        (lambda: one(temperature=0), "`temperature` must be above 0"),
        (lambda: one(ramp_up=-1), "`ramp_up` must be"),
        (lambda: one(soft_weight=-1), "must be finite and at least 0"),
        (lambda: one(gate=layers.Flatten()), r"`gate` must give .*\(batch, 2\)"),
        (lambda: kd.OneEnsemble(_parts()[0], []), "at least one model"),
        (lambda: kd.OneEnsemble(*_parts((3, 4))), r"same classes.*\[\(3,\), \(4,\)\]"),
        (
            lambda: kd.OneEnsemble(_parts()[0], _parts()[1][:1] * 2),
            "the same model twice",
        ),
        (
            lambda: kd.OneEnsemble.from_model(net(), "shard", 2),
            r"no layer 'shard'.*\['shared'",
        ),
        (lambda: one().deploy("best"), "needs accuracies of a validation"),
        (lambda: one().deploy(2), "index of a branch, 0 to 1. Received: 2"),
        (lambda: one().deploy(-1), "index of a branch, 0 to 1. Received: -1"),
        (lambda: one().deploy("first"), "Received: 'first'"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_kinds():
    with pytest.raises(TypeError, match="must be Keras models"):
        kd.OneEnsemble("stem", _parts()[1])
    with pytest.raises(TypeError, match="`gate` must be a keras.Layer"):
        kd.OneEnsemble(*_parts(), gate=3)


# -- saving and deploying -----------------------------------------------------------


def test_saved_and_loaded_it_goes_on_as_before(tmp_path):
    x, y = data()
    ensemble = one(net(seed=4), ramp_up=5, temperature=2.0)
    compiled(ensemble, optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    fit(ensemble, x, y, validation_data=(x, y))
    ensemble.save(tmp_path / "one.keras")
    loaded = keras.saving.load_model(tmp_path / "one.keras")
    for which in (0, 1, "best", "ensemble"):
        expected = np.asarray(ensemble.deploy(which)(x))
        np.testing.assert_array_equal(np.asarray(loaded.deploy(which)(x)), expected)
    np.testing.assert_array_equal(np.asarray(loaded(x)), np.asarray(ensemble(x)))
    loaded.run_eagerly = True
    first = fit(ensemble, x, y, initial_epoch=1, epochs=3)
    second = fit(loaded, x, y, initial_epoch=1, epochs=3)
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first)


def test_best_is_the_branch_with_the_highest_last_accuracy():
    x, y = data(8)
    ensemble = compiled(one(), optimizer=keras.optimizers.SGD(0.0))
    wrong = ensemble.branches[0].get_layer("classes")
    right = ensemble.branches[1].get_layer("classes")
    for layer, winner in ((wrong, 0), (right, 1)):
        layer.set_weights([np.zeros((6, 3)), np.eye(3)[winner]])
    for label in (1, 0):
        labels = np.full(8, label)
        fit(ensemble, x, y, validation_data=(x, labels))
        # Another evaluation, of test data perhaps, decides nothing.
        ensemble.evaluate(x, 1 - labels, verbose=0)
        best = ensemble.deploy("best")
        assert np.argmax(best.get_layer("classes").get_weights()[1]) == label


def _resnet():
    def block(x, width, stride, name):
        y = layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        y = layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(y))
        if stride > 1:
            x = layers.Conv2D(width, 1, stride)(x)
        return layers.ReLU(name=name)(layers.Add()([x, y]))

    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(8, 3, 2, padding="same")(inputs)
    x = block(block(x, 8, 1, "stage1"), 16, 2, "stage2")
    x = layers.GlobalAveragePooling2D()(block(x, 32, 2, "stage3"))
    return keras.Model(inputs, layers.Dense(10)(x), name="resnet")


def _mobilenet(**kwargs):
    return keras.applications.MobileNetV2(
        (32, 32, 3), alpha=0.35, weights=None, **kwargs
    )


def _nested():
    inputs = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 127.5, -1)(inputs)
    x = _mobilenet(include_top=False)(x, training=False)
    head = [layers.GlobalAveragePooling2D(), layers.Dense(10, activation="softmax")]
    return keras.Model(inputs, keras.Sequential(head, name="head")(x), name="nested")


def _sequential():
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(8, 3, 4, activation="relu", name="stem"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(10),
        ],
        name="sequential",
    )


MODELS = {
    "resnet": (_resnet, "stage2"),
    "efficientnet": (
        lambda: keras.applications.EfficientNetV2B0(
            weights=None, input_shape=(32, 32, 3), classes=10
        ),
        "block5e_add",
    ),
    "nested": (_nested, "mobilenetv2_0.35_32/block_12_add"),
    "sequential": (_sequential, "stem"),
}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """For every kind of model a branch and the ensemble, saved, with predictions."""
    folder = tmp_path_factory.mktemp("deployed")
    x = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    np.save(folder / "x.npy", x)
    found = {}
    for name, (make, split_at) in MODELS.items():
        keras.utils.set_random_seed(0)
        model = make()
        if name == "nested":
            split_at = f"{model.layers[2].name}/block_12_add"
        ensemble = kd.OneEnsemble.from_model(model, split_at, num_branches=2)
        branch = ensemble.deploy(1)
        shared = ensemble.stem(x, training=False)
        expected = np.asarray(ensemble.branches[1](shared, training=False))
        branch.save(folder / f"{name}-branch.keras")
        np.save(folder / f"{name}-branch.npy", expected)
        if name in ("resnet", "nested"):  # logits and probabilities
            ensemble.deploy("ensemble").save(folder / f"{name}-ensemble.keras")
            np.save(folder / f"{name}-ensemble.npy", np.asarray(ensemble(x)))
        found[name] = (model, branch, expected, x)
    return folder, found


@pytest.mark.parametrize("name", MODELS)
def test_a_branch_is_the_original_in_everything_but_its_weights(deployed, name):
    model, branch, expected, x = deployed[1][name]
    assert type(branch) is type(model)
    assert branch.get_config() == model.get_config()
    assert branch.count_params() == model.count_params()
    assert [la.name for la in branch.layers] == [la.name for la in model.layers]
    found = np.asarray(branch(x, training=False))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_what_is_deployed_loads_without_this_package(deployed):
    folder = deployed[0]
    x = np.load(folder / "x.npy")
    files = sorted(folder.glob("*.keras"))
    branches = {f"{name}-branch" for name in MODELS}
    ensembles = {"resnet-ensemble", "nested-ensemble"}
    assert {path.stem for path in files} == branches | ensembles
    for path in files:
        model = tiny.loaded_without_package(path)
        found = np.asarray(model(x, training=False))
        expected = np.load(path.with_suffix(".npy"))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_skip_across_the_cut_is_refused_by_name():
    with pytest.raises(ValueError, match="'block_5_project_BN'|'block_4_add'"):
        kd.OneEnsemble.from_model(_mobilenet(classes=10), "block_5_expand")
