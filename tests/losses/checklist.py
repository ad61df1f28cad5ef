"""What every loss must stand, whatever it computes.

A test file lists its losses as `Subject`s and runs each check on each of them:

    @pytest.mark.parametrize("check", CHECKS)
    @pytest.mark.parametrize("subject", SUBJECTS, ids=str)
    def test_checklist(subject, check):
        check(subject)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

Knowledge = Any  # an array or a list of arrays


@dataclasses.dataclass(frozen=True)
class Subject:
    """A loss and what it eats.

    Attributes:
        make: The class, or a `functools.partial` of it; called with further keywords.
        inputs: `inputs(rng, batch)` returns `(y_true, y_pred)`, arrays or lists of
            arrays, floats as float32.
        wrong: Pairs `(y_true, y_pred)` that must be a ValueError.
        extremes: Further pairs with which value and gradient must be finite.
        rtol: Relative tolerance between float32 results of two ways to compute.
        name: Shown in test ids; the class's name when empty.
    """

    make: Callable[..., keras.losses.Loss]
    inputs: Callable[[np.random.Generator, int], tuple[Knowledge, Knowledge]]
    wrong: tuple[tuple[Knowledge, Knowledge], ...] = ()
    extremes: tuple[tuple[Knowledge, Knowledge], ...] = ()
    rtol: float = 1e-4
    name: str = ""

    def __str__(self) -> str:
        return self.name or getattr(self.make, "func", self.make).__name__

    def batch(self, batch: int = 6, seed: int = 0) -> tuple[Knowledge, Knowledge]:
        return self.inputs(np.random.default_rng(seed), batch)


def tree_map(function: Callable[[np.ndarray], Any], tree: Knowledge) -> Knowledge:
    return keras.tree.map_structure(function, tree)


def floats(function: Callable[[np.ndarray], Any], tree: Knowledge) -> Knowledge:
    """Applies a function to the arrays of floats, and leaves labels alone."""
    return tree_map(
        lambda a: function(a) if np.issubdtype(a.dtype, np.floating) else a, tree
    )


def run(
    loss: keras.losses.Loss, y_true: Knowledge, y_pred: Knowledge, weight: Any = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Value and its gradient (of the sum, where there are several) for `y_pred`."""
    y_true = tree_map(tf.convert_to_tensor, y_true)
    y_pred = tree_map(tf.convert_to_tensor, y_pred)
    sources = keras.tree.flatten(y_pred)
    with tf.GradientTape() as tape:
        tape.watch(sources)
        value = loss(y_true, y_pred, weight)
    gradients = tape.gradient(value, sources)
    return value.numpy().astype("float64"), [
        np.zeros(x.shape)
        if g is None
        else tf.convert_to_tensor(g).numpy().astype("float64")
        for x, g in zip(sources, gradients, strict=True)
    ]


def assert_close(found: Any, wanted: Any, rtol: float) -> None:
    """Compares by norm: a single entry near 0 has no relative error."""
    found, wanted = np.asarray(found, "float64"), np.asarray(wanted, "float64")
    assert found.shape == wanted.shape
    limit = rtol * np.linalg.norm(wanted) + 1e-7
    assert np.linalg.norm(found - wanted) <= limit, (found, wanted)


def check_weights(subject: Subject) -> None:
    """Weights multiply rows, and a row of weight 0 is as good as absent."""
    y_true, y_pred = subject.batch()
    weight = np.array([1.0, 0.0, 2.0, 0.5, 0.0, 1.0], "float32")
    kept = np.flatnonzero(weight)
    loss = subject.make(reduction=None)
    values, _ = run(loss, y_true, y_pred, weight)
    fewer, _ = run(
        loss, tree_map(lambda a: a[kept], y_true), tree_map(lambda a: a[kept], y_pred)
    )
    rows = weight.reshape((-1,) + (1,) * (values.ndim - 1))
    assert_close(values, np.insert(fewer, [1, 3], 0.0, axis=0) * rows, subject.rtol)

    mean, gradients = run(subject.make(), y_true, y_pred, weight)
    assert_close(mean, values.sum() / values.size, subject.rtol)
    for gradient in gradients:
        assert np.all(gradient[weight == 0] == 0)
        assert np.any(gradient[weight != 0] != 0)

    # What a row of weight 0 holds is of no consequence, be it absurd.
    def spoil(a: np.ndarray) -> np.ndarray:
        a = a.copy()
        a[weight == 0] = 1e4
        return a

    spoilt, _ = run(loss, floats(spoil, y_true), floats(spoil, y_pred), weight)
    assert_close(spoilt, values, subject.rtol)


def check_reduction(subject: Subject) -> None:
    """The mean and the sum are the mean and the sum of the unreduced values."""
    y_true, y_pred = subject.batch()
    values, _ = run(subject.make(reduction=None), y_true, y_pred)
    assert values.shape[:1] == (6,)
    for reduction, wanted in (
        ("sum_over_batch_size", values.mean()),
        ("sum", values.sum()),
        ("mean_with_sample_weight", values.mean()),
    ):
        value, _ = run(subject.make(reduction=reduction), y_true, y_pred)
        assert_close(value, wanted, 1e-5)


def check_mask(subject: Subject) -> None:
    """Masked rows are left out of the mean, too."""
    y_true, y_pred = subject.batch()
    if isinstance(y_pred, list):
        return  # Keras's mask sits on one tensor
    mask = np.array([True, True, False, True, False, True])
    masked = tf.convert_to_tensor(y_pred)
    masked._keras_mask = tf.convert_to_tensor(mask)
    value = subject.make()(tree_map(tf.convert_to_tensor, y_true), masked)
    wanted, _ = run(subject.make(), tree_map(lambda a: a[mask], y_true), y_pred[mask])
    assert_close(value, wanted, subject.rtol)


def check_extremes(subject: Subject) -> None:
    """Huge, equal, constant and zero inputs: finite values and gradients."""
    y_true, y_pred = subject.batch()

    def sign(a: np.ndarray) -> np.ndarray:
        return np.where(a > 0, 1e4, -1e4).astype(a.dtype)

    def repeat(a: np.ndarray) -> np.ndarray:
        return np.repeat(a[:1], len(a), axis=0)

    first, last = tree_map(repeat, y_true), tree_map(repeat, y_pred)
    pairs = [
        (floats(sign, y_true), floats(sign, y_pred)),
        (floats(sign, y_true), floats(lambda a: -sign(a), y_pred)),
        (first, last),
        (y_true, last),
        (floats(np.zeros_like, y_true), floats(np.zeros_like, y_pred)),
        (y_true, floats(np.zeros_like, y_pred)),
        (floats(np.zeros_like, y_true), y_pred),
        *subject.extremes,
    ]
    for number, (teacher, student) in enumerate(pairs):
        value, gradients = run(subject.make(), teacher, student)
        assert np.isfinite(value), f"pair {number}: value {value}"
        assert all(np.isfinite(g).all() for g in gradients), f"pair {number}: gradient"


def check_low_precision(subject: Subject) -> None:
    """float16 and bfloat16 inputs are computed in float32, gradients included."""
    y_true, y_pred = subject.batch()
    for dtype in ("float16", "bfloat16"):
        true = floats(lambda a, d=dtype: tf.cast(a, d), y_true)
        pred = floats(lambda a, d=dtype: tf.cast(a, d), y_pred)
        back = [
            tree_map(
                lambda a: tf.cast(a, "float32").numpy() if a.dtype.is_floating else a,
                tree_map(tf.convert_to_tensor, tree),
            )
            for tree in (true, pred)
        ]
        loss = subject.make()
        assert loss(true, pred).dtype == "float32"
        value, gradients = run(loss, true, pred)
        wanted, slopes = run(loss, *back)
        assert_close(value, wanted, 1e-6)
        for gradient, slope in zip(gradients, slopes, strict=True):
            assert np.isfinite(gradient).all()
            limit = 2e-2 * np.linalg.norm(slope) + 1e-6
            assert np.linalg.norm(gradient - slope) <= limit


def check_jit(subject: Subject) -> None:
    """XLA gives the same value and gradient, also with an unknown batch size."""
    y_true, y_pred = subject.batch()
    loss = subject.make()

    def step(true: Any, pred: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(pred)
            value = loss(true, pred)
        return value, keras.tree.flatten(tape.gradient(value, pred))

    wanted, slopes = run(loss, y_true, y_pred)
    signature = [
        tree_map(lambda a: tf.TensorSpec((None, *a.shape[1:]), a.dtype), tree)
        for tree in (y_true, y_pred)
    ]
    compiled = tf.function(step, jit_compile=True)
    partial = tf.function(step, input_signature=signature)
    for function in (compiled, partial):
        value, gradients = function(
            tree_map(tf.convert_to_tensor, y_true),
            tree_map(tf.convert_to_tensor, y_pred),
        )
        assert_close(value, wanted, subject.rtol)
        for gradient, slope in zip(gradients, slopes, strict=True):
            assert_close(gradient, slope, 10 * subject.rtol)


def check_serialization(subject: Subject) -> None:
    """A loss comes back from its config with everything that was set."""
    loss = subject.make(reduction="sum", name="special", dtype="float64")
    y_true, y_pred = subject.batch()
    for saved, restore in (
        (keras.losses.serialize(loss), keras.losses.deserialize),
        (
            keras.saving.serialize_keras_object(loss),
            keras.saving.deserialize_keras_object,
        ),
        (loss.get_config(), type(loss).from_config),
    ):
        again = restore(saved)
        assert type(again) is type(loss)
        assert again.get_config() == loss.get_config()
        assert again.name == "special"
        assert run(again, y_true, y_pred)[0] == run(loss, y_true, y_pred)[0]
    assert repr(loss).startswith(type(loss).__name__ + "(")
    assert "\n" not in repr(loss)


def check_wrong(subject: Subject) -> None:
    """Inputs that make no sense are one clear ValueError."""
    assert subject.wrong
    for y_true, y_pred in subject.wrong:
        with pytest.raises(ValueError, match="[Rr]eceived|does not fit"):
            subject.make()(y_true, y_pred)
    with pytest.raises(ValueError, match="float16"):
        subject.make(dtype="float16")
    y_true, y_pred = subject.batch()
    with pytest.raises(ValueError, match="sample_weight"):
        subject.make()(y_true, y_pred, np.ones((6, 3, 3, 3, 3, 3), "float32"))


CHECKS = (
    check_weights,
    check_reduction,
    check_mask,
    check_extremes,
    check_low_precision,
    check_jit,
    check_serialization,
    check_wrong,
)
