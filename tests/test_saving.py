"""Saving, loading, checkpoints, callbacks of Keras."""

from __future__ import annotations

import os

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd


def dropping_mlp():
    layers = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.2, seed=4)]
    return tiny.mlp(layers=layers)


def made(optimizer=None, student=None, teacher=None, **kwargs):
    """A distiller of every kind of part: adapters, statistics, dropout, slots."""
    links = [
        kd.Link("hidden", "hidden", "mse", weight=0.5, adapter="auto"),
        kd.Link(
            "hidden",
            "hidden",
            kd.losses.Hint(),
            adapter=keras.layers.Dense(5),
            teacher_adapter=keras.layers.Dense(5),
            name="small",
        ),
    ]
    distiller = kd.Distiller(
        student or dropping_mlp(), teacher or tiny.teacher(), links=links, **kwargs
    )
    optimizer = optimizer or keras.optimizers.Adam(0.01)
    return tiny.compiled(distiller, optimizer=optimizer, metrics=["accuracy"])


def state(distiller):
    return tiny.values([*distiller.weights, *distiller.optimizer.variables])


def test_a_saved_distiller_continues_as_one_that_was_not(tmp_path):
    x, y = tiny.data()
    distiller = made(temperature=3.0, alpha=0.3, beta=0.4)
    tiny.history(distiller, x, y, batch_size=8)
    distiller.temperature = 2.5
    distiller.term_weights["small"] = 0.25
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    assert isinstance(loaded, kd.Distiller)
    assert loaded.temperature.numpy() == 2.5
    assert loaded.term_weights["small"].numpy() == 0.25
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), distiller.predict(x, verbose=0)
    )
    assert loaded.evaluate(x, y, verbose=0) == distiller.evaluate(x, y, verbose=0)
    assert tiny.same(state(loaded), state(distiller))
    loaded.teacher = distiller.teacher.model
    logs = [tiny.history(d, x, y, batch_size=8, epochs=2) for d in (distiller, loaded)]
    assert logs[0] == logs[1]
    assert tiny.same(state(loaded), state(distiller))


def test_a_loaded_distiller_asks_for_its_teacher(tmp_path):
    x, y = tiny.data()
    distiller = made()
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    assert repr(loaded.teacher) == "teachers.Absent()"
    with pytest.raises(ValueError, match="distiller.teacher = model"):
        tiny.history(loaded, x, y)
    with pytest.raises(
        ValueError, match="not the teacher that the distiller was saved"
    ):
        loaded.teacher = tiny.mlp(12)
    with pytest.raises(ValueError, match="outputs have shapes"):
        loaded.teacher = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    with pytest.raises(TypeError, match="`teacher` must be"):
        loaded.teacher = "teacher"
    loaded.teacher = distiller.teacher.model
    tiny.history(loaded, x, y)


def test_a_teacher_with_dropout_is_the_same_whenever_it_is_loaded(tmp_path):
    teacher = tiny.mlp(layers=[keras.layers.Dropout(0.2)])
    teacher.save(tmp_path / "teacher.keras")
    one, other = (keras.saving.load_model(tmp_path / "teacher.keras") for _ in range(2))
    first, second = (kd.teachers.Model(model).fingerprint() for model in (one, other))
    assert first == second
    one(np.ones((2, tiny.FEATURES), "float32"), training=True)  # draws numbers
    assert kd.teachers.Model(one).fingerprint() == first


def test_names_do_not_count_for_the_fingerprint(tmp_path):
    distiller = made()
    distiller.save(tmp_path / "d.keras")
    distiller.teacher.model.save(tmp_path / "t.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    again = tiny.teacher()  # the same weights, names numbered anew
    assert again.name != distiller.teacher.model.name
    loaded.teacher = again
    other = keras.saving.load_model(tmp_path / "d.keras")
    other.teacher = keras.saving.load_model(tmp_path / "t.keras")


def test_a_loaded_distiller_saves_again_without_its_teacher(tmp_path):
    distiller = made()
    distiller.save(tmp_path / "d.keras")
    keras.saving.load_model(tmp_path / "d.keras").save(tmp_path / "again.keras")
    loaded = keras.saving.load_model(tmp_path / "again.keras")
    loaded.teacher = distiller.teacher
    tiny.history(loaded, *tiny.data())


def test_save_teacher_keeps_the_teacher_in_the_file(tmp_path):
    x, y = tiny.data()
    distiller = made(save_teacher=True)
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    assert isinstance(loaded.teacher, kd.teachers.Model)
    assert loaded.save_teacher
    logs = [tiny.history(d, x, y) for d in (distiller, loaded)]
    assert logs[0] == logs[1]
    assert tiny.same(
        tiny.values(loaded.teacher.variables), tiny.values(distiller.teacher.variables)
    )
    with pytest.raises(ValueError, match="needs a teacher that is one Keras model"):
        tiny.distiller(known=[tiny.mlp(), tiny.mlp()], save_teacher=True)


def test_a_teacher_in_the_file_is_wrapped_as_it_was(tmp_path):
    inputs = keras.Input((tiny.FEATURES,))
    bare = keras.layers.Dense(tiny.CLASSES)(inputs)
    bare = bare / keras.ops.sum(bare, -1, keepdims=True)  # no softmax to be seen
    model = keras.Model(inputs, bare)
    known = kd.teachers.Model(model, inputs="seen", from_logits=True)
    x, y = tiny.data()
    distiller = tiny.distiller(known=known, student_inputs="seen", save_teacher=True)
    tiny.compiled(distiller)
    distiller.fit({"seen": x}, y, verbose=0)
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    assert loaded.teacher.inputs == "seen"
    assert loaded.teacher.from_logits is True
    assert loaded.teacher.fingerprint() == known.fingerprint()
    loaded.fit({"seen": x}, y, verbose=0)


def test_without_a_hard_term_there_is_none_after_loading(tmp_path):
    x, _ = tiny.data()
    distiller = tiny.distiller(alpha=None)
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    assert "hard" not in loaded.term_weights
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), distiller.predict(x, verbose=0)
    )


def big(width):
    return keras.Sequential(
        [
            keras.Input((tiny.FEATURES,)),
            keras.layers.Dense(width, "relu", name="hidden"),
            keras.layers.Dense(width, "relu"),
            keras.layers.Dense(tiny.CLASSES, name="logits"),
        ]
    )


def test_no_file_holds_the_teacher(tmp_path):
    distiller = made(student=big(300), teacher=big(700))
    distiller.save_weights(tmp_path / "d.weights.h5")
    distiller.save(tmp_path / "d.keras")
    parts = [*distiller.trainable_variables, *distiller.optimizer.variables]
    size = sum(int(np.prod(v.shape)) for v in parts) * 4
    assert size > 1e6
    for name in ("d.weights.h5", "d.keras"):
        assert os.path.getsize(tmp_path / name) <= 1.1 * size, name
    distiller.student.save(tmp_path / "s.keras")
    student = keras.saving.load_model(tmp_path / "s.keras")
    assert type(student) is keras.Sequential


def test_weights_go_into_a_fresh_distiller_with_the_optimizers_state(tmp_path):
    x, y = tiny.data()
    distiller = made(student=tiny.mlp())  # weights hold no states of dropout
    tiny.history(distiller, x, y)
    distiller.save_weights(tmp_path / "d.weights.h5")
    fresh = made(student=tiny.mlp())
    fresh.load_weights(tmp_path / "d.weights.h5")
    assert tiny.same(state(fresh), state(distiller))
    assert tiny.history(fresh, x, y) == tiny.history(distiller, x, y)


@pytest.mark.parametrize("weights_only", [True, False])
def test_model_checkpoint(tmp_path, weights_only):
    x, y = tiny.data()
    suffix = "weights.h5" if weights_only else "keras"
    path = tmp_path / f"best.{suffix}"
    checkpoint = keras.callbacks.ModelCheckpoint(
        path,
        monitor="val_hard_loss",
        mode="min",
        save_best_only=True,
        save_weights_only=weights_only,
    )
    distiller = made()
    tiny.history(distiller, x, y, validation_data=(x, y), callbacks=[checkpoint])
    if weights_only:
        fresh = made()
        fresh.load_weights(path)
    else:
        fresh = keras.saving.load_model(path)
    assert tiny.same(state(fresh), state(distiller))


def test_backup_and_restore(tmp_path):
    x, y = tiny.data()

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    interrupted = made()
    with pytest.raises(KeyboardInterrupt):
        tiny.history(interrupted, x, y, epochs=4, callbacks=[backup(), Stop()])
    resumed = made()
    logs = tiny.history(resumed, x, y, epochs=4, callbacks=[backup()])
    assert len(logs["loss"]) == 2
    assert resumed.optimizer.iterations.numpy() == 4


def test_early_stopping_restores_the_best_weights():
    x, y = tiny.data()
    distiller = made(keras.optimizers.SGD(50.0))  # gets worse at once
    stop = keras.callbacks.EarlyStopping(
        "val_hard_loss", mode="min", patience=1, restore_best_weights=True
    )
    logs = tiny.history(
        distiller, x, y, epochs=5, validation_data=(x, y), callbacks=[stop]
    )
    final = distiller.evaluate(x, y, verbose=0, return_dict=True)["hard_loss"]
    assert final == pytest.approx(min(logs["val_hard_loss"]), rel=1e-5)


def test_tensorboard(tmp_path):
    x, y = tiny.data()
    distiller = tiny.compiled(tiny.distiller(), run_eagerly=False)
    board = keras.callbacks.TensorBoard(tmp_path, histogram_freq=1)
    tiny.history(distiller, x, y, validation_data=(x, y), callbacks=[board])
    assert any(files for _, _, files in os.walk(tmp_path))


def test_export_is_the_student(tmp_path):
    x, _ = tiny.data()
    distiller = made(student=tiny.mlp())
    distiller.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.serve(x), distiller.student(x), rtol=1e-5)


# -- configs ---------------------------------------------------------------------------


def test_the_config_holds_every_argument():
    links = [kd.Link("hidden", "hidden", "mse", weight=2.0, adapter="auto", name="n")]
    distiller = tiny.distiller(
        temperature=2.0,
        alpha=0.5,
        beta=0.25,
        links=links,
        output_weights=[3.0],
        unlabelled=7,
        name="named",
    )
    again = kd.Distiller.from_config(distiller.get_config())
    assert again.get_config() == distiller.get_config()
    assert again.name == "named"
    assert again.unlabelled == 7
    assert again.output_weights == {"logits": 3.0}
    link = again.links[0]
    assert (link.name, link.student_layer, link.teacher_layer) == ("n", *["hidden"] * 2)
    assert isinstance(link.adapter, kd.adapters.Regressor)
    for name in ("alpha", "beta", "temperature"):
        value = getattr(distiller, name).numpy()
        assert getattr(again, name).numpy() == value


def test_the_compile_config_keeps_auto_and_our_options(tmp_path):
    distiller = tiny.distiller()
    distiller.compile(
        keras.optimizers.Adam(0.02),
        tiny.SPARSE,
        metrics=["accuracy"],
        steps_per_execution=2,
        skip_nonfinite=True,
        check_finite=True,
        log_gradient_share=3,
    )
    config = distiller.get_compile_config()
    assert config["jit_compile"] == "auto"
    for option, value in (
        ("skip_nonfinite", True),
        ("check_finite", True),
        ("log_gradient_share", 3),
    ):
        assert config[option] == value
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    assert loaded.get_compile_config() == config
    assert loaded.optimizer.learning_rate.numpy() == pytest.approx(0.02)


def test_lambdas_are_refused_when_saving(tmp_path):
    x, y = tiny.data()
    link = kd.Link(
        "hidden",
        "hidden",
        lambda t, s: keras.ops.mean((t - s) ** 2, -1),
        adapter="auto",
    )
    distiller = tiny.compiled(tiny.distiller(links=[link]))
    tiny.history(distiller, x, y)
    with pytest.raises(ValueError, match="lambda cannot be saved"):
        distiller.save(tmp_path / "d.keras")
    distiller = tiny.distiller(student_inputs=lambda x: x)
    with pytest.raises(ValueError, match="`student_inputs`: a lambda"):
        distiller.save(tmp_path / "d.keras")


@keras.saving.register_keras_serializable(package="tests")
def doubled(x):
    return x * 2


def test_a_registered_function_of_the_inputs_is_saved(tmp_path):
    x, y = tiny.data()
    distiller = tiny.compiled(tiny.distiller(student_inputs=doubled))
    tiny.history(distiller, x, y)
    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), distiller.student.predict(2 * x, verbose=0)
    )


# -- what is shown ---------------------------------------------------------------------


def test_the_summary_ends_with_the_terms():
    lines = []
    made(temperature=2.0).summary(print_fn=lines.append)
    table = lines[-1].splitlines()
    assert [line.split()[0] for line in table] == [
        "term",
        "------",
        *("hard", "soft", "hidden", "small"),
    ]
    hidden = table[4]
    for part in (
        "0.5",
        "mean_squared_error",
        "hidden → hidden",
        "(None, 8) → (None, 12)",
    ):
        assert part in hidden
    assert hidden.split()[-1] == str(8 * 12)
    assert table[5].split()[-1] == str(8 * 5 + 5 + 12 * 5 + 5)
    assert "sparse_categorical_crossentropy" in table[2]
    assert "soft_target" in table[3]


def test_explain_shows_every_term_and_changes_nothing(capsys):
    x, y = tiny.data()
    distiller = made()
    tiny.history(distiller, x, y)
    everything = [
        *distiller.variables,
        *distiller.optimizer.variables,
        *(v for metric in distiller.metrics for v in metric.variables),
    ]
    before = tiny.values(everything)
    rows = kd.explain(distiller, (x, y))
    assert tiny.same(tiny.values(everything), before)
    assert [row.term for row in rows] == ["hard", "soft", "hidden", "small"]
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert all(row.value > 0 for row in rows)
    assert [row.weight for row in rows] == pytest.approx([0.1, 0.9, 0.5, 1.0])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == [
        "term",
        "value",
        "weight",
        "gradient",
        "norm",
        "share",
    ]
    assert [line.split()[0] for line in printed[2:]] == [row.term for row in rows]


def test_explain_is_what_the_step_logs():
    x, y = tiny.data()
    student = tiny.mlp(kernel_regularizer="l2")
    distiller = tiny.compiled(tiny.distiller(student), log_gradient_share=1)
    rows = {row.term: row for row in kd.explain(distiller, (x, y), verbose=False)}
    logs = {k: v[0] for k, v in tiny.history(distiller, x, y, batch_size=24).items()}
    for term in ("hard", "soft"):
        assert rows[term].value == pytest.approx(logs[f"{term}_loss"], rel=1e-5)
    total = sum(row.value * row.weight for row in rows.values())
    assert total == pytest.approx(logs["loss"], rel=1e-5)
    assert rows["regularization"].weight == 1
    norms = rows["hard"].gradient_norm, rows["soft"].gradient_norm
    share = logs["hard_gradient_share"]
    assert norms[0] / sum(norms) == pytest.approx(share, rel=1e-5)


def test_explain_says_what_was_not_computed():
    x, y = tiny.data()
    distiller = tiny.compiled(tiny.distiller(beta=0.0))
    rows = kd.explain(distiller, (x, y))
    assert rows[1].value is None
    assert [row.term for row in kd.explain(distiller, x)] == ["soft"]
    with pytest.raises(ValueError, match="Compile the distiller first"):
        kd.explain(tiny.distiller(), (x, y))
    with pytest.raises(TypeError, match="must be a distiller"):
        kd.explain(tiny.mlp(), (x, y))


def test_a_teacher_that_is_refused_leaves_the_one_before():
    distiller = made()
    before = distiller.teacher
    with pytest.raises(ValueError, match="features have shapes"):
        distiller.teacher = tiny.mlp(7)
    assert distiller.teacher is before
