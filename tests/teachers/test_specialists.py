"""Specialists: what all say together, how they are made, and the biases of classes."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import ops

import keras_distill as kd
from keras_distill.teachers.specialists import Specialists


def log_softmax(logits):
    z = np.asarray(logits, "float64")
    z = z - z.max(-1, keepdims=True)
    return (z - np.log(np.exp(z).sum(-1, keepdims=True))).astype("float32")


def unit(width: int) -> keras.Model:
    """The smallest model with so many logits."""
    return keras.Sequential([keras.Input((tiny.FEATURES,)), keras.layers.Dense(width)])


def whole(classes, count: int = 3, **options) -> Specialists:
    """Small untrained models for the given classes."""
    specialists = [unit(len(ids) + 1) for ids in classes]
    return Specialists(unit(count), specialists, classes, **options)


def objective(q, general, special, classes, active):
    """KL(p_g | q) + Σ KL(p_m | q) for one row and many q, in float64."""
    p = np.exp(general.astype("float64"))
    total = (p * (np.log(p) - np.log(q))).sum(-1)
    for log_p, ids, is_active in zip(special, classes, active, strict=True):
        own = q[:, list(ids)]
        summed = np.concatenate([own, 1 - own.sum(-1, keepdims=True)], -1)
        p = np.exp(log_p.astype("float64"))
        total += is_active * (p * (np.log(p) - np.log(summed))).sum(-1)
    return total


@pytest.mark.parametrize(
    ("classes", "top"),
    [([[0, 1]], 1), ([[0], [1, 2]], 1), ([[2, 0], [1]], 2), ([[0, 1], [1, 2], [1]], 3)],
)
def test_brute_force_over_all_distributions_of_three_classes(classes, top):
    generator = np.random.default_rng(1)
    general = log_softmax(generator.normal(size=(8, 3)))
    special = [log_softmax(generator.normal(size=(8, len(c) + 1))) for c in classes]
    teacher = whole(classes, top=top)
    log_q = np.asarray(teacher.combine(general, special))
    np.testing.assert_allclose(np.exp(log_q).sum(-1), 1, rtol=1e-5)
    size = 400
    a, b = np.meshgrid(*[np.arange(1, size) / size] * 2)
    grid = np.stack([a, b, 1 - a - b], -1).reshape(-1, 3)
    grid = grid[grid[:, 2] > 0.5 / size]
    for row, z in enumerate(log_q):
        best = np.argsort(-general[row])[:top]
        active = [bool(set(best) & set(ids)) for ids in classes]
        arguments = (general[row], [p[row] for p in special], classes, active)
        brute = grid[np.argmin(objective(grid, *arguments))]
        np.testing.assert_allclose(np.exp(z), brute, atol=1.5 / size)
        found = objective(np.exp(z)[None].astype("float64"), *arguments)
        assert found[0] <= objective(grid, *arguments).min() + 1e-6


def test_one_active_specialist_is_solved_in_one_step():
    generator = np.random.default_rng(0)
    general = log_softmax(5 * generator.normal(size=(50, 7)))
    classes = [[0, 1, 4], [2, 5]]
    special = [log_softmax(5 * generator.normal(size=(50, n))) for n in (4, 3)]
    first, last = (
        np.asarray(whole(classes, 7, steps=n).combine(general, special))
        for n in (1, 40)
    )
    np.testing.assert_allclose(first, last, atol=1e-4)
    # In closed form: half of each opinion, the dustbin by the generalist's shares.
    for row, z in enumerate(first):
        p = np.exp(general[row].astype("float64"))
        owner = [m for m, ids in enumerate(classes) if p.argmax() in ids]
        expected = p
        if owner:
            ids, said = classes[owner[0]], np.exp(special[owner[0]][row])
            rest = np.setdiff1d(range(7), ids)
            expected = p / 2
            expected[ids] += said[:-1] / 2
            expected[rest] += said[-1] / 2 * p[rest] / p[rest].sum()
        np.testing.assert_allclose(np.exp(z), expected, atol=1e-5)


def test_without_an_active_specialist_the_generalist_speaks():
    teacher = whole([[0], [1]])
    general = log_softmax([[0.0, 1.0, 3.0], [0.0, 0.0, 1e4]])
    special = [log_softmax([[9.0, -9.0]] * 2)] * 2
    np.testing.assert_allclose(teacher.combine(general, special), general, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_logits_stay_finite(scale):
    generator = np.random.default_rng(0)
    general = log_softmax(scale * generator.normal(size=(6, 3)))
    special = [log_softmax(scale * generator.normal(size=(6, 2))) for _ in range(2)]
    log_q = whole([[0], [1]], top=3).combine(general, special)
    assert np.all(np.isfinite(log_q))
    np.testing.assert_allclose(ops.sum(ops.exp(log_q), -1), 1, rtol=1e-4)


def test_it_runs_compiled_by_xla_and_per_position():
    general = log_softmax(np.random.default_rng(0).normal(size=(2, 4, 3)))
    special = [log_softmax(np.random.default_rng(1).normal(size=(2, 4, 3)))]
    teacher = whole([[0, 2]], steps=5)
    expected = teacher.combine(general[:, 0], [special[0][:, 0]])
    compiled = tf.function(teacher.combine, jit_compile=True)(general, special)
    np.testing.assert_allclose(compiled[:, 0], expected, rtol=1e-5)


# -- as a teacher ----------------------------------------------------------------------


def test_a_distiller_learns_from_the_whole_and_never_changes_it(tmp_path):
    x, y = tiny.data(16)
    generalist = tiny.teacher()
    teacher = Specialists(generalist, [unit(3), unit(2)], [[0, 1], [2]], steps=5)
    before = tiny.values(teacher.variables)
    link = kd.Link("hidden", "hidden", "mse", adapter="auto")
    distiller = tiny.distiller(known=teacher, links=[link], temperature=3.0)
    tiny.compiled(distiller, run_eagerly=False, optimizer=keras.optimizers.Adam(0.03))
    log_q, _ = teacher(x, (), 3.0)
    first = kd.losses.SoftTarget(3.0)(log_q, distiller.student(x))
    logs = tiny.history(distiller, x, y, batch_size=16, epochs=8)
    assert logs["soft_loss"][0] == pytest.approx(float(first), rel=1e-4)
    assert logs["soft_loss"][-1] < 0.8 * logs["soft_loss"][0]
    assert len(before) == len(generalist.variables) + 4
    assert tiny.same(before, tiny.values(teacher.variables))
    ours = {id(v) for v in teacher.variables}
    assert not ours & {id(v) for v in distiller.variables}

    distiller.save(tmp_path / "d.keras")
    loaded = keras.saving.load_model(tmp_path / "d.keras")
    parts = (generalist, teacher.specialists)
    with pytest.raises(ValueError, match="not the teacher"):
        loaded.teacher = Specialists(*parts, [[1, 0], [2]], steps=5)
    loaded.teacher = Specialists(*parts, [[0, 1], [2]], steps=5)
    assert loaded.teacher.fingerprint() == teacher.fingerprint()


def test_features_are_the_generalists():
    teacher = Specialists(tiny.teacher(), [unit(3)], [[0, 1]], steps=1)
    assert teacher.resolve("hidden") == "hidden"
    assert teacher.tap_specs(["hidden"])["hidden"].shape == (None, 12)
    with pytest.raises(ValueError, match="no_such"):
        teacher.resolve("no_such")
    with pytest.raises(ValueError, match="LogitMSE"):
        tiny.distiller(known=teacher, soft_loss=kd.losses.LogitMSE())


@pytest.mark.parametrize(
    ("widths", "classes", "options", "error", "match"),
    [
        ([], [], {}, ValueError, "`specialists` must hold at least one"),
        ([3], [[0, 1], [2]], {}, ValueError, "`classes` must have one list per"),
        ([4], [[0, 1]], {}, ValueError, r"specialists\[0\] must have 3 outputs"),
        ([3], [[0, 3]], {}, ValueError, r"`classes\[0\]` must hold 1 to 2 different"),
        ([3], [[0, -1]], {}, ValueError, r"`classes\[0\]` must hold"),
        ([3], [[0, 0]], {}, ValueError, r"`classes\[0\]` must hold"),
        ([4], [[0, 1, 2]], {}, ValueError, "left for the dustbin"),
        ([2], [[]], {}, ValueError, r"`classes\[0\]` must hold"),
        ([2], [[0.5]], {}, TypeError, r"`classes\[0\]` must be a list of integers"),
        ([2], [[0]], {"top": 4}, ValueError, "`top` must be .* at most 3"),
        ([2], [[0]], {"steps": 0}, ValueError, "`steps` must be an integer"),
    ],
)
def test_bad_input(widths, classes, options, error, match):
    with pytest.raises(error, match=match):
        Specialists(unit(3), [unit(w) for w in widths], classes, **options)


def test_teachers_for_one_temperature_are_refused():
    ensemble = kd.teachers.Ensemble([unit(3), unit(3)])
    with pytest.raises(ValueError, match="`generalist`: .* for one temperature"):
        Specialists(ensemble, [unit(2)], [[0]])


# -- made from a generalist ------------------------------------------------------------


def net(classes: int) -> keras.Model:
    inputs = keras.Input((8, 8, 1))
    z = keras.layers.Flatten()(inputs)
    z = keras.layers.Dense(12, "relu")(z)
    return keras.Model(inputs, keras.layers.Dense(classes, name="logits")(z))


@pytest.fixture(scope="module")
def digits():
    return kd.datasets.load("digits")


@pytest.fixture(scope="module")
def generalist(digits):
    keras.utils.set_random_seed(0)
    model = net(10)
    model.compile(keras.optimizers.Adam(0.005), tiny.SPARSE)
    model.fit(*digits.train, batch_size=50, epochs=3, verbose=0)
    return model


@pytest.fixture(scope="module")
def specialists(generalist, digits):
    before = tiny.values(generalist.variables)
    teacher = kd.teachers.train_specialists(
        generalist, net, digits.train, 3, epochs=3, batch_size=50, verbose=0
    )
    assert tiny.same(before, tiny.values(generalist.variables))
    return teacher


def test_every_class_has_its_specialist(specialists):
    assert sorted(sum(map(list, specialists.classes), [])) == list(range(10))


def test_the_whole_beats_the_generalist_on_digits(specialists, generalist, digits):
    x, y = digits.test
    log_q, _ = specialists(x, (), 1.0)
    alone = ops.mean(keras.losses.sparse_categorical_crossentropy(y, generalist(x), 1))
    together = ops.mean(keras.losses.sparse_categorical_crossentropy(y, log_q, 1))
    assert float(together) < float(alone)


def test_the_correction_undoes_the_over_sampling(digits):
    """Without features a specialist can only learn how frequent its classes are."""
    _, y = digits.train
    x = np.zeros((len(y), 1), "float32")

    def blind(classes):
        return keras.Sequential([keras.Input((1,)), keras.layers.Dense(classes)])

    model = blind(10)
    # Something to group by: two kinds of classes, whose odds depend on x.
    model.set_weights([np.repeat([[1.0, -1.0]], [3, 7], 1), np.zeros(10)])
    x[::2] = 1.0
    teacher = kd.teachers.train_specialists(
        model,
        blind,
        (x, y),
        2,
        epochs=8,
        batch_size=100,
        optimizer=keras.optimizers.SGD(1.0),
        verbose=0,
    )
    assert {len(ids) for ids in teacher.classes} == {3, 7}
    for specialist, ids in zip(teacher.specialists, teacher.classes, strict=True):
        bias = specialist.model.layers[-1].bias
        dustbin = float(ops.softmax(bias)[-1])
        expected = 1 - np.isin(y, ids).mean()
        assert dustbin == pytest.approx(expected, abs=0.05)


def test_specialists_begin_with_what_the_generalist_knows(generalist, digits):
    frozen = keras.optimizers.SGD(0.0)
    rows = tf.data.Dataset.from_tensor_slices(digits.train)
    teacher = kd.teachers.train_specialists(
        generalist, net, rows, 2, optimizer=frozen, batch_size=500, verbose=0
    )
    own, ids = teacher.specialists[0].model, list(teacher.classes[0])
    x = digits.test[0][:5]
    np.testing.assert_allclose(
        own(x)[:, :-1], np.asarray(generalist(x))[:, ids], rtol=1e-4, atol=1e-4
    )
    share = np.isin(digits.train[1], ids).mean()
    rest = np.setdiff1d(range(10), ids)
    dustbin = np.asarray(generalist(x))[:, rest].mean(-1) + np.log(len(rest))
    expected = dustbin + np.log((1 - share) / share)
    np.testing.assert_allclose(own(x)[:, -1], expected, rtol=1e-4, atol=1e-4)


def test_distilling_the_whole_lowers_the_soft_loss(specialists, digits):
    distiller = kd.Distiller(net(10), specialists, alpha=0.0, beta=1.0)
    distiller.compile(keras.optimizers.Adam(0.01))
    logs = tiny.history(distiller, digits.train[0], batch_size=100, epochs=3)
    assert logs["soft_loss"][-1] < 0.5 * logs["soft_loss"][0]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"number": 1}, ValueError, "`num_specialists` must be an integer from 2"),
        ({"number": 4}, ValueError, "`num_specialists` must be an integer from 2"),
        ({"batch_size": 5}, ValueError, "`batch_size` must be an even integer"),
        ({"build": lambda n: tiny.mlp()}, ValueError, r"`build\(classes\)` must"),
        ({"y": np.zeros(24)}, TypeError, "must be one integer label per row"),
        ({"y": np.full(24, 3)}, ValueError, "labels must be from 0 to 2"),
        ({"y": np.full(24, 1)}, ValueError, "must have rows of the classes"),
        ({"data": np.zeros((24, 6))}, ValueError, r"must be a tuple \(x, y\)"),
        ({"generalist": None}, TypeError, "must be a keras.Model"),
        ({"use_bias": False}, ValueError, "must have one bias for each"),
    ],
)
def test_bad_input_for_training(change, error, match):
    x, y = tiny.data(24)
    head = keras.layers.Dense(3, use_bias=change.get("use_bias", True))
    generalist = keras.Sequential([keras.Input((tiny.FEATURES,)), head])
    with pytest.raises(error, match=match):
        kd.teachers.train_specialists(
            change.get("generalist", generalist),
            change.get("build", unit),
            change.get("data", (x, change.get("y", y))),
            change.get("number", 2),
            batch_size=change.get("batch_size", 8),
        )


def test_a_generalist_that_tells_nothing_apart_is_refused():
    x, y = tiny.data(24)
    generalist = unit(3)
    generalist.set_weights([np.zeros_like(w) for w in generalist.get_weights()])
    with pytest.raises(ValueError, match="tells only 1 groups of classes apart"):
        kd.teachers.train_specialists(generalist, unit, (x, y), 2)


# -- biases ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "softmax"])
def test_correct_bias_gives_classes_their_share(activation):
    x, _ = tiny.data(200)
    model = keras.Sequential(
        [
            keras.Input((tiny.FEATURES,)),
            keras.layers.Dense(4, "relu"),
            keras.layers.Dense(4, activation),
        ]
    )
    before = model.get_weights()
    shifts = kd.teachers.correct_bias(model, x, {2: 0.4, 0: 0.1})
    p = model.predict(x, verbose=0)
    p = p if activation else np.exp(log_softmax(p))
    assert p.mean(0)[[2, 0]] == pytest.approx([0.4, 0.1], abs=1e-4)
    after = model.get_weights()
    assert tiny.same(before[:-1], after[:-1])
    expected = [shifts[0], 0, shifts[2], 0]
    np.testing.assert_allclose(after[-1] - before[-1], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("shares", "match"),
    [
        ({}, "`shares` must name classes from 0 to 2"),
        ({3: 0.1}, "`shares` must name classes from 0 to 2"),
        ({0: 0.0}, "`shares` must be above 0"),
        ({0: 0.5, 1: 0.5}, "sum below 1"),
    ],
)
def test_shares_out_of_range(shares, match):
    with pytest.raises(ValueError, match=match):
        kd.teachers.correct_bias(unit(3), tiny.data(4)[0], shares)
