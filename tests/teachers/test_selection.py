"""Which rows of a transfer set are kept."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd
from keras_distill.teachers import Selection, cut, select_transfer_set

CLASSES = 3


def teacher():
    """Logits are four times the inputs, which is also what `embedding` gives."""
    inputs = keras.Input((CLASSES,))
    x = keras.layers.Dense(CLASSES, name="embedding", use_bias=False)(inputs)
    model = keras.Model(inputs, keras.layers.Rescaling(4.0)(x))
    model.set_weights([np.eye(CLASSES)])
    return model


def clusters(rows=60):
    """Rows near the corners of a triangle, and the numbers of their corners."""
    random = np.random.default_rng(0)
    y = np.arange(rows) % CLASSES
    x = np.eye(CLASSES)[y] + random.normal(0, 0.1, (rows, CLASSES))
    return x.astype("float32"), y


def with_wrong_labels(y):
    """Every tenth label is the next class's."""
    wrong = np.arange(len(y)) % 10 == 0
    return np.where(wrong, (y + 1) % CLASSES, y), wrong


@pytest.mark.parametrize("seed", range(20))
def test_the_cut_is_the_best_of_all_labelings(seed):
    random = np.random.default_rng(seed)
    costs = random.normal(size=7) * 10.0 ** random.integers(-3, 4)
    pairs = itertools.combinations(range(7), 2)
    edges = np.array([pair for pair in pairs if random.random() < 0.5])
    weights = random.random(len(edges)) * np.abs(costs).mean()
    labelings = np.array(list(itertools.product([False, True], repeat=7)))
    cut_edges = labelings[:, edges[:, 0]] != labelings[:, edges[:, 1]]
    energies = labelings @ costs + cut_edges @ weights
    found = cut.keep_or_drop(costs, edges, weights)
    np.testing.assert_array_equal(found, labelings[energies.argmin()])


def test_without_edges_each_row_is_decided_alone():
    nothing = np.zeros((0, 2), int)
    found = cut.keep_or_drop(np.array([-1e9, 1e-9, -1e-9, 0]), nothing, np.zeros(0))
    assert found.tolist() == [True, False, True, False]


def test_an_edge_that_is_there_twice_weighs_twice():
    both = np.array([[0, 1], [1, 0]])
    one = cut.keep_or_drop(np.array([-1.0, 1.5]), both[:1], np.array([0.6]))
    two = cut.keep_or_drop(np.array([-1.0, 0.9]), both, np.array([0.6, 0.6]))
    assert one.tolist() == [True, False]
    assert two.tolist() == [True, True]


@pytest.mark.parametrize("embedding", [None, "embedding"])
def test_the_graph_drops_what_lies_in_another_class(embedding):
    x, y = clusters()
    given, wrong = with_wrong_labels(y)
    found = select_transfer_set(teacher(), (x, given), embedding=embedding)
    assert isinstance(found, Selection)
    assert not found.keep[wrong].any()
    assert found.keep[~wrong].mean() > 0.9
    assert found.cost[wrong].min() > found.cost[~wrong].mean()


def test_the_graph_minimises_its_energy():
    """The energy of the docs, over all labelings of nine rows."""
    x, y = clusters(9)
    x += np.random.default_rng(1).normal(0, 0.5, x.shape).astype("float32")
    threshold = 1.5
    found = select_transfer_set(teacher(), (x, y), threshold=threshold)
    rows = 4 * x.astype("float64")
    rows -= rows.mean(-1, keepdims=True)
    rows -= rows.mean(0)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    distance = np.empty(9)
    for c in range(CLASSES):
        apart = np.linalg.norm(rows[y == c] - rows[y == c].mean(0), axis=-1)
        distance[y == c] = apart / np.median(apart)
    squares = np.square(rows[:, None] - rows).sum(-1)  # eight others: all are near
    other = y[:, None] != y
    cost = distance + other.sum(-1) / 8
    np.testing.assert_allclose(found.cost, cost, rtol=1e-5)
    weights = 0.5 / 8 * np.exp(-squares / (squares.sum() / 72)) * ~other

    def energy(s):
        pairs = (weights * (s[:, None] != s)).sum()
        return (s * cost).sum() + (~s * threshold).sum() + pairs

    labelings = [np.array(s) for s in itertools.product([False, True], repeat=9)]
    best = min(labelings, key=energy)
    assert 0 < best.sum() < 9
    np.testing.assert_array_equal(found.keep, best)


def test_confidence():
    x, _ = clusters()
    found = select_transfer_set(teacher(), x, method="confidence", threshold=0.95)
    p = keras.ops.convert_to_numpy(keras.ops.softmax(4 * x)).max(-1)
    np.testing.assert_array_equal(found.keep, p >= 0.95)
    np.testing.assert_allclose(found.cost, 1 - p, atol=1e-6)
    assert (found.labels == -1).all()


@pytest.mark.parametrize("one_hot", [False, True])
def test_agreement(one_hot):
    x, y = clusters()
    given, wrong = with_wrong_labels(y)
    labels = np.eye(CLASSES)[given] if one_hot else given[:, None]
    found = select_transfer_set(teacher(), (x, labels), method="agreement")
    np.testing.assert_array_equal(found.keep, ~wrong)
    sure = select_transfer_set(
        teacher(), (x, labels), method="agreement", threshold=0.95
    )
    assert sure.keep.sum() < found.keep.sum()


def test_the_filter_knows_rows_by_what_they_are():
    x, y = clusters()
    given, wrong = with_wrong_labels(y)
    rows = tf.data.Dataset.from_tensor_slices((x, given))
    found = select_transfer_set(teacher(), rows.batch(16), method="agreement")
    shuffled = rows.shuffle(60, seed=0).repeat(2)
    kept = [row.numpy() for row, _ in found.filter(shuffled)]
    assert len(kept) == 2 * (~wrong).sum()
    expected = np.sort(x[~wrong].view("V12").ravel())
    np.testing.assert_array_equal(
        np.unique(np.stack(kept).view("V12")), np.unique(expected)
    )


def test_batches_lose_their_dropped_rows():
    x, y = clusters()
    wrong = np.arange(60) < 20
    given = np.where(wrong, (y + 1) % CLASSES, y)
    rows = tf.data.Dataset.from_tensor_slices(({"a": x}, given))
    model = kd.teachers.Model(teacher(), inputs="a")
    found = select_transfer_set(model, ({"a": x}, given), method="agreement")
    batches = list(found.filter(rows.batch(16)))
    assert [len(labels) for _, labels in batches] == [12, 16, 12]  # none of the first
    np.testing.assert_array_equal(
        np.concatenate([inputs["a"] for inputs, _ in batches]), x[~wrong]
    )


def test_elements_keep_their_form():
    x, _ = clusters()
    found = select_transfer_set(teacher(), x, method="confidence", threshold=0.5)
    for rows in (
        tf.data.Dataset.from_tensor_slices(x),
        tf.data.Dataset.from_tensor_slices((x,)),
    ):
        for dataset in (rows, rows.batch(8)):
            filtered = found.filter(dataset)
            assert isinstance(filtered.element_spec, type(dataset.element_spec))


def test_another_row_is_an_error():
    x, _ = clusters()
    found = select_transfer_set(teacher(), x, method="confidence", threshold=0.5)
    with pytest.raises(tf.errors.InvalidArgumentError, match="not among the data"):
        list(found.filter(tf.data.Dataset.from_tensor_slices(x + 1)))
    with pytest.raises(TypeError, match=r"must be a tf\.data\.Dataset"):
        found.filter(x)


def test_rows_that_are_the_same_share_their_verdict():
    x, y = clusters(6)
    x, y = np.concatenate([x, x]), np.concatenate([y, (y + 1) % CLASSES])
    found = select_transfer_set(teacher(), (x, y), method="agreement")
    assert found.keep.all()


def test_the_report_counts_and_shows(tmp_path):
    random = np.random.default_rng(0)
    x = random.random((12, 6, 6, 1)).astype("float32")
    y = random.integers(0, CLASSES, 12)
    model = keras.Sequential(
        [keras.Input((6, 6, 1)), keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
    )
    found = select_transfer_set(model, (x, y), method="agreement")
    text = found.report(tmp_path / "dropped.png")
    last = text.splitlines()[-1].split()
    assert last[:3] == ["all", "12", str((~found.keep).sum())]
    assert last[-4:] == ["100.0", "%", "0.0", "%"]
    with_pictures = (tmp_path / "dropped.png").stat().st_size
    flat, y = clusters()
    plain = select_transfer_set(
        teacher(), (flat, with_wrong_labels(y)[0]), method="agreement"
    )
    assert plain.report().splitlines()[-1].split()[2] == "6"
    plain.report(tmp_path / "plain.png")
    assert with_pictures > (tmp_path / "plain.png").stat().st_size > 5000


def test_the_report_shows_the_rows_that_cost_most(tmp_path):
    x = np.stack([np.full((4, 4), i, "float32") for i in range(60)])
    x[:, 0, 0] += 1
    model = keras.Sequential(
        [keras.Input((4, 4)), keras.layers.Flatten(), keras.layers.Dense(2)]
    )
    model.set_weights([np.tile([[0.01, 0.0]], (16, 1)), np.zeros(2)])
    found = select_transfer_set(model, x, method="confidence", threshold=0.99)
    dropped = np.flatnonzero(~found.keep)
    assert len(dropped) > 20
    pictures = found._pictures(dropped[:5])
    assert list(pictures) == dropped[:5].tolist()
    for picture in pictures.values():  # scaled to [0, 1]
        assert (picture.min(), picture.max()) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "best"}, "`method` must be one of"),
        ({"method": "confidence", "embedding": "embedding"}, "has no effect"),
        ({"method": "confidence", "threshold": 1.5}, "is a probability"),
        ({"threshold": 0.0}, "above 0"),
        ({"threshold": float("nan")}, "above 0"),
        ({"embedding": "embeding"}, "Nearest names"),
        ({"embedding": ["embedding"]}, "one layer"),
        ({"method": "agreement"}, "60 of 60 rows have none"),
        ({"method": "confidence", "threshold": 1.0}, "no rows left"),
        ({"threshold": 1e-6}, "no rows left"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_transfer_set(teacher(), clusters()[0], **arguments)


def test_bad_data():
    x, y = clusters()
    with pytest.raises(ValueError, match="has no rows"):
        select_transfer_set(teacher(), x[:0])
    with pytest.raises(ValueError, match="up to 3, but the teacher has 3 classes"):
        select_transfer_set(teacher(), (x, y + 1), method="agreement")
    x[3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        select_transfer_set(teacher(), x)


def test_few_rows():
    x, _ = clusters()
    assert select_transfer_set(teacher(), x[:1]).keep.tolist() == [True]
    assert select_transfer_set(teacher(), x[[0, 3, 6]]).keep.all()


@pytest.mark.parametrize("batched", [False, True])
def test_rows_with_none_for_labels_are_filtered(batched):
    teacher = tiny.teacher()
    x, _ = tiny.data()
    data = tf.data.Dataset.from_tensor_slices(x).map(lambda row: (row, None))
    data = data.batch(8) if batched else data
    chosen = select_transfer_set(teacher, data, method="confidence", threshold=0.9)
    found = [row for row, _ in chosen.filter(data)]
    found = np.concatenate(found) if batched else np.stack(found)
    np.testing.assert_array_equal(found, x[chosen.keep])
