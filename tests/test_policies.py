"""Gradient policies: values of the official code."""

from __future__ import annotations

import numpy as np
import pytest
from losses import golden

import keras_distill as kd


def test_golden_clipping():
    case = golden.load("kdsvd_grad_clip").arrays
    main, transfer, combined = (
        [case[f"{kind}_grad_{i}"] for i in range(3)]
        for kind in ("main", "transfer", "combined")
    )
    found = kd.ClipToMain()(main, transfer, [None] * 3, float(case["epoch"]))
    for gradient, reference in zip(found, combined, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-5, atol=1e-7)


def test_what_only_one_loss_reaches_is_taken_as_it_is():
    one = np.array([1.0, 2.0], "float32")
    policy = kd.ClipToMain()
    found = policy([None, one, None], [one, None, None], [None] * 3, 0)
    np.testing.assert_array_equal(found[0], one)
    np.testing.assert_array_equal(found[1], one)
    assert found[2] is None


def test_policies_that_are_equal():
    assert kd.ClipToMain() == kd.ClipToMain.from_config(kd.ClipToMain().get_config())
    with pytest.raises(ValueError, match="1 main, 0 transfer, 1 variables"):
        kd.ClipToMain()([None], [], [None], 0)
