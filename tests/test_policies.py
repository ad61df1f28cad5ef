"""ClipToMain: the official numbers, and every way a gradient can be missing."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from losses import golden

import keras_distill as kd


def test_the_combined_gradients_are_the_published_ones():
    arrays = golden.load("kdsvd_grad_clip").arrays
    main, transfer, expected = (
        [arrays[f"{name}_{i}"] for i in range(3)]
        for name in ("main_grad", "transfer_grad", "combined_grad")
    )
    epoch = float(arrays["epoch"])
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-6)):
        found = kd.ClipToMain()(
            [tf.constant(g, dtype) for g in main],
            [tf.constant(g, dtype) for g in transfer],
            [None] * 3,
            tf.constant(epoch),
        )
        for value, reference in zip(found, expected, strict=True):
            np.testing.assert_allclose(value, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("epoch", [0, 1, 3, 50])
def test_the_limit_grows_with_the_epoch(epoch):
    main, transfer = np.array([3.0, 4.0]), np.array([0.0, 1000.0])
    (found,) = kd.ClipToMain()([main], [transfer], [None], epoch)
    limit = 5 / (1 + np.exp(-epoch))
    np.testing.assert_allclose(np.asarray(found) - main, [0, limit], rtol=1e-6)
    (short,) = kd.ClipToMain()([main], [transfer / 1e6], [None], epoch)
    np.testing.assert_allclose(short, main + transfer / 1e6)


def test_missing_and_zero_gradients():
    g, zero = np.array([1.0, 2.0]), np.zeros(2)
    found = kd.ClipToMain()(
        [None, g, None, zero, g, zero],
        [None, None, g, g, zero, zero],
        [None] * 6,
        0,
    )
    assert found[0] is None
    for value, expected in zip(found[1:], [g, g, zero, g, zero], strict=True):
        np.testing.assert_array_equal(value, expected)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="1 main, 0 transfer, 1 variables"):
        kd.ClipToMain()([None], [], [None], 0)


def test_it_is_saved_with_the_compiled_distiller(tmp_path):
    distiller = tiny.compiled(
        tiny.distiller(links=[kd.Link("hidden", "hidden", "mse", adapter="auto")]),
        gradient_policy=kd.ClipToMain(),
    )
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    assert loaded._options["gradient_policy"] == kd.ClipToMain()


def test_a_transfer_without_limit_moves_the_student_no_further_than_the_task():
    x, y = tiny.data()
    moved = {}
    for weight in (0.0, 1e6):
        keras.utils.set_random_seed(0)
        link = kd.Link("hidden", "hidden", "mse", weight=weight, adapter="auto")
        distiller = tiny.distiller(links=[link], soft_loss=None, alpha=1.0)
        adapter = distiller.links[0].adapter
        before = tiny.values(distiller.student.trainable_variables)
        adapted = tiny.values(adapter.weights)
        tiny.compiled(distiller, gradient_policy=kd.ClipToMain())
        tiny.history(distiller, x, y, batch_size=24)
        after = tiny.values(distiller.student.trainable_variables)
        moved[weight] = [a - b for a, b in zip(after, before, strict=True)]
        if weight:  # the main task has no say in the adapter
            change = adapted[0] - adapter.weights[0].numpy()
            assert np.abs(change).max() > 100
    for alone, both in zip(moved[0.0], moved[1e6], strict=True):
        extra = np.linalg.norm(both - alone)
        assert extra <= 0.5 * np.linalg.norm(alone) * (1 + 1e-4)
    assert np.linalg.norm(moved[1e6][0] - moved[0.0][0]) > 0
