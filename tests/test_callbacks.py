"""Backup: what is continued equals what was never interrupted."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd

LABELS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Killed(BaseException):
    """Ends a run where it stands: `fit` must not catch it."""


class Stop(keras.callbacks.Callback):
    """Kills a run after some batches, and remembers which it saw."""

    def __init__(self, after=None):
        super().__init__()
        self.after = after
        self.seen = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch_now = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append((self.epoch_now, batch))
        if len(self.seen) == self.after:
            raise Killed


def network(width, name):
    inputs = keras.Input((6,))
    x = keras.layers.Dense(width, "relu")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.3, seed=1)(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x), name=name)


def make_run():
    keras.utils.set_random_seed(3)
    teacher, student = network(8, "teacher"), network(4, "student")
    return kd.Distiller(student, teacher).compile(
        keras.optimizers.Adam(1e-2), loss=LABELS, metrics=["accuracy"]
    )


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(50, 6)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, generator.integers(0, 3, 50))).batch(
        8
    )


def fit(run, rows, callbacks, epochs=3):
    return run.fit(
        rows, epochs=epochs, verbose=0, callbacks=callbacks, shuffle=False
    ).history


@pytest.fixture(scope="module")
def uninterrupted(rows):
    run = make_run()
    history = fit(run, rows, [])
    return run, history


@pytest.mark.parametrize(("save_freq", "after"), [("epoch", 10), (2, 11)])
def test_a_killed_run_continues_exactly(
    tmp_path, rows, uninterrupted, save_freq, after
):
    path = tmp_path / "new" / "backup"
    first = Stop(after)
    with pytest.raises(Killed):
        fit(make_run(), rows, [kd.callbacks.Backup(path, save_freq), first])

    run, second = make_run(), Stop()
    history = fit(run, rows, [kd.callbacks.Backup(path, save_freq), second])

    whole, expected = uninterrupted
    for found, wanted in zip(run.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert history["loss"][-1] == expected["loss"][-1]
    assert history["accuracy"][-1] == expected["accuracy"][-1]
    saved = 7 if save_freq == "epoch" else 7 + 2  # batches the backup knew of
    every = [(epoch, batch) for epoch in range(3) for batch in range(7)]
    assert second.seen == every[saved:]


def test_steps_per_execution_that_do_not_divide_an_epoch(tmp_path, rows):
    def run():
        made = make_run()
        made.steps_per_execution = 4  # of 7 batches
        return made

    path = tmp_path / "backup"

    class InValidation(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            raise Killed

    options = {"validation_data": rows, "verbose": 0, "shuffle": False}
    with pytest.raises(Killed):
        run().fit(
            rows,
            epochs=2,
            callbacks=[kd.callbacks.Backup(path, 4), InValidation()],
            **options,
        )
    resumed, whole = run(), run()
    resumed.fit(rows, epochs=2, callbacks=[kd.callbacks.Backup(path, 4)], **options)
    whole.fit(rows, epochs=2, **options)
    assert resumed.optimizer.iterations.numpy() == 14
    for found, wanted in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_where_other_callbacks_write_is_not_restored(tmp_path, rows):
    path = tmp_path / "backup"
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv", append=True)
    with pytest.raises(Killed):
        fit(make_run(), rows, [kd.callbacks.Backup(path), log, Stop(10)])
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv", append=True)
    fit(make_run(), rows, [kd.callbacks.Backup(path), log])
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["epoch", "0", "1", "2"]


def test_more_epochs_than_asked_for_are_told(tmp_path, rows):
    path = tmp_path / "backup"
    fit(make_run(), rows, [kd.callbacks.Backup(path)], epochs=2)
    with pytest.warns(UserWarning, match="is of 2 epochs, more than"):
        fit(make_run(), rows, [kd.callbacks.Backup(path)], epochs=1)


def test_a_finished_run_returns_at_once(tmp_path, rows, uninterrupted):
    path = tmp_path / "backup"
    fit(make_run(), rows, [kd.callbacks.Backup(path)])
    run, again = make_run(), Stop()
    fit(run, rows, [kd.callbacks.Backup(path), again])
    assert again.seen == []
    for found, wanted in zip(
        run.get_weights(), uninterrupted[0].get_weights(), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_the_next_fit_begins_at_its_own_epoch(tmp_path, rows):
    path = tmp_path / "backup"
    fit(make_run(), rows, [kd.callbacks.Backup(path)], epochs=1)
    run = make_run()
    fit(run, rows, [kd.callbacks.Backup(path)], epochs=1)
    after = Stop()
    fit(run, rows, [after], epochs=1)
    assert len(after.seen) == 7


def test_other_callbacks_keep_their_state(tmp_path, rows):
    def patience():
        return keras.callbacks.EarlyStopping("loss", patience=50, min_delta=1e9)

    path = tmp_path / "backup"
    with pytest.raises(Killed):
        fit(make_run(), rows, [kd.callbacks.Backup(path), patience(), Stop(16)])
    waiting = patience()
    fit(make_run(), rows, [waiting, kd.callbacks.Backup(path), Stop()])
    unbroken = patience()
    fit(make_run(), rows, [unbroken])
    assert waiting.wait == unbroken.wait
    assert waiting.best == unbroken.best


def test_a_damaged_file_is_refused_and_the_one_before_is_used(tmp_path, rows):
    path = tmp_path / "backup"
    backup = kd.callbacks.Backup(path)
    fit(make_run(), rows, [backup])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="truncated or damaged.*before it is used"):
        fit(make_run(), rows, [kd.callbacks.Backup(path)])

    backup.previous.unlink()
    damaged = bytearray(whole)
    damaged[-9] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="truncated or damaged"):
        fit(make_run(), rows, [kd.callbacks.Backup(path)])
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a backup of this library"):
        fit(make_run(), rows, [kd.callbacks.Backup(path)])


def test_the_backup_of_another_run_is_refused(tmp_path, rows):
    path = tmp_path / "backup"
    fit(make_run(), rows, [kd.callbacks.Backup(path)], epochs=1)
    other = kd.Distiller(network(5, "student"), network(8, "teacher"))
    other.compile("sgd", loss=LABELS)
    with pytest.raises(ValueError, match="of another run"):
        fit(other, rows, [kd.callbacks.Backup(path)])


def test_a_folder_that_cannot_be_written_stops_only_the_backup(tmp_path, rows):
    (tmp_path / "file").write_text("in the way")
    backup = kd.callbacks.Backup(tmp_path / "file" / "backup")
    with pytest.warns(UserWarning, match="could not be written"):
        history = fit(make_run(), rows, [backup], epochs=1)
    assert len(history["loss"]) == 1


def test_save_freq_is_checked(tmp_path):
    with pytest.raises(ValueError, match="save_freq"):
        kd.callbacks.Backup(tmp_path / "backup", save_freq=0)


def test_the_run_of_a_plain_model_is_refused(tmp_path):
    model = tiny.mlp()
    model.compile("sgd", tiny.SPARSE)
    with pytest.raises(TypeError, match="kd.BaseDistiller"):
        model.fit(
            *tiny.data(), verbose=0, callbacks=[kd.callbacks.Backup(tmp_path / "b")]
        )
    assert not any(tmp_path.iterdir())
