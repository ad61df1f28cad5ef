"""Chains of generations: what they minimise, and how an interrupted one goes on."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import layers
from losses import golden as vectors

from keras_distill import generations
from keras_distill.averaging import AveragedModels
from keras_distill.generations.joining import joined, missing_label

OPTIONS = {
    "optimizer": keras.optimizers.Adam(0.01),
    "loss": tiny.SPARSE,
    "metrics": ["accuracy"],
    "run_eagerly": True,
}
QUIET = {"verbose": 0, "shuffle": False}


def build() -> keras.Model:
    """The same weights every time, so that two chains can be compared."""
    model = tiny.mlp()
    generator = np.random.default_rng(1)
    model.set_weights([generator.normal(0, 0.3, w.shape) for w in model.get_weights()])
    return model


def born_again(data, **kwargs) -> generations.Generations:
    kwargs = {"generations": 2, "epochs": 2, "batch_size": 8} | QUIET | kwargs
    return generations.born_again(build, OPTIONS, data, **kwargs)


class Watch(keras.callbacks.Callback):
    """Runs functions with the model when training begins and ends."""

    def __init__(self, begin=None, end=None):
        super().__init__()
        self.begin, self.end = begin, end

    def on_train_begin(self, logs=None):
        if self.begin:
            self.begin(self.model)

    def on_train_end(self, logs=None):
        if self.end:
            self.end(self.model, logs)


# -- what is minimised --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [("ban_kd", "ban"), ("ban_cwtm", "cwtm"), ("ban_dkpp", "dkpp")],
)
def test_golden(name, method):
    """One step with rate 1 of the second generation, from the file's logits."""
    golden = vectors.load(name)
    student, teacher = (golden.inputs[f"{k}_logits"] for k in ("student", "teacher"))
    rows = np.eye(len(student), dtype="float32")
    labels = golden.inputs.get("labels", np.zeros(len(rows), "int32"))
    seen = {}

    def table():  # row i picks row i of the kernel
        dense = layers.Dense(student.shape[1], use_bias=False, name="table")
        return keras.Sequential([keras.Input(rows.shape[1:]), dense])

    def begin(distiller):
        distiller.student.get_layer("table").kernel.assign(student)
        distiller.teacher.model.get_layer("table").kernel.assign(teacher)
        if method == "dkpp":
            permutation = golden.inputs["permutation"]
            distiller.soft_loss.permutation = lambda logits: permutation

    def end(distiller, logs):
        seen["loss"] = logs["loss"]
        seen["gradient"] = student - distiller.student.get_weights()[0]

    generations.born_again(
        table,
        OPTIONS | {"optimizer": keras.optimizers.SGD(1.0)},
        (rows, labels),
        generations=2,
        epochs=1,
        method=method,
        callbacks=lambda index: [Watch(begin, end)] if index else [],
        batch_size=len(rows),
        **QUIET,
    )
    reference = golden.gradients["student_logits"]
    assert seen["loss"] == pytest.approx(golden.loss, rel=2e-4)
    error = np.linalg.norm(seen["gradient"] - reference)
    assert error < 2e-3 * np.linalg.norm(reference)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", (1e-7, 1e-5)), ("float32", (2e-4, 2e-3))]
)
@pytest.mark.parametrize("name", ["ban_cwtm", "ban_dkpp"])
def test_objectives_in_both_precisions(name, dtype, tolerance):
    golden = vectors.load(name)
    student = tf.constant(golden.inputs["student_logits"], dtype)
    teacher = tf.constant(golden.inputs["teacher_logits"], dtype)
    if name == "ban_cwtm":
        loss = generations.ConfidenceWeighted(dtype=dtype)
        teacher = [teacher, golden.inputs["labels"]]
    else:
        loss = generations.PermutedTarget(dtype=dtype)
        loss.permutation = lambda logits: golden.inputs["permutation"]
    with tf.GradientTape() as tape:
        tape.watch(student)
        value = loss(teacher, student)
    gradient = tape.gradient(value, student).numpy()
    reference = golden.gradients["student_logits"]
    assert float(value) == pytest.approx(golden.loss, rel=tolerance[0])
    error = np.linalg.norm(gradient - reference)
    assert error < tolerance[1] * np.linalg.norm(reference)


def test_permutations_keep_the_first_class_and_change():
    logits = np.random.default_rng(0).normal(size=(500, 5)).astype("float32")
    loss = generations.PermutedTarget(seed=0)
    first, second = (loss.permutation(logits).numpy() for _ in range(2))
    for permutation in (first, second):
        np.testing.assert_array_equal(np.sort(permutation), [range(5)] * 500)
        best = logits.argmax(-1)
        np.testing.assert_array_equal(permutation[np.arange(500), best], best)
    assert (first != second).any(-1).mean() > 0.9
    others = first[logits.argmax(-1) == 0]  # class 1 gets any of 1 to 4 as often
    counts = np.bincount(others[:, 1], minlength=5)
    assert counts[0] == 0
    assert counts[1:].min() > len(others) / 4 / 2


def test_confidence_weights_leave_out_rows_without_label_or_weight():
    golden = vectors.load("ban_cwtm")
    student, teacher, labels = (
        golden.inputs[k] for k in ("student_logits", "teacher_logits", "labels")
    )
    loss = generations.ConfidenceWeighted()
    few = float(loss([teacher[:10], labels[:10]], student[:10]))
    hidden = np.where(np.arange(len(labels)) < 10, labels, -1)
    weights = (np.arange(len(labels)) < 10).astype("float32")
    share = 10 / len(labels)  # the mean runs over all rows
    assert float(loss([teacher, hidden], student)) == pytest.approx(few * share, 1e-5)
    weighted = float(loss([teacher, labels], student, weights))
    assert weighted == pytest.approx(few * share, 1e-5)


def test_label_refinery_replaces_the_labels():
    x, y = tiny.data()
    first = generations.label_refinery(
        build, OPTIONS, (x, y), generations=2, epochs=1, batch_size=24, **QUIET
    )
    logits = [first.models[0](x), build()(x)]
    log_p, log_q = (tf.nn.log_softmax(z).numpy() for z in logits)
    kl = np.mean(np.sum(np.exp(log_p) * (log_p - log_q), -1))
    logs = first.histories[1]
    assert logs["loss"][0] == pytest.approx(kl, rel=1e-4)
    assert logs["soft_loss"] == logs["loss"]


def test_teacher_assistants_go_from_size_to_size():
    result = generations.teacher_assistant(
        tiny.mlp, OPTIONS, tiny.data(), sizes=[8, 4, 2], epochs=1, alpha=0.5, **QUIET
    )
    widths = [model.get_layer("hidden").units for model in result.models]
    assert widths == [8, 4, 2]
    logs = {k: v[0] for k, v in result.histories[2].items()}
    total = 0.5 * logs["hard_loss"] + 0.9 * logs["soft_loss"]
    assert logs["loss"] == pytest.approx(total, rel=1e-5)
    with pytest.raises(ValueError, match=r"at least two sizes.*\[8\]"):
        generations.teacher_assistant(
            tiny.mlp, OPTIONS, tiny.data(), sizes=[8], epochs=1
        )


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("arrays", [True, False])
def test_unlabelled_rows_arejoined(arrays, one_hot):
    x, y = tiny.data(6)
    y = np.eye(tiny.CLASSES, dtype="float32")[y] if one_hot else y
    more, none = tiny.data(9, seed=1)[0], 0 if one_hot else -1
    if arrays:
        both, labels = joined((x, y), more, none)
        assert len(both) == len(labels) == 15
        np.testing.assert_array_equal(both[6:], more)
    else:
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(2)
        unlabelled = tf.data.Dataset.from_tensor_slices(more).batch(2)
        batches = list(joined(data, unlabelled, none).as_numpy_iterator())
        assert [len(batch[0]) for batch in batches] == [4, 4, 4, 4, 3]
        labels = np.concatenate([batch[1][:2] for batch in batches[:3]])
        np.testing.assert_array_equal(labels, y)
        labels = np.concatenate([labels, *(batch[1][2:] for batch in batches)])
    np.testing.assert_array_equal(labels[:6], y)
    assert (labels[6:] == none).all()


def test_noisy_student_counts_labels_and_the_teachers_word():
    x, y = tiny.data()
    more = tiny.data(24, seed=1)[0]
    result = generations.noisy_student(
        build,
        OPTIONS,
        (x, y),
        unlabelled=more,
        generations=2,
        epochs=1,
        batch_size=48,
        **QUIET,
    )
    logs = {k: v[0] for k, v in result.histories[1].items()}
    start = build()
    assert logs["hard_loss"] == pytest.approx(float(tiny.SPARSE(y, start(x))), 1e-4)
    both = np.concatenate([x, more])
    p = tf.nn.softmax(result.models[0](both))
    soft = -tf.reduce_mean(tf.reduce_sum(p * tf.nn.log_softmax(start(both)), -1))
    assert logs["soft_loss"] == pytest.approx(float(soft), rel=1e-4)
    with pytest.raises(ValueError, match="both be arrays, or both batched data sets"):
        generations.noisy_student(
            build,
            OPTIONS,
            (x, y),
            unlabelled=tf.data.Dataset.from_tensors(more),
            epochs=1,
        )


def test_noisy_student_refuses_what_cannot_be_missing():
    x, y = tiny.data()

    def run(data, loss):
        return generations.noisy_student(
            build, {"loss": loss}, data, unlabelled=x, epochs=1
        )

    assert missing_label({"loss": "crossentropy"}, (x, y)) == -1
    assert missing_label({"loss": "crossentropy"}, (x, np.eye(3)[y])) == 0
    with pytest.raises(ValueError, match="need a loss over classes"):
        run((x, y), "binary_crossentropy")
    with pytest.raises(ValueError, match="labels of one output"):
        run((x, {"a": y}), tiny.SPARSE)
    with pytest.raises(ValueError, match="no sample weights"):
        run((x, y, np.ones(24)), tiny.SPARSE)


@pytest.mark.parametrize("streamed", [False, True])
def test_noisy_student_with_labels_that_have_no_sign(streamed):
    x, y = tiny.data()
    more, pairs = tiny.data(24, seed=1)[0], (x, y.astype("uint8"))
    if streamed:
        pairs = tf.data.Dataset.from_tensor_slices(pairs).batch(24)
        more = tf.data.Dataset.from_tensor_slices(more).batch(24)
    options = {"generations": 2, "epochs": 1, **QUIET}
    result = generations.noisy_student(
        build, OPTIONS, pairs, unlabelled=more, **options
    )
    logs = result.histories[1]
    start = float(tiny.SPARSE(y, build()(x)))
    assert 0 < logs["hard_loss"][0] <= start * (1 + 1e-4)


# -- the chain ----------------------------------------------------------------------


def test_what_a_chain_returns(tmp_path):
    x, y = tiny.data()
    result = born_again((x, y), validation_data=(x, y), method="ban+l")
    assert len(result.models) == len(result.histories) == 2
    assert set(result.histories[1]) >= {"loss", "soft_loss", "val_accuracy"}
    assert all(len(values) == 2 for values in result.histories[1].values())
    p = [tf.nn.softmax(model(x)).numpy() for model in result.models]
    mean = np.mean(p, 0)
    np.testing.assert_allclose(result.ensemble(x), np.log(mean), rtol=1e-4)
    rows = result.table.as_dicts()
    assert [row["model"] for row in rows] == [
        "generation 0",
        "generation 1",
        "ensemble",
    ]
    right = [np.mean(q.argmax(-1) == y) for q in (*p, mean)]
    assert [row["val_accuracy"] for row in rows] == pytest.approx(right)
    assert "generation 1" in str(result.table)
    result.ensemble.save(tmp_path / "ensemble.keras")
    loaded = keras.saving.load_model(tmp_path / "ensemble.keras")
    assert isinstance(loaded, AveragedModels)
    np.testing.assert_array_equal(loaded(x), result.ensemble(x))


def test_every_generation_has_its_own_optimizer():
    optimizers = []
    watch = Watch(begin=lambda model: optimizers.append(model.optimizer))
    given = OPTIONS["optimizer"]
    born_again(tiny.data(), epochs=1, callbacks=[watch])
    assert len({id(optimizer) for optimizer in [given, *optimizers]}) == 3
    assert not given.built
    rates = [float(optimizer.learning_rate.numpy()) for optimizer in optimizers]
    assert rates == pytest.approx([0.01, 0.01])


class Killed(Exception):
    pass


class Kill(keras.callbacks.Callback):
    """Ends the run in the middle of an epoch, as if the process had been killed."""

    def __init__(self, epoch):
        super().__init__()
        self.at, self.epoch = epoch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == self.at and batch == 1:
            raise Killed


def test_an_interrupted_chain_goes_on(tmp_path):
    x, y = tiny.data()
    options = {"generations": 3, "epochs": 3, "validation_data": (x, y)}
    whole = born_again((x, y), **options)
    kills = {1: [Kill(2)]}
    with pytest.raises(Killed):
        born_again(
            (x, y),
            directory=tmp_path,
            callbacks=lambda index: kills.get(index, []),
            **options,
        )
    first = (tmp_path / "generation_0.keras").read_bytes()
    trained = []
    result = born_again(
        (x, y),
        directory=tmp_path,
        callbacks=lambda index: trained.append(index) or [],
        **options,
    )
    assert trained == [1, 2]
    assert (tmp_path / "generation_0.keras").read_bytes() == first
    for model, other in zip(result.models, whole.models, strict=True):
        assert tiny.same(model.get_weights(), other.get_weights())
    assert result.histories == whole.histories
    assert result.table == whole.table
    finished = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(finished) == {"chain.json"} | {
        f"generation_{i}.{suffix}" for i in range(3) for suffix in ("json", "keras")
    }
    again = born_again(
        (x, y),
        directory=tmp_path,
        callbacks=lambda index: pytest.fail("nothing is left to train"),
        **options,
    )
    assert again.histories == result.histories
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == finished


def test_random_permutations_go_on_where_they_stopped(tmp_path):
    options = {"epochs": 2, "method": "dkpp"}
    keras.utils.set_random_seed(3)
    whole = born_again(tiny.data(), **options)
    keras.utils.set_random_seed(3)
    with pytest.raises(Killed):
        born_again(
            tiny.data(),
            directory=tmp_path,
            callbacks=lambda index: [Kill(1)] if index else [],
            **options,
        )
    result = born_again(tiny.data(), directory=tmp_path, **options)
    assert tiny.same(result.models[1].get_weights(), whole.models[1].get_weights())


def test_a_damaged_or_foreign_folder_is_refused(tmp_path):
    data = tiny.data()
    folder = tmp_path / "chain"
    born_again(data, epochs=1, directory=folder)
    with pytest.raises(ValueError, match=r"holds another chain.*'epochs': 1"):
        born_again(data, epochs=2, directory=folder)
    with pytest.raises(ValueError, match=r"holds another chain.*'method': 'ban'"):
        born_again(data, epochs=1, directory=folder, method="cwtm")

    model = folder / "generation_1.keras"
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"generation_1\.keras' is truncated"):
        born_again(data, epochs=1, directory=folder)
    model.write_bytes(whole)
    record = folder / "generation_1.json"
    about = record.read_text()
    record.write_text(about[:-20])
    with pytest.raises(ValueError, match=r"generation_1\.json' is truncated"):
        born_again(data, epochs=1, directory=folder)
    record.unlink()
    with pytest.raises(ValueError, match=r"not written by this chain.*is missing"):
        born_again(data, epochs=1, directory=folder)
    record.write_text(json.dumps(json.loads(about) | {"teacher": "0" * 64}))
    with pytest.raises(ValueError, match="taught by another generation 0"):
        born_again(data, epochs=1, directory=folder)

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "generation_0.keras").write_bytes(whole)
    with pytest.raises(ValueError, match=r"holds \['generation_0\.keras'\], but no"):
        born_again(data, epochs=1, directory=foreign)


def test_low_precision_stays_finite():
    result = generations.born_again(
        lambda: tiny.mlp(dtype="mixed_float16"),
        lambda: OPTIONS | {"optimizer": keras.optimizers.SGD(0.1)},
        tiny.data(),
        generations=2,
        epochs=1,
        **QUIET,
    )
    assert all(np.isfinite(v).all() for v in result.histories[1].values())
    assert all(np.isfinite(w).all() for w in result.models[1].get_weights())


def test_bad_input():
    data = tiny.data()
    with pytest.raises(ValueError, match=r"one of ban, ban\+l, cwtm, dkpp.*'kd'"):
        born_again(data, method="kd")
    with pytest.raises(ValueError, match="`generations` must be .* above 0"):
        born_again(data, generations=0)
    with pytest.raises(ValueError, match="`epochs` must be .* above 0"):
        born_again(data, epochs=0)
    with pytest.raises(TypeError, match=r"`compile_args` must be a dict.*'adam'"):
        generations.born_again(build, "adam", data, epochs=1)
    with pytest.raises(ValueError, match="at least one model"):
        AveragedModels([])
