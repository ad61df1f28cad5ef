"""What other distillers got wrong without a word, and this one does right.

Each test is named after what is right here; the numbers are those of the list of
defects of `keras.distillation` in the documentation.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd


def one_epoch(distiller, loss=tiny.SPARSE, rows=16, rate=0.0, fit=None, **options):
    x, y = tiny.data(rows)
    tiny.compiled(distiller, loss, keras.optimizers.SGD(rate), **options)
    logs = tiny.history(distiller, x, y, batch_size=rows, **(fit or {}))
    return {name: value[0] for name, value in logs.items()}


def constant(logits):
    """A model that gives the same logits for every row."""
    model = tiny.linear()
    model.layers[-1].kernel.assign(np.zeros((tiny.FEATURES, len(logits))))
    model.layers[-1].bias.assign(logits)
    return model


def kl(p, q):
    return float(np.sum(p * (np.log(p) - np.log(q))))


def softmax(z):
    z = np.exp(np.asarray(z, "float64") - np.max(z))
    return z / z.sum()


@pytest.mark.parametrize(
    "logits", [[1.0, 2.0, 0.5], [-5.0, -3.0, -9.0], [40.0, 35.0, 30.0]]
)
def test_01_the_default_is_the_divergence_of_softmaxes_times_t_squared(logits):
    own = [0.5, -0.5, 0.0]
    distiller = kd.Distiller(constant(own), constant(logits), temperature=3.0)
    p, q = (softmax(np.divide(z, 3)) for z in (logits, own))
    assert one_epoch(distiller)["soft_loss"] == pytest.approx(9 * kl(p, q), rel=1e-4)


def test_01_a_student_learns_by_distillation_alone():
    x, _ = tiny.data(200)
    teacher = tiny.teacher()
    distiller = tiny.distiller(tiny.mlp(32), teacher, alpha=0.0)
    tiny.compiled(distiller, None, "adam", run_eagerly=False)
    distiller.optimizer.learning_rate = 0.02
    tiny.history(distiller, x, epochs=25)
    own, known = (np.argmax(m(x), -1) for m in (distiller.student, teacher))
    assert np.mean(own == known) > 0.9


def test_02_the_gradient_lives_where_teacher_and_student_disagree():
    student = constant([40.0, -40.0, -40.0])
    teacher = constant([-40.0, 40.0, -40.0])
    distiller = kd.Distiller(student, teacher, temperature=1.0, alpha=0.0, beta=1.0)
    logs = one_epoch(distiller, rate=1.0)
    assert logs["soft_loss"] == pytest.approx(80, rel=1e-4)
    moved = student.layers[-1].bias.numpy() - [40, -40, -40]
    np.testing.assert_allclose(moved, [-1, 1, 0], atol=1e-4)


def test_03_the_student_runs_once_with_feature_losses():
    counter = tiny.Counting()
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    distiller = tiny.distiller(tiny.mlp(layers=[counter]), links=[link])
    del counter.runs[:]
    one_epoch(distiller)
    assert list(counter.runs) == [True]


def test_04_outputs_and_features_share_statistics_and_dropout():
    norm = keras.layers.BatchNormalization(momentum=0.5, name="norm")
    drop = keras.layers.Dropout(0.5, name="drop")
    seen = {}

    class Spy(keras.losses.Loss):
        def call(self, y_true, y_pred):
            seen["features"] = np.asarray(y_pred)
            return keras.ops.mean((y_true - y_pred) ** 2, -1)

    class Head(keras.layers.Dense):
        def call(self, x, training=None):
            if training:
                seen["input"] = np.asarray(x)
            return super().call(x)

    inputs = keras.Input((tiny.FEATURES,))
    outputs = Head(tiny.CLASSES, name="logits")(drop(norm(inputs)))
    student = keras.Model(inputs, outputs)
    teacher_side = keras.layers.Dense(tiny.FEATURES)
    link = kd.Link("drop", "hidden", Spy(), teacher_adapter=teacher_side)
    one_epoch(tiny.distiller(student, links=[link]))
    np.testing.assert_array_equal(seen["features"], seen["input"])
    mean = tiny.data(16)[0].mean(0) * 0.5
    np.testing.assert_allclose(norm.moving_mean.numpy(), mean, rtol=1e-4, atol=1e-6)


def test_05_evaluation_runs_without_training():
    norm, drop = keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)
    student = tiny.mlp(layers=[norm, drop])
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    distiller = tiny.compiled(tiny.distiller(student, links=[link]))
    before = tiny.values(student.variables)
    x, y = tiny.data(16)
    losses = [distiller.evaluate(x, y, verbose=0)[0] for _ in range(2)]
    assert tiny.same(tiny.values(student.variables), before)
    assert losses == pytest.approx([float(tiny.SPARSE(y, student(x)))] * 2, rel=1e-5)


@pytest.mark.parametrize("name", ["sample_weight", "class_weight"])
def test_06_weights_of_rows_and_classes_count(name):
    given = {
        "sample_weight": np.zeros(16, "float32"),
        "class_weight": dict.fromkeys(range(3), 0.0),
    }[name]
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    logs = one_epoch(tiny.distiller(links=[link]), fit={name: given})
    for term in ("loss", "hard_loss", "soft_loss", "hidden_loss"):
        assert logs[term] == 0


def test_07_regularisers_count():
    student = tiny.mlp(kernel_regularizer=keras.regularizers.L2(1.0))
    logs = one_epoch(tiny.distiller(student))
    penalty = logs["loss"] - 0.1 * logs["hard_loss"] - 0.9 * logs["soft_loss"]
    assert penalty == pytest.approx(float(sum(student.losses)), rel=1e-4)


@pytest.mark.parametrize("spelling", ["string", "function", "instance"])
def test_08_losses_mean_the_same_however_they_are_spelled(spelling):
    hard = {
        "string": "mse",
        "function": keras.losses.mean_squared_error,
        "instance": keras.losses.MeanSquaredError(),
    }[spelling]
    x, y = tiny.data(16)
    y = np.eye(3, dtype="float32")[y]
    student, teacher = tiny.mlp(12), tiny.teacher()
    link = kd.Link("hidden", "hidden", hard)
    distiller = kd.Distiller(student, teacher, links=[link], soft_loss=None, alpha=1.0)
    expected = float(np.mean((np.asarray(student(x)) - y) ** 2))
    tiny.compiled(distiller, hard, keras.optimizers.SGD(0.0))
    logs = tiny.history(distiller, x, y)
    assert logs["hard_loss"][0] == pytest.approx(expected, rel=1e-5)
    assert logs["loss"][0] == pytest.approx(
        logs["hard_loss"][0] + logs["hidden_loss"][0], rel=1e-5
    )


def test_09_logged_terms_are_means_over_rows():
    x, y = tiny.data(11)
    distiller = tiny.compiled(tiny.distiller(), optimizer=keras.optimizers.SGD(0.0))
    whole = tiny.history(distiller, x, y, batch_size=11)
    parts = tiny.history(distiller, x, y, batch_size=8)
    for name in ("loss", "hard_loss", "soft_loss", "agreement"):
        assert parts[name][0] == pytest.approx(whole[name][0], rel=1e-5)


def test_10_a_link_has_two_ends():
    with pytest.raises(TypeError):
        kd.Link("hidden", loss="mse")
    with pytest.raises(TypeError, match="`teacher_layer` must be a layer's name"):
        kd.Link("hidden", None, "mse")


def test_11_weights_of_losses_are_not_dropped():
    x, y = tiny.data(16)
    for weight in (1.0, 100.0):
        link = kd.Link("hidden", "hidden", "mse", adapter="auto", weight=weight)
        distiller = tiny.distiller(links=[link], soft_loss=None, alpha=1.0)
        hard = float(tiny.SPARSE(y, distiller.student(x)))
        logs = one_epoch(distiller, [tiny.SPARSE], loss_weights=[7.0])
        assert logs["hard_loss"] == pytest.approx(7 * hard, rel=1e-4)
        total = logs["hard_loss"] + weight * logs["hidden_loss"]
        assert logs["loss"] == pytest.approx(total, rel=1e-5)


def test_12_heads_with_softmax_and_with_one_unit_are_recognised():
    def net(units, activation):
        inputs = keras.Input((tiny.FEATURES,))
        return keras.Model(inputs, keras.layers.Dense(units, activation)(inputs))

    x, _ = tiny.data(16)
    probable, plain, student = net(3, "softmax"), net(3, None), tiny.mlp()
    plain.set_weights(probable.get_weights())
    logs = [one_epoch(kd.Distiller(student, t))["soft_loss"] for t in (probable, plain)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    one = kd.Distiller(net(1, None), net(1, "sigmoid"))
    tiny.compiled(one, None)
    assert tiny.history(one, x)["soft_loss"][0] > 1e-3


@pytest.mark.parametrize("structure", [list, dict])
def test_13_several_outputs_work_as_lists_and_dicts(structure):
    def net():
        inputs = keras.Input((tiny.FEATURES,))
        outputs = {n: keras.layers.Dense(3, name=n)(inputs) for n in ("a", "b")}
        return keras.Model(
            inputs, outputs if structure is dict else [*outputs.values()]
        )

    x, y = tiny.data(16)
    truth = {"a": y, "b": y} if structure is dict else [y, y]
    distiller = tiny.compiled(
        kd.Distiller(net(), net()), loss={"a": tiny.SPARSE, "b": tiny.SPARSE}
    )
    assert {"a_agreement", "b_agreement"} <= set(tiny.history(distiller, x, truth))


def test_14_teacher_and_student_may_differ_in_dtype_and_inputs():
    x, y = tiny.data(16)
    inputs = keras.Input((2,))
    small = keras.Model(inputs, keras.layers.Dense(3, dtype="mixed_float16")(inputs))
    teacher = kd.teachers.Model(tiny.teacher(), inputs="x")
    distiller = tiny.compiled(kd.Distiller(small, teacher, student_inputs="part"))
    logs = tiny.history(distiller, {"x": x, "part": x[:, :2]}, y)
    assert np.isfinite(logs["soft_loss"][0])


def test_14_class_counts_may_differ_without_a_soft_loss():
    inputs = keras.Input((tiny.FEATURES,))
    z = keras.layers.Dense(8, name="hidden")(inputs)
    teacher = keras.Model(inputs, keras.layers.Dense(9)(z))
    link = kd.Link("hidden", "hidden", "mse")
    distiller = kd.Distiller(tiny.mlp(), teacher, soft_loss=None, links=[link])
    assert one_epoch(distiller)["hidden_loss"] > 0


@pytest.mark.parametrize("loss", ["mse", "cosine_similarity"])
def test_15_adapters_bridge_widths(loss):
    link = kd.Link("hidden", "hidden", loss, adapter="auto")
    distiller = kd.Distiller(tiny.mlp(5), tiny.teacher(12), links=[link])
    assert "hidden_loss" in one_epoch(distiller)


def test_16_features_come_from_nested_and_subclassed_models_and_are_unambiguous():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = tiny.mlp(name="inner")

        def call(self, x, training=None):
            return self.inner(x, training=training)

    student = Own()
    student(np.zeros((1, tiny.FEATURES), "float32"))
    link = kd.Link("inner/hidden", "hidden", "mse", adapter="auto")
    logs = one_epoch(tiny.distiller(student, links=[link]))
    assert logs["inner-hidden_loss"] > 0

    class Twice(Own):
        def call(self, x, training=None):
            return self.inner(x) + self.inner(x)

    student = Twice()
    student(np.zeros((1, tiny.FEATURES), "float32"))
    with pytest.raises(ValueError, match="called 2 times"):
        tiny.distiller(student, links=[link])


def test_17_a_loaded_distiller_is_compiled(tmp_path):
    distiller = tiny.compiled(tiny.distiller(), optimizer="adam", metrics=["accuracy"])
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    x, y = tiny.data(16)
    assert loaded.evaluate(x, y, verbose=0) == distiller.evaluate(x, y, verbose=0)
    assert isinstance(loaded.optimizer, keras.optimizers.Adam)


def test_18_a_distiller_is_built_from_the_start():
    distiller = tiny.distiller()
    assert distiller.built
    # Temperature, two weights and the epoch are the distiller's own numbers.
    assert distiller.count_params() == distiller.student.count_params() + 4
    distiller.summary(print_fn=lambda line: None)


def test_19_files_do_not_carry_the_teacher(tmp_path):
    sizes = []
    for width in (8, 2000):
        distiller = tiny.compiled(tiny.distiller(tiny.mlp(8), tiny.teacher(width)))
        distiller.save(tmp_path / "d.keras")
        distiller.save_weights(tmp_path / "d.weights.h5")
        sizes.append(
            [(tmp_path / n).stat().st_size for n in ("d.keras", "d.weights.h5")]
        )
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=0.02)


def test_20_every_term_has_its_own_log():
    links = [
        kd.Link("hidden", "hidden", "mse", adapter="auto"),
        kd.Link("logits", "logits", "mse", name="top"),
    ]
    logs = one_epoch(tiny.distiller(links=links))
    terms = {"hard_loss", "soft_loss", "hidden_loss", "top_loss"}
    assert set(logs) == {"loss", "agreement", *terms}


def test_21_numbers_can_be_changed_between_fits():
    x, y = tiny.data(16)
    distiller = tiny.distiller()
    tiny.compiled(distiller, run_eagerly=False, optimizer=keras.optimizers.SGD(0.0))
    first = tiny.history(distiller, x, y)
    distiller.temperature = 1.0
    distiller.alpha = 0.0
    second = tiny.history(distiller, x, y)
    assert second["soft_loss"][0] != pytest.approx(first["soft_loss"][0], rel=1e-2)
    assert second["loss"][0] == pytest.approx(0.9 * second["soft_loss"][0], rel=1e-5)


def test_22_several_teachers_and_none_in_evaluation():
    counter = tiny.Counting()
    teachers = [tiny.teacher(), tiny.mlp(layers=[counter])]
    distiller = tiny.distiller(known=teachers)
    del counter.runs[:]
    assert "soft_loss" in one_epoch(distiller)
    assert list(counter.runs) == [False]
    distiller.evaluate(*tiny.data(16), verbose=0)
    assert list(counter.runs) == [False]


def test_23_neither_a_loss_nor_a_list_of_metrics_is_needed():
    logs = one_epoch(tiny.distiller(), None, metrics={"logits": ["accuracy"]})
    assert logs["loss"] == pytest.approx(0.9 * logs["soft_loss"], rel=1e-5)
    assert "accuracy" in logs or "logits_accuracy" in logs


def test_23_the_weights_are_no_convex_mix():
    logs = one_epoch(tiny.distiller(alpha=2.0, beta=3.0))
    total = 2 * logs["hard_loss"] + 3 * logs["soft_loss"]
    assert logs["loss"] == pytest.approx(total, rel=1e-5)


def test_24_the_users_teacher_is_not_changed():
    teacher = tiny.teacher()
    before = tiny.values(teacher.variables)
    one_epoch(tiny.distiller(known=teacher), rate=0.1)
    assert teacher.trainable
    assert len(teacher.trainable_variables) == 4
    assert tiny.same(tiny.values(teacher.variables), before)
    assert "call" not in teacher.__dict__


def test_25_losses_are_losses_of_keras():
    loss = kd.losses.SoftTarget(2.0, reduction="sum")
    assert isinstance(loss, keras.losses.Loss)
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 4, 3)).astype("float32")
    values = kd.losses.SoftTarget(2.0, reduction=None)(teacher, student)
    weight = np.array([0.0, 1.0, 2.0, 3.0], "float32")
    expected = float(np.sum(np.asarray(values) * weight))
    assert float(loss(teacher, student, weight)) == pytest.approx(expected, rel=1e-5)
    masked = tf.constant(student)
    masked._keras_mask = tf.constant([True, False, True, False])
    expected = float(values[0] + values[2])
    assert float(loss(teacher, masked)) == pytest.approx(expected, rel=1e-5)
