"""Missing labels, class weights, sample weights, masks, positions."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd

CATEGORICAL = keras.losses.CategoricalCrossentropy(from_logits=True)


def frozen(student=None, known=None, loss=tiny.SPARSE, compile_args=None, **kwargs):
    """A distiller that logs, but does not move."""
    distiller = tiny.distiller(student, known, **kwargs)
    optimizer = keras.optimizers.SGD(0.0)
    return tiny.compiled(distiller, loss, optimizer, **(compile_args or {}))


def only(logs):
    return {name: numbers[0] for name, numbers in logs.items()}


# -- no labels at all ------------------------------------------------------------------


def sets_without_labels(x):
    data = tf.data.Dataset.from_tensor_slices(x).batch(8)
    return [
        data,
        data.map(lambda x: (x,)),
        tf.data.Dataset.zip((data,)),
    ]


@pytest.mark.parametrize("form", range(3))
def test_a_whole_fit_without_labels(form):
    x, y = tiny.data()
    distiller = frozen(compile_args={"metrics": ["accuracy"]})
    labelled = only(tiny.history(distiller, x, y, batch_size=8))
    logs = only(tiny.history(distiller, sets_without_labels(x)[form]))
    assert set(logs) == {"loss", "soft_loss", "agreement"}
    assert logs["soft_loss"] == pytest.approx(labelled["soft_loss"], rel=1e-5)
    assert logs["loss"] == pytest.approx(0.9 * logs["soft_loss"], rel=1e-5)


def test_arrays_and_pairs_without_labels():
    x, _ = tiny.data()
    distiller = frozen()
    expected = only(tiny.history(distiller, x))

    def batches():
        yield x, None

    assert only(tiny.history(distiller, batches())) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_labelled_and_unlabelled_fits_in_any_order(run_eagerly):
    x, y = tiny.data()
    distiller = frozen(compile_args={"run_eagerly": run_eagerly, "metrics": ["acc"]})
    assert "hard_loss" not in tiny.history(distiller, x)
    labelled = tiny.history(distiller, x, y, validation_data=(x, y))
    assert {"hard_loss", "acc", "val_hard_loss", "val_acc"} <= set(labelled)
    logs = tiny.history(distiller, x, validation_data=(x, y))
    assert "hard_loss" not in logs
    assert {"val_hard_loss", "val_acc"} <= set(logs)
    assert "hard_loss" in tiny.history(distiller, x, y)


def iou(name="iou"):
    """A metric that reads no masks."""
    return keras.metrics.MeanIoU(tiny.CLASSES, sparse_y_pred=False, name=name)


# -- some labels -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "run_eagerly"), [("flat", True), ("column", True), ("flat", False)]
)
def test_unlabelled_rows_leave_the_hard_mean_and_the_metrics(shape, run_eagerly):
    x, y = tiny.data(16)
    distiller = frozen(
        compile_args={
            "metrics": ["accuracy", iou()],
            "weighted_metrics": ["accuracy", iou(name="weighted_iou")],
            "run_eagerly": run_eagerly,
        }
    )
    some = y.copy()
    some[::3] = -1
    kept = some >= 0
    if shape == "column":
        some, y = some[:, None], y[:, None]
    logs = only(tiny.history(distiller, x, some, batch_size=16))
    alone = only(tiny.history(distiller, x[kept], y[kept], batch_size=16))
    every = only(tiny.history(distiller, x, y, batch_size=16))
    for name in ("hard_loss", "accuracy", "weighted_accuracy", "iou", "weighted_iou"):
        assert logs[name] == pytest.approx(alone[name], rel=1e-5), name
    for name in ("soft_loss", "agreement"):
        assert logs[name] == pytest.approx(every[name], rel=1e-5), name
    total = 0.1 * logs["hard_loss"] + 0.9 * logs["soft_loss"]
    assert logs["loss"] == pytest.approx(total, rel=1e-5)


def test_unlabelled_rows_do_not_weigh_in_the_epochs_mean():
    x, y = tiny.data(16)
    some = y.copy()
    some[:6] = -1  # 2 of 8 rows in the first batch, 8 of 8 in the second
    distiller = frozen(compile_args={"metrics": ["accuracy"]})
    logs = only(tiny.history(distiller, x, some, batch_size=8))
    alone = only(tiny.history(distiller, x[6:], y[6:], batch_size=16))
    for name in ("hard_loss", "accuracy"):
        assert logs[name] == pytest.approx(alone[name], rel=1e-5), name


def test_a_batch_without_any_label_has_no_say_in_hard_loss():
    x, y = tiny.data(16)
    some = y.copy()
    some[8:] = -1
    distiller = frozen(compile_args={"metrics": ["accuracy"]})
    logs = only(tiny.history(distiller, x, some, batch_size=8))
    alone = only(tiny.history(distiller, x[:8], y[:8], batch_size=8))
    for name in ("hard_loss", "accuracy"):
        assert logs[name] == pytest.approx(alone[name], rel=1e-5), name
    only_missing = only(tiny.history(distiller, x[8:], some[8:], batch_size=8))
    assert set(only_missing) == {"loss", "soft_loss", "agreement"}


def test_a_row_of_zeros_means_no_label_under_categorical_losses():
    x, y = tiny.data(16)
    one_hot = np.eye(3, dtype="float32")[y]
    one_hot[:5] = 0
    distiller = frozen(loss=CATEGORICAL, compile_args={"metrics": ["accuracy"]})
    logs = only(tiny.history(distiller, x, one_hot, batch_size=16))
    alone = only(tiny.history(distiller, x[5:], one_hot[5:], batch_size=16))
    for name in ("hard_loss", "accuracy"):
        assert logs[name] == pytest.approx(alone[name], rel=1e-5), name


def test_another_number_can_mean_no_label():
    x, y = tiny.data(16)
    some = y.copy()
    some[:5] = 255
    distiller = frozen(unlabelled=255)
    logs = only(tiny.history(distiller, x, some, batch_size=16))
    alone = only(tiny.history(frozen_like(distiller), x[5:], y[5:], batch_size=16))
    assert logs["hard_loss"] == pytest.approx(alone["hard_loss"], rel=1e-5)


def frozen_like(distiller):
    return frozen(distiller.student, distiller.teacher)


def test_none_switches_missing_labels_off():
    x, y = tiny.data(8)
    one_hot = np.eye(3, dtype="float32")[y]
    one_hot[:4] = 0
    distiller = frozen(loss=CATEGORICAL, unlabelled=None)
    logs = only(tiny.history(distiller, x, one_hot))
    expected = float(CATEGORICAL(one_hot, distiller.student(x)))  # zeros count
    assert logs["hard_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["mse", "hinge", "binary_crossentropy"])
def test_other_losses_know_no_missing_labels(loss):
    x, _ = tiny.data(8)
    y = np.zeros((8, 3), "float32")
    y[:4] = -1
    distiller = frozen(loss=loss)
    expected = float(np.mean(keras.losses.get(loss)(y, distiller.student(x))))
    logs = only(tiny.history(distiller, x, y))
    assert logs["hard_loss"] == pytest.approx(expected, rel=1e-5)


def test_unlabelled_validation_rows_are_left_out():
    x, y = tiny.data(16)
    some = y.copy()
    some[:6] = -1
    distiller = frozen(compile_args={"metrics": ["accuracy"]})
    logs = distiller.evaluate(x, some, verbose=0, return_dict=True)
    alone = distiller.evaluate(x[6:], y[6:], verbose=0, return_dict=True)
    for name in ("hard_loss", "accuracy"):
        assert logs[name] == pytest.approx(alone[name], rel=1e-5)


# -- class weights ---------------------------------------------------------------------


def per_row(distiller, x, y):
    """Hard and soft loss of every row."""
    z, known = distiller.student(x), distiller.teacher.model(x)
    hard = keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True)
    soft = kd.losses.SoftTarget(4.0, reduction=None)(known, z)
    return np.asarray(hard), np.asarray(soft)


@pytest.mark.parametrize(
    ("labels", "run_eagerly"), [("sparse", True), ("one-hot", True), ("sparse", False)]
)
def test_class_weights_weigh_hard_soft_and_links(labels, run_eagerly):
    x, y = tiny.data(16)
    table = {0: 0.0, 2: 5.0}  # class 1 keeps 1
    link = kd.Link("hidden", "hidden", "mse")
    distiller = frozen(
        known=tiny.teacher(8),
        links=[link],
        loss=tiny.SPARSE if labels == "sparse" else CATEGORICAL,
        compile_args={"run_eagerly": run_eagerly},
    )
    hard, soft = per_row(distiller, x, y)
    gap = distiller.student.get_layer("hidden")(x) - distiller.teacher.model.get_layer(
        "hidden"
    )(x)
    weight = np.array([0.0, 1.0, 5.0])[y]
    truth = y if labels == "sparse" else np.eye(3, dtype="float32")[y]
    logs = only(tiny.history(distiller, x, truth, class_weight=table, batch_size=16))
    assert logs["hard_loss"] == pytest.approx(np.mean(weight * hard), rel=1e-5)
    assert logs["soft_loss"] == pytest.approx(np.mean(weight * soft), rel=1e-5)
    squares = np.mean(np.asarray(gap) ** 2, -1)
    assert logs["hidden_loss"] == pytest.approx(np.mean(weight * squares), rel=1e-5)
    without = only(tiny.history(distiller, x, truth, batch_size=16))
    assert without["hard_loss"] == pytest.approx(np.mean(hard), rel=1e-5)


def test_unlabelled_rows_have_class_weight_1():
    x, y = tiny.data(16)
    some = y.copy()
    some[:6] = -1
    distiller = frozen()
    hard, soft = per_row(distiller, x, y)
    weight = np.where(some >= 0, np.array([3.0, 1.0, 0.5])[y], 1.0)
    logs = only(
        tiny.history(distiller, x, some, class_weight={0: 3, 2: 0.5}, batch_size=16)
    )
    assert logs["soft_loss"] == pytest.approx(np.mean(weight * soft), rel=1e-5)
    expected = np.mean((weight * hard)[6:])
    assert logs["hard_loss"] == pytest.approx(expected, rel=1e-5)


def test_class_weights_multiply_sample_weights():
    x, y = tiny.data(16)
    weight = np.linspace(0, 2, 16).astype("float32")
    distiller = frozen()
    hard, _ = per_row(distiller, x, y)
    logs = only(
        tiny.history(
            distiller, x, y, sample_weight=weight, class_weight={0: 3}, batch_size=16
        )
    )
    expected = np.mean(weight * np.array([3, 1, 1])[y] * hard)
    assert logs["hard_loss"] == pytest.approx(expected, rel=1e-5)


def test_validation_is_without_class_weights():
    x, y = tiny.data(16)
    distiller = frozen()
    logs = only(
        tiny.history(distiller, x, y, class_weight={0: 9}, validation_data=(x, y))
    )
    plain = only(tiny.history(distiller, x, y))
    assert logs["val_hard_loss"] == pytest.approx(plain["hard_loss"], rel=1e-5)


# -- sample weights and masks ----------------------------------------------------------


@pytest.mark.parametrize("shape", [(16,), (16, 1)])
def test_sample_weights_weigh_every_term(shape):
    x, y = tiny.data(16)
    weight = np.linspace(0, 2, 16).astype("float32")
    link = kd.Link("hidden", "hidden", kd.losses.Hint())
    distiller = frozen(known=tiny.teacher(8), links=[link])
    hard, soft = per_row(distiller, x, y)
    logs = only(
        tiny.history(
            distiller, x, y, sample_weight=weight.reshape(shape), batch_size=16
        )
    )
    assert logs["hard_loss"] == pytest.approx(np.mean(weight * hard), rel=1e-5)
    assert logs["soft_loss"] == pytest.approx(np.mean(weight * soft), rel=1e-5)
    plain = only(tiny.history(distiller, x, y, batch_size=16))
    zero = np.zeros(16, "float32")
    nothing = only(tiny.history(distiller, x, y, sample_weight=zero, batch_size=16))
    assert plain["hidden_loss"] > 0
    for name in ("loss", "hard_loss", "soft_loss", "hidden_loss"):
        assert nothing[name] == 0


TOKENS = 5


def tagger(mask=False, width=4):
    """One label per token."""
    inputs = keras.Input((TOKENS,), dtype="int32")
    x = keras.layers.Embedding(10, width, mask_zero=mask, name="embedding")(inputs)
    x = keras.layers.Dense(6, "relu", name="hidden")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))


def tokens(rows=TOKENS):
    """As many rows as tokens: an axis taken for another would not be noticed."""
    rng = np.random.default_rng(0)
    x = rng.integers(1, 10, (rows, TOKENS)).astype("int32")
    return x, rng.integers(0, 3, (rows, TOKENS)).astype("int32")


def per_token(distiller, x, y):
    z, known = distiller.student(x), distiller.teacher.model(x)
    hard = keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True)
    soft = kd.losses.SoftTarget(4.0).call(keras.ops.copy(known), keras.ops.copy(z))
    return np.asarray(hard), np.asarray(soft), np.asarray(z), np.asarray(known)


@pytest.mark.parametrize("form", ["none", "rows", "tokens"])
def test_positions_are_weighted_from_the_left(form):
    x, y = tokens()
    weight = {
        "none": None,
        "rows": np.arange(TOKENS, dtype="float32"),
        "tokens": np.random.default_rng(1).uniform(size=x.shape).astype("float32"),
    }[form]
    distiller = frozen(
        tagger(), tagger(), compile_args={"weighted_metrics": ["accuracy"]}
    )
    hard, soft, z, _ = per_token(distiller, x, y)
    full = {
        "none": np.ones(x.shape),
        "rows": np.ones(x.shape) * (np.arange(TOKENS)[:, None]),
        "tokens": weight,
    }[form]
    logs = only(tiny.history(distiller, x, y, sample_weight=weight, batch_size=TOKENS))
    assert logs["hard_loss"] == pytest.approx(np.mean(full * hard), rel=1e-5)
    assert logs["soft_loss"] == pytest.approx(np.mean(full * soft), rel=1e-5)
    right = z.argmax(-1) == y
    accuracy = (full * right).sum() / full.sum()
    assert logs["accuracy"] == pytest.approx(accuracy, rel=1e-5)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_masked_positions_count_for_nothing(run_eagerly):
    x, y = tokens()
    x[:, 3:] = 0
    x[0, 1:] = 0
    mask = x != 0
    distiller = frozen(
        tagger(True),
        tagger(True),
        compile_args={"metrics": ["accuracy"], "run_eagerly": run_eagerly},
    )
    hard, soft, z, known = per_token(distiller, x, y)
    logs = only(tiny.history(distiller, x, y, batch_size=TOKENS))
    assert logs["hard_loss"] == pytest.approx(hard[mask].mean(), rel=1e-5)
    assert logs["soft_loss"] == pytest.approx(soft[mask].mean(), rel=1e-5)
    same = (z.argmax(-1) == known.argmax(-1))[mask].mean()
    assert logs["agreement"] == pytest.approx(same)
    right = (z.argmax(-1) == y)[mask].mean()
    assert logs["accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("masked", [False, True])
def test_unlabelled_positions(masked):
    x, y = tokens()
    if masked:
        x[:, 3:] = 0
    some = y.copy()
    some[::2, ::2] = -1
    distiller = frozen(
        tagger(masked), tagger(masked), compile_args={"metrics": ["accuracy"]}
    )
    hard, soft, z, _ = per_token(distiller, x, y)
    mask = x != 0
    valid = mask & (some >= 0)
    logs = only(tiny.history(distiller, x, some, batch_size=TOKENS))
    assert logs["hard_loss"] == pytest.approx(hard[valid].mean(), rel=1e-5)
    assert logs["soft_loss"] == pytest.approx(soft[mask].mean(), rel=1e-5)
    right = (z.argmax(-1) == y)[valid].mean()
    assert logs["accuracy"] == pytest.approx(right)


def test_pixels():
    rows = 4
    inputs = keras.Input((rows, rows, 2))
    models = [
        keras.Model(inputs, keras.layers.Conv2D(3, 1, name="logits")(inputs))
        for _ in range(2)
    ]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, rows, rows, 2)).astype("float32")
    y = rng.integers(0, 3, (rows, rows, rows)).astype("int32")
    weight = np.array([0, 1, 2, 3], "float32")
    distiller = frozen(*models)
    hard, soft, *_ = per_token(distiller, x, y)
    logs = only(tiny.history(distiller, x, y, sample_weight=weight))
    wide = weight[:, None, None]
    assert logs["hard_loss"] == pytest.approx(np.mean(wide * hard), rel=1e-5)
    assert logs["soft_loss"] == pytest.approx(np.mean(wide * soft), rel=1e-5)


def test_with_several_outputs_a_batch_without_labels_has_no_say():
    inputs = keras.Input((tiny.FEATURES,))
    outputs = {n: keras.layers.Dense(tiny.CLASSES, name=n)(inputs) for n in "ab"}
    x, y = tiny.data(8)
    both = np.concatenate([x, x]), np.concatenate([y, np.full(8, -1)])
    distiller = kd.BaseDistiller(keras.Model(inputs, outputs))
    distiller.compile("sgd", dict.fromkeys("ab", tiny.SPARSE), run_eagerly=True)

    def measured(x, y):
        labels = {"a": y, "b": y}
        return distiller.evaluate(x, labels, batch_size=8, verbose=0, return_dict=True)

    expected = measured(x, y)["hard_loss"]
    assert measured(*both)["hard_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("place", ["soft", "link"])
def test_losses_with_labels_know_which_are_missing(place):
    x, y = tiny.data(8)
    missing = np.arange(8) % 2 == 0
    values = []
    for none in (-1, 255):
        keras.utils.set_random_seed(0)
        loss = kd.losses.DecoupledKD()
        arguments = {"soft_loss": loss}
        if place == "link":
            link = kd.Link("logits", "logits", loss, name="link")
            arguments = {"soft_loss": None, "links": [link]}
        distiller = tiny.distiller(tiny.linear(), unlabelled=none, **arguments)
        tiny.compiled(distiller, optimizer=keras.optimizers.SGD(0.0))
        logs = tiny.history(distiller, x, np.where(missing, none, y), batch_size=8)
        values.append(logs[f"{place}_loss"][0])
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_class_weights_of_a_fit_are_not_those_of_a_later_batch():
    x, y = tiny.data(8)
    distiller = frozen()
    plain = distiller.train_on_batch(x, y, return_dict=True)["hard_loss"]
    tiny.history(distiller, x, y, class_weight={0: 5.0, 1: 7.0})
    distiller.reset_metrics()
    again = distiller.train_on_batch(x, y, return_dict=True)["hard_loss"]
    assert again == pytest.approx(plain, rel=1e-6)
