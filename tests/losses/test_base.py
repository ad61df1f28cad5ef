"""What all losses share: base.py, labels.py, batch.py."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_distill.losses import base, batch, labels


class PerPosition(base.DistillationLoss):
    """A value for every position; remembers what it was given."""

    def call(self, y_true, y_pred, rows=None):
        self.seen = y_true, y_pred
        return y_pred - keras.ops.cast(y_true, y_pred.dtype)


class AcrossBatch(base.DistillationLoss):
    """The sum of the rows in the batch, for each row."""

    across_batch = True

    def call(self, y_true, y_pred, rows=None):
        self.rows = rows
        return rows * keras.ops.sum(rows * y_pred)


def test_integers_stay_integers_and_floats_become_float32():
    loss = PerPosition()
    loss(np.array([2049, 257]), np.zeros(2, "float16"))
    true, pred = loss.seen
    np.testing.assert_array_equal(true, [2049, 257])
    assert keras.backend.standardize_dtype(true.dtype).startswith("int")
    assert pred.dtype == "float32"


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(None, "float32"), ("float64", "float64"), (keras.DTypePolicy("float32"),) * 2],
)
def test_dtype(dtype, wanted):
    loss = PerPosition(dtype=dtype)
    wanted = getattr(wanted, "name", wanted)
    assert loss(np.zeros(3), np.zeros(3)).dtype == wanted
    assert loss.get_config()["dtype"] == wanted


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_float16"])
def test_low_precision_is_refused(dtype):
    with pytest.raises(ValueError, match="dtype="):
        PerPosition(dtype=dtype)


def test_global_mixed_precision_does_not_reach_the_losses():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        assert PerPosition()(np.zeros(2), np.ones(2)).dtype == "float32"
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 2), (2, 2, 1), ()])
def test_weights_are_aligned_from_the_left(shape):
    # (B, H, W) values with H = W = B: alignment from the right would go unnoticed.
    values = np.arange(8, dtype="float32").reshape(2, 2, 2)
    weight = np.arange(1, 1 + np.prod(shape, dtype=int), dtype="float32")
    weight = weight.reshape(shape)
    full = weight.reshape(shape + (1,) * (3 - len(shape)))
    found = PerPosition(reduction=None)(np.zeros_like(values), values, weight)
    np.testing.assert_allclose(found, values * full)
    found = PerPosition()(np.zeros_like(values), values, weight)
    assert float(found) == pytest.approx((values * full).mean())
    found = PerPosition(reduction="mean_with_sample_weight")(
        np.zeros_like(values), values, weight
    )
    full = np.broadcast_to(full, values.shape)
    assert float(found) == pytest.approx((values * full).sum() / full.sum())


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2, 2), (2, 1, 1, 4)])
def test_weights_that_do_not_fit(shape):
    values = np.zeros((2, 2, 2), "float32")
    with pytest.raises(ValueError, match="sample_weight"):
        PerPosition()(values, values, np.ones(shape, "float32"))


@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size", None])
def test_masks(reduction):
    values = tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    values._keras_mask = tf.constant([True, False, True])
    weight = np.array([1.0, 7.0, 3.0], "float32")
    loss = PerPosition(reduction=reduction)
    wanted = {"sum": 36.0, "sum_over_batch_size": 36.0 / 4}
    found = loss(tf.zeros((3, 2)), values, weight)
    if reduction:
        assert float(found) == pytest.approx(wanted[reduction])
    else:
        np.testing.assert_allclose(found, [[1, 2], [0, 0], [15, 18]])


def test_mask_that_leaves_nothing():
    values = tf.constant([1.0, 2.0])
    values._keras_mask = tf.constant([False, False])
    assert float(PerPosition()(tf.zeros(2), values)) == 0


@pytest.mark.parametrize("weight", [[1.0, 0.0, 2.0], [[1.0], [0.0], [2.0]]])
def test_rows_of_weight_zero_are_not_in_the_batch(weight):
    loss = AcrossBatch(reduction="sum")
    pred = tf.constant([1.0, 10.0, 100.0])
    assert float(loss(pred, pred, np.array(weight, "float32"))) == 303.0
    np.testing.assert_array_equal(loss.rows, [1, 0, 1])
    pred._keras_mask = tf.constant([True, True, False])
    assert float(loss(pred, pred)) == 22.0


def test_repr():
    assert repr(PerPosition(name="a")) == "PerPosition()"


def test_lists_of_numbers_are_tensors():
    assert float(PerPosition()([[1.0, 2.0]], [[2.0, 5.0]])) == 2.0


def test_shapes_unknown_until_the_step_are_accepted():
    unknown = keras.KerasTensor((None, 3))
    base.check_same_shape(PerPosition(), unknown, np.zeros((4, 3)))
    with pytest.raises(ValueError, match="PerPosition compares equal shapes"):
        base.check_same_shape(PerPosition(), unknown, np.zeros((4, 2)))


def test_read_labels():
    logits = np.zeros((4, 3), "float32")
    loss = PerPosition()
    target, known = labels.read_labels(loss, np.array([2, 0, -1, 1]), logits)
    np.testing.assert_array_equal(known, [1, 1, 0, 1])
    np.testing.assert_array_equal(np.argmax(target, -1), [2, 0, 0, 1])
    np.testing.assert_array_equal(np.sum(target, -1), 1)
    # Per position: segmentation, sequences.
    grid = np.array([[0, 1], [2, -1]])
    target, known = labels.read_labels(loss, grid, np.zeros((2, 2, 3), "float32"))
    assert target.shape == (2, 2, 3)
    np.testing.assert_array_equal(known, [[1, 1], [1, 0]])
    # One row and one class more are two classes: (B, 1) is never one-hot.
    target, _ = labels.read_labels(loss, np.array([[1], [0]]), logits[:2, :2])
    np.testing.assert_array_equal(np.argmax(target, -1), [1, 0])


def test_labels_that_do_not_fit():
    for shape in ((3,), (4, 2), (4, 3, 1)):
        with pytest.raises(ValueError, match=r"labels of shape \(4,\)"):
            labels.read_labels(
                PerPosition(), np.zeros(shape, "int32"), np.zeros((4, 3), "float32")
            )


def test_gram_knows_its_gradient():
    rng = np.random.default_rng(0)
    x, upstream = tf.constant(rng.normal(size=(4, 3))), rng.normal(size=(4, 4))
    for function in (batch.gram, lambda x: tf.matmul(x, x, transpose_b=True)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = tf.reduce_sum(function(x) * upstream)
        if function is batch.gram:
            found = tape.gradient(value, x)
    np.testing.assert_allclose(found, tape.gradient(value, x), rtol=1e-12)


def test_squared_distances():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 3)) + 50.0
    x[3] = x[1]
    kept = np.array([1.0, 1.0, 0.0, 1.0, 1.0])
    wanted = np.sum((x[None] - x[:, None]) ** 2, -1) * kept * kept[:, None]
    for dtype, rtol in (("float64", 1e-11), ("float32", 1e-3)):
        found = batch.squared_distances(
            tf.constant(x, dtype), tf.constant(kept, dtype)
        ).numpy()
        np.testing.assert_allclose(found, wanted, rtol=rtol)
        assert np.all(np.diag(found) == 0)
        assert found[1, 3] == 0
