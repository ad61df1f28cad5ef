"""Distiller: exact steps, invariants, live numbers, logs."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import ops

import keras_distill as kd


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def forward(x, weights):
    """Hidden features (before and after ReLU) and logits of `tiny.mlp`."""
    hidden_kernel, hidden_bias, kernel, bias = weights
    before = x @ hidden_kernel + hidden_bias
    hidden = np.maximum(before, 0)
    return before, hidden, hidden @ kernel + bias


def hand_written_step(x, y, student, teacher, rate, temperature, alpha, beta, link):
    """Weights after one step of SGD, and the terms, in numpy and float64."""
    weights = [w.astype("float64") for w in student]
    before, hidden, z = forward(x, weights)
    _, known, t = forward(x, [w.astype("float64") for w in teacher])
    rows = len(x)
    log_p, log_q = log_softmax(t / temperature), log_softmax(z / temperature)
    soft = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    hard = -log_softmax(z)[np.arange(rows), y].mean()
    hint = ((hidden - known) ** 2).mean()
    one_hot = np.eye(z.shape[-1])[y]
    d_z = alpha * (np.exp(log_softmax(z)) - one_hot) / rows
    d_z += beta * temperature * (np.exp(log_q) - np.exp(log_p)) / rows
    d_hidden = d_z @ weights[2].T + link * 2 * (hidden - known) / hidden.size
    d_before = d_hidden * (before > 0)
    gradients = [x.T @ d_before, d_before.sum(0), hidden.T @ d_z, d_z.sum(0)]
    terms = {"hard_loss": hard, "soft_loss": soft, "hidden_loss": hint}
    new = [w - rate * g for w, g in zip(weights, gradients, strict=True)]
    return new, terms


@pytest.mark.parametrize("link", [0.0, 5.0])
def test_one_step_of_sgd_is_the_formula(link):
    x, y = tiny.data(16)
    student, teacher = tiny.mlp(8), tiny.teacher(8)
    expected, terms = hand_written_step(
        x,
        y,
        tiny.values(student.weights),
        tiny.values(teacher.weights),
        rate=0.3,
        temperature=3.0,
        alpha=0.4,
        beta=0.7,
        link=link,
    )
    links = [kd.Link("hidden", "hidden", "mse", weight=link)] if link else []
    distiller = kd.Distiller(
        student, teacher, temperature=3.0, alpha=0.4, beta=0.7, links=links
    )
    tiny.compiled(distiller, optimizer=keras.optimizers.SGD(0.3))
    logs = {k: v[0] for k, v in tiny.history(distiller, x, y, batch_size=16).items()}
    for new, reference in zip(tiny.values(student.weights), expected, strict=True):
        np.testing.assert_allclose(new, reference, rtol=1e-4, atol=2e-6)
    total = 0.4 * terms["hard_loss"] + 0.7 * terms["soft_loss"]
    total += link * terms["hidden_loss"]
    assert logs["loss"] == pytest.approx(total, rel=1e-5)
    for name in ("hard_loss", "soft_loss", *(["hidden_loss"] if link else [])):
        assert logs[name] == pytest.approx(terms[name], rel=1e-5)


def test_the_logs_are_these_and_no_others():
    x, y = tiny.data()
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    distiller = tiny.compiled(tiny.distiller(links=[link]), metrics=["accuracy"])
    logs = tiny.history(distiller, x, y, validation_data=(x, y))
    training = {
        "loss",
        "hard_loss",
        "soft_loss",
        "hidden_loss",
        "agreement",
        "accuracy",
    }
    assert set(logs) == training | {"val_loss", "val_hard_loss", "val_accuracy"}
    student, teacher = distiller.student(x), distiller.teacher.model(x)
    assert 0 <= logs["agreement"][0] <= 1
    again = tiny.compiled(distiller, optimizer=keras.optimizers.SGD(0.0))
    agreement = tiny.history(again, x, y)["agreement"][0]
    share = np.mean(np.argmax(student, -1) == np.argmax(teacher, -1))
    assert agreement == pytest.approx(share)


def test_the_mean_of_an_epoch_weights_batches_by_their_rows():
    x, y = tiny.data(10)
    distiller = tiny.compiled(tiny.distiller(), optimizer=keras.optimizers.SGD(0.0))
    in_one = tiny.history(distiller, x, y, batch_size=10)
    ragged = tiny.history(distiller, x, y, batch_size=8)
    for name in in_one:
        assert ragged[name][0] == pytest.approx(in_one[name][0], rel=1e-5), name


# -- what must not change -------------------------------------------------------------


def with_statistics(width=6):
    layers = [
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dropout(0.3, seed=3),
    ]
    return tiny.mlp(width, layers=layers)


def test_the_teacher_stays_as_it_was_to_the_last_bit():
    x, y = tiny.data()
    teacher = with_statistics()
    before = tiny.values(teacher.variables)
    links = [kd.Link("hidden", "norm", "mse", adapter="auto")]
    distiller = kd.Distiller(with_statistics(4), teacher, links=links)
    tiny.compiled(distiller, run_eagerly=False)
    tiny.history(distiller, x, y, epochs=2, batch_size=8)
    assert tiny.same(tiny.values(teacher.variables), before)
    assert teacher.trainable
    assert all(layer.trainable for layer in teacher.layers)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_evaluate_and_predict_change_nothing(run_eagerly):
    x, y = tiny.data()
    links = [kd.Link("hidden", "hidden", "mse", adapter="auto")]
    distiller = tiny.distiller(with_statistics(), with_statistics(8), links=links)
    tiny.compiled(distiller, run_eagerly=run_eagerly)
    kept = [
        *distiller.weights,
        *distiller.student.variables,
        *distiller.optimizer.variables,
        *distiller.teacher.model.variables,
    ]
    before = tiny.values(kept)
    distiller.evaluate(x, y, verbose=0)
    distiller.predict(x, verbose=0)
    assert tiny.same(tiny.values(kept), before)


def test_evaluate_is_the_compiled_loss_of_the_student_alone():
    x, y = tiny.data()
    student = tiny.mlp(kernel_regularizer=keras.regularizers.L2(0.1))
    distiller = tiny.compiled(tiny.distiller(student, alpha=0.25))
    logs = distiller.evaluate(x, y, verbose=0, return_dict=True)
    hard = float(tiny.SPARSE(y, student(x)))
    assert set(logs) == {"loss", "hard_loss"}
    assert logs["hard_loss"] == pytest.approx(hard, rel=1e-5)
    assert logs["loss"] == pytest.approx(hard + float(sum(student.losses)), rel=1e-5)


def test_predict_is_the_student():
    x, _ = tiny.data()
    distiller = tiny.compiled(tiny.distiller())
    direct = distiller.student.predict(x, verbose=0)
    np.testing.assert_array_equal(distiller.predict(x, verbose=0), direct)
    np.testing.assert_array_equal(distiller(x), distiller.student(x))


# -- each network once -----------------------------------------------------------------


def counting():
    return tiny.Counting(name="counting")


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_each_network_runs_once_per_step(run_eagerly):
    x, y = tiny.data(16)
    of_student, of_teacher = counting(), counting()
    student = tiny.mlp(layers=[of_student])
    teacher = tiny.mlp(12, layers=[of_teacher])
    links = [
        kd.Link("hidden", "hidden", "mse", adapter="auto"),
        kd.Link("counting", "counting", "mse", adapter="auto"),
    ]
    distiller = kd.Distiller(student, teacher, links=links)
    tiny.compiled(distiller, run_eagerly=run_eagerly, metrics=["accuracy"])
    del of_student.runs[:], of_teacher.runs[:]
    tiny.history(distiller, x, y, batch_size=8)
    assert list(of_student.runs) == [True, True]
    assert list(of_teacher.runs) == [False, False]
    del of_student.runs[:], of_teacher.runs[:]
    distiller.evaluate(x, y, batch_size=8, verbose=0)
    distiller.predict(x, batch_size=8, verbose=0)
    assert list(of_student.runs) == [False] * 4
    assert list(of_teacher.runs) == []


def test_the_teacher_is_not_run_while_no_weight_needs_it():
    x, y = tiny.data(16)
    of_teacher = counting()
    teacher = tiny.mlp(12, layers=[of_teacher])
    link = kd.Link("hidden", "hidden", "mse", adapter="auto", weight=0.0)
    distiller = tiny.distiller(known=teacher, beta=0.0, links=[link])
    tiny.compiled(distiller, run_eagerly=False)
    del of_teacher.runs[:]
    logs = tiny.history(distiller, x, y, batch_size=8)
    assert list(of_teacher.runs) == []
    assert set(logs) == {"loss", "hard_loss"}
    distiller.term_weights["hidden"] = 1.0
    logs = tiny.history(distiller, x, y, batch_size=8)
    assert len(of_teacher.runs) == 2
    assert set(logs) >= {"loss", "hard_loss", "soft_loss", "hidden_loss"}


def test_statistics_move_once_per_step():
    x, y = tiny.data(16)
    student = with_statistics()
    hidden = student.get_layer("hidden")(x)
    norm = student.get_layer("norm")
    mean = norm.moving_mean.numpy()
    expected = norm.momentum * mean + (1 - norm.momentum) * np.mean(hidden, 0)
    links = [kd.Link("norm", "hidden", "mse", adapter="auto")]
    distiller = tiny.compiled(tiny.distiller(student, links=links))
    tiny.history(distiller, x, y, batch_size=16)
    np.testing.assert_allclose(norm.moving_mean.numpy(), expected, rtol=1e-5, atol=1e-7)


# -- regularisers ----------------------------------------------------------------------


def test_regularisers_and_added_losses_of_the_student_count():
    x, y = tiny.data(16)
    plain = tiny.compiled(tiny.distiller(tiny.mlp()))
    student = tiny.mlp(
        kernel_regularizer=keras.regularizers.L2(0.5),
        activity_regularizer=keras.regularizers.L1(0.01),
    )
    student.set_weights(plain.student.get_weights())
    regularized = tiny.compiled(tiny.distiller(student))
    kernel = student.get_layer("hidden").kernel.numpy()
    hidden = np.asarray(student.get_layer("hidden")(x))
    extra = 0.5 * np.sum(kernel**2) + 0.01 * np.abs(hidden).sum() / len(x)
    logs = [tiny.history(d, x, y, batch_size=16) for d in (plain, regularized)]
    assert logs[1]["loss"][0] - logs[0]["loss"][0] == pytest.approx(extra, rel=1e-4)
    assert not np.allclose(student.get_layer("hidden").kernel, plain.student.weights[0])


def test_regularisers_of_adapters_count():
    x, y = tiny.data(16)
    adapter = keras.layers.Dense(12, kernel_regularizer=keras.regularizers.L2(1.0))
    link = kd.Link("hidden", "hidden", "mse", adapter=adapter, weight=0.0)
    distiller = tiny.compiled(tiny.distiller(links=[link], alpha=0.0, beta=0.0))
    norm = float(np.sum(adapter.kernel.numpy() ** 2))
    logs = tiny.history(distiller, x, y, batch_size=16)
    assert logs["loss"][0] == pytest.approx(norm, rel=1e-5)
    assert float(np.sum(adapter.kernel.numpy() ** 2)) < norm


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_an_evaluation_knows_nothing_of_the_adapters_losses(run_eagerly):
    x, y = tiny.data(16)
    adapter = keras.layers.Dense(12, activity_regularizer="l2", kernel_regularizer="l2")
    link = kd.Link("hidden", "hidden", "mse", adapter=adapter)
    distiller = tiny.distiller(links=[link])
    tiny.compiled(distiller, run_eagerly=run_eagerly)
    logs = tiny.history(distiller, x, y, batch_size=16, validation_data=(x, y))
    assert logs["val_loss"] == logs["val_hard_loss"]


# -- live numbers ----------------------------------------------------------------------


def test_temperature_and_weights_take_effect_without_retracing():
    x, y = tiny.data(8)
    traces = []

    class Traced(keras.layers.Layer):
        def call(self, inputs):
            if not tf.executing_eagerly():
                traces.append(1)
            return inputs

    link = kd.Link("hidden", "hidden", "mse", adapter="auto", weight=2.0)
    distiller = tiny.distiller(tiny.mlp(layers=[Traced()]), links=[link])
    optimizer = keras.optimizers.SGD(0.0)
    tiny.compiled(distiller, run_eagerly=False, optimizer=optimizer)

    def logs():
        return {k: v[0] for k, v in tiny.history(distiller, x, y).items()}

    def expected(now):
        weights = distiller.term_weights
        return sum(
            weights[name].numpy() * now[f"{name}_loss"]
            for name in ("hard", "soft", "hidden")
        )

    first = logs()
    traced = len(traces)
    assert traced > 0
    assert first["loss"] == pytest.approx(expected(first), rel=1e-5)
    distiller.temperature = 2.0
    distiller.alpha = 0.6
    distiller.beta = 0.3
    distiller.term_weights["hidden"] = 7.0
    second = logs()
    assert second["loss"] == pytest.approx(expected(second), rel=1e-5)
    soft = kd.losses.SoftTarget(2.0)(distiller.teacher.model(x), distiller.student(x))
    assert second["soft_loss"] == pytest.approx(float(soft), rel=1e-5)
    assert second["soft_loss"] != pytest.approx(first["soft_loss"], rel=1e-2)
    assert len(traces) == traced


def test_live_numbers_are_variables_behind_properties():
    distiller = tiny.distiller(temperature=3.0, alpha=0.2, beta=0.5)
    for name, value in (("temperature", 3.0), ("alpha", 0.2), ("beta", 0.5)):
        variable = getattr(distiller, name)
        assert variable.dtype == "float32"
        assert not variable.trainable
        assert variable.numpy() == pytest.approx(value)
        setattr(distiller, name, 1.5)
        assert getattr(distiller, name) is variable
        assert variable.numpy() == 1.5
    weights = distiller.term_weights
    assert list(weights) == ["hard", "soft"]
    assert len(weights) == 2
    assert weights["hard"] is distiller.alpha
    assert repr(weights) == "TermWeights({'hard': 1.5, 'soft': 1.5})"
    with pytest.raises(
        KeyError, match=r"There is no term 'x'. Terms: \['hard', 'soft'\]"
    ):
        weights["x"] = 1.0
    with pytest.raises(TypeError, match="Set its weight to 0"):
        del weights["hard"]


def test_loading_weights_restores_the_live_numbers(tmp_path):
    distiller = tiny.distiller(temperature=3.0)
    distiller.save_weights(tmp_path / "d.weights.h5")
    distiller.temperature = 9.0
    distiller.alpha = 0.0
    distiller.load_weights(tmp_path / "d.weights.h5")
    assert distiller.temperature.numpy() == 3.0
    assert distiller.alpha.numpy() == pytest.approx(0.1)


def test_a_soft_loss_is_copied_and_its_temperature_lives():
    x, y = tiny.data(8)
    loss = kd.losses.SoftTarget(2.0)
    distiller = tiny.compiled(tiny.distiller(soft_loss=loss))
    assert distiller.soft_loss is not loss
    assert distiller.temperature.numpy() == 2.0
    distiller.temperature = 5.0
    assert loss.temperature == 2.0
    before = distiller.teacher.model(x), distiller.student(x)
    logs = tiny.history(distiller, x, y)
    expected = float(kd.losses.SoftTarget(5.0)(*before))
    assert logs["soft_loss"][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_without_a_soft_loss_only_links_need_the_teacher(run_eagerly):
    x, y = tiny.data(8)
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    distiller = tiny.distiller(soft_loss=None, links=[link])
    tiny.compiled(distiller, run_eagerly=run_eagerly)
    assert set(tiny.history(distiller, x, y)) == {"loss", "hard_loss", "hidden_loss"}
    with pytest.raises(AttributeError, match="no temperature"):
        distiller.temperature.numpy()
    with pytest.raises(AttributeError, match="no soft loss"):
        distiller.beta.numpy()


@pytest.mark.parametrize(
    "loss",
    [
        kd.losses.LogitMSE(),
        kd.losses.DecoupledKD(),
        kd.losses.DIST(),
        kd.losses.MultiLevelLogit(),
        kd.losses.SoftTarget(2.0, divergence="cross_entropy", standardize=True),
        "mse",
        keras.losses.CosineSimilarity(),
    ],
    ids=lambda loss: loss if isinstance(loss, str) else loss.name,
)
def test_any_loss_is_a_soft_loss(loss):
    x, y = tiny.data(8)
    distiller = tiny.compiled(tiny.distiller(soft_loss=loss))
    known, own = distiller.teacher.model(x), distiller.student(x)
    if getattr(loss, "needs_labels", False):
        known = [known, y]
    expected = ops.mean(keras.losses.get(loss)(known, own))
    logs = tiny.history(distiller, x, y)
    assert logs["soft_loss"][0] == pytest.approx(float(expected), rel=1e-4)
    assert ("agreement" in logs) == isinstance(loss, kd.losses.DistillationLoss)


# -- options of compile ----------------------------------------------------------------


def poisoned(rows=24, row=17):
    """Data of which one row is infinite."""
    x, y = tiny.data(rows)
    x[row] = np.inf
    return x, y


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_check_finite_names_the_batch(run_eagerly):
    x, y = poisoned()
    # Without a ReLU, which on some machines makes 0 of NaN.
    distiller = tiny.distiller(known=tiny.linear())
    tiny.compiled(distiller, run_eagerly=run_eagerly, check_finite=True)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"(?s)NaN or infinity in batch.*2"
    ):
        tiny.history(distiller, x, y, batch_size=8)


def test_check_finite_counts_from_0_in_every_epoch():
    x, y = tiny.data(16)
    distiller = tiny.distiller(known=tiny.linear())
    tiny.compiled(distiller, check_finite=True)
    tiny.history(distiller, x, y, batch_size=8)
    x[9] = np.nan
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"in batch(?s:.*)\b1\b"):
        tiny.history(distiller, x, y, batch_size=8)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "scaled"])
def test_skip_nonfinite_leaves_everything_as_it_was(optimizer):
    x, y = poisoned(8, 3)

    def made():
        if optimizer == "scaled":
            return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1))
        return keras.optimizers.get(optimizer)

    student = with_statistics()
    link = kd.Link("norm", "hidden", "mse", adapter=keras.layers.Dense(12))
    distiller = tiny.distiller(student, links=[link])
    tiny.compiled(
        distiller, optimizer=made(), skip_nonfinite=True, metrics=["accuracy"]
    )
    good = tiny.data(8)
    tiny.history(distiller, *good)
    weights = tiny.values(distiller.trainable_variables)
    norm = tiny.values(student.get_layer("norm").variables)
    slots = [v for v in distiller.optimizer.variables if "scale" not in v.path]
    slots = [v for v in slots if "steps_since" not in v.path]
    slots_before = tiny.values(slots)
    logs = tiny.history(distiller, x, y)
    assert logs["skipped"] == [1.0]
    assert tiny.same(tiny.values(distiller.trainable_variables), weights)
    assert tiny.same(tiny.values(student.get_layer("norm").variables), norm)
    assert tiny.same(tiny.values(slots), slots_before)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_skip_nonfinite_trains_on_the_other_batches(run_eagerly):
    x, y = poisoned(24, 17)  # the last of three batches
    teacher = tiny.teacher()
    made = [kd.Distiller(tiny.mlp(), teacher) for _ in range(2)]
    made[1].student.set_weights(made[0].student.get_weights())
    for distiller in made:
        tiny.compiled(distiller, run_eagerly=run_eagerly, skip_nonfinite=True)
    bad = tiny.history(made[0], x, y, batch_size=8)
    good = tiny.history(made[1], x[:16], y[:16], batch_size=8)
    assert bad["skipped"] == [pytest.approx(1 / 3)]
    assert good["skipped"] == [0.0]
    assert tiny.same(*(tiny.values(d.student.weights) for d in made))
    for name in ("loss", "hard_loss", "soft_loss", "agreement"):
        assert bad[name][0] == pytest.approx(good[name][0], rel=1e-5), name


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_gradient_shares_sum_to_one(run_eagerly):
    x, y = tiny.data(24)
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    distiller = tiny.distiller(links=[link])
    tiny.compiled(distiller, run_eagerly=run_eagerly, log_gradient_share=2)
    logs = tiny.history(distiller, x, y, batch_size=8)
    shares = [logs[f"{name}_gradient_share"][0] for name in ("hard", "soft", "hidden")]
    assert sum(shares) == pytest.approx(1, rel=1e-4)
    assert min(shares) > 0


def test_gradient_shares_are_norms_over_the_students_weights():
    x, y = tiny.data(8)
    distiller = tiny.distiller(alpha=0.3, beta=0.6, temperature=2.0)
    student, known = distiller.student, distiller.teacher.model(x)
    norms = []
    for weight, loss, truth in (
        (0.3, tiny.SPARSE, y),
        (0.6, kd.losses.SoftTarget(2.0), known),
    ):
        with tf.GradientTape() as tape:
            value = weight * loss(truth, student(x))
        gradients = tape.gradient(value, [v.value for v in student.trainable_variables])
        norms.append(float(tf.linalg.global_norm(gradients)))
    tiny.compiled(distiller, log_gradient_share=1)
    logs = tiny.history(distiller, x, y)
    share = norms[0] / sum(norms)
    assert logs["hard_gradient_share"][0] == pytest.approx(share, rel=1e-4)
    assert logs["soft_gradient_share"][0] == pytest.approx(1 - share, rel=1e-4)


@keras.saving.register_keras_serializable(package="tests")
def main_only(main, transfer, variables, epoch):
    """A policy that drops what the links say."""
    assert len(main) == len(transfer) == len(variables)
    assert any(g is not None for g in transfer)
    return [
        tf.zeros(v.shape) if g is None else g
        for g, v in zip(main, variables, strict=True)
    ]


def test_a_gradient_policy_combines_main_and_transfer():
    x, y = tiny.data(8)
    without = tiny.compiled(tiny.distiller(tiny.mlp(), teacher := tiny.teacher()))
    link = kd.Link("hidden", "hidden", "mse", adapter="auto", weight=50.0)
    student = tiny.mlp()
    student.set_weights(without.student.get_weights())
    dropped = kd.Distiller(student, teacher, links=[link])
    tiny.compiled(dropped, gradient_policy=main_only)
    for distiller in (without, dropped):
        tiny.history(distiller, x, y)
    for a, b in zip(
        tiny.values(without.student.weights), tiny.values(student.weights), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# -- numbers at the edge ---------------------------------------------------------------


@pytest.mark.parametrize("case", ["huge", "identical", "one class", "one row"])
def test_extreme_but_legal_input_stays_finite(case):
    x, y = tiny.data(9)
    teacher, student = tiny.teacher(), tiny.mlp()
    if case == "huge":
        for model, sign in ((teacher, 1), (student, -1)):
            model.layers[-1].bias.assign(np.array([1e4, -1e4, 0]) * sign)
    elif case == "identical":
        x[:] = x[0]
    elif case == "one class":
        y[:] = 1
    link = kd.Link("hidden", "hidden", kd.losses.Hint(), adapter="auto")
    distiller = tiny.compiled(kd.Distiller(student, teacher, links=[link]))
    batch = 8 if case == "one row" else 9
    logs = tiny.history(distiller, x, y, batch_size=batch)
    assert all(np.isfinite(v).all() for v in logs.values())
    assert all(np.isfinite(v).all() for v in tiny.values(distiller.variables))


# -- what it looks like ----------------------------------------------------------------


def test_compile_returns_the_distiller():
    distiller = tiny.distiller()
    assert distiller.compile("sgd", tiny.SPARSE) is distiller


def test_reprs_are_one_line():
    link = kd.Link("a/b", "c", kd.losses.LogitMSE(), weight=2.0, adapter="auto")
    text = "Link(a/b → c, LogitMSE(), weight=2, adapter='auto', name='a-b')"
    assert repr(link) == text
    assert repr(kd.Link("a", "c", "mse")).startswith("Link(a → c, mean_squared_error,")
    assert repr(kd.losses.SoftTarget(2.0)).startswith("SoftTarget(temperature=2.0,")
    distiller = tiny.distiller(tiny.mlp(name="s"), tiny.mlp(name="t"))
    assert repr(distiller.teacher) == "teachers.Model('t')"
    assert "\n" not in repr(kd.teachers.Ensemble([tiny.mlp(), tiny.mlp()]))


def test_weights_of_a_distiller_hold_no_teacher_variable():
    links = [
        kd.Link(
            "hidden",
            "hidden",
            "mse",
            adapter=keras.layers.Dense(5),
            teacher_adapter=keras.layers.Dense(5),
        )
    ]
    distiller = tiny.compiled(tiny.distiller(links=links))
    teacher = {id(v) for v in distiller.teacher.variables}
    assert not teacher & {id(v) for v in distiller.variables}
    # Student, two adapters, and: temperature, three weights, the epoch.
    assert len(distiller.student.weights) == 4
    assert len(distiller.weights) == 4 + 4 + 5
    assert len(distiller.trainable_weights) == 8
    layers = distiller._flatten_layers()
    assert not {id(layer) for layer in layers} & {
        id(layer) for layer in distiller.teacher.model._flatten_layers()
    }
