"""Corrected biases, for a model trained on data that lack classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distill.heads import Head, example_rows
from keras_distill.specs import input_spec
from keras_distill.taps import call_model
from keras_distill.teachers.model import Model


def correct_bias(
    model: keras.Model, data: Any, shares: Mapping[int, float], *, batch_size: int = 128
) -> dict[int, float]:
    r"""Gives classes the share of a model's probability that they should have.

    A student that was distilled on data without some classes knows them from the soft
    targets, but expects them too seldom. Their biases are shifted by the `b` with

    $$\frac{1}{N} \sum_n \mathrm{softmax}(z_n + b)_c = \text{shares}[c]$$

    over the given classes c; all other biases stay. No labels are needed. The paper
    chose the shift by errors on the test set; this one needs only rows, and the share
    of the classes there: their frequency, or the teacher's mean probability.

    Args:
        model: A model with one output over the classes; its last bias is changed.
        data: Inputs of some rows, as `predict` takes them.
        shares: For each class to correct its share, above 0; their sum is below 1.
        batch_size: Rows that the model gets at once.

    Returns:
        The shifts that were added to the biases.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If it has no bias for each class in its last layer, classes do not
            exist, or shares are out of range.

    Example:

    ```python
    shifts = kd.teachers.correct_bias(student, x_validation, {3: 0.1})
    ```

    References:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015,
        section 3 (arXiv 1503.02531).
    """
    head, bias = last_bias("model", model)
    ids = np.array(list(shares), "int64")
    wanted = np.array([shares[c] for c in shares], "float64")
    if not ids.size or ids.min() < 0 or ids.max() >= head.classes:
        raise ValueError(
            f"`shares` must name classes from 0 to {head.classes - 1}. "
            f"Received: {dict(shares)}"
        )
    if not (np.all(wanted > 0) and wanted.sum() < 1):
        raise ValueError(
            "`shares` must be above 0, with a sum below 1. The classes left out share "
            f"the rest. Received: {dict(shares)}"
        )
    outputs = model.predict(data, batch_size=batch_size, verbose=0)
    (output,) = keras.tree.flatten(outputs)
    logits = _numpy(head.logits(output)).reshape(-1, head.classes)
    shifts = _shifts(logits.astype("float64"), ids, wanted)
    add_to_bias(bias, ids, shifts)
    return {int(c): float(shift) for c, shift in zip(ids, shifts, strict=True)}


def _shifts(logits: np.ndarray, ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The minimum of the mean of `logsumexp(z + b)` less `wanted · b`: convex."""
    from scipy.optimize import minimize
    from scipy.special import logsumexp, softmax

    def value(b: np.ndarray) -> tuple[float, np.ndarray]:
        shifted = logits.copy()
        shifted[:, ids] += b
        p = softmax(shifted, -1)[:, ids]
        loss = logsumexp(shifted, -1).mean() - wanted @ b
        return loss, p.mean(0) - wanted

    return minimize(value, np.zeros(len(ids)), jac=True, options={"gtol": 1e-7}).x


def last_bias(argument: str, model: keras.Model) -> tuple[Head, Any]:
    """A model's one head, and the variable that is added to its logits.

    Raises:
        ValueError: If it has several heads, or no such variable.
    """
    heads = Model(model).heads()
    if len(heads) != 1 or heads[0].shape[-1] != heads[0].classes:
        raise ValueError(
            f"`{argument}` must have one output with a unit for each class. Received: "
            f"outputs of shape {[head.shape for head in heads]}"
        )
    (head,) = heads
    x = example_rows(input_spec(model))

    def odds() -> np.ndarray:
        """Of the first class against every other one, as logarithms."""
        with keras.StatelessScope():  # stateful layers must not remember these rows
            (output,) = keras.tree.flatten(call_model(model, x, False))
        logits = _numpy(head.logits(output))
        return logits[..., :1] - logits[..., 1:]

    before = odds()
    for bias in reversed(model.weights):  # frozen or not
        if tuple(bias.shape) != (head.classes,):
            continue
        value = _numpy(bias)
        add_to_bias(bias, np.array([0]), np.array([1.0]))
        moved = odds() - before
        bias.assign(value)
        if np.allclose(moved, 1, atol=1e-2):
            return head, bias
    raise ValueError(
        f"`{argument}`: the last layer of {model.name!r} must have one bias for each "
        "class, as a Dense layer has."
    )


def add_to_bias(bias: Any, ids: np.ndarray, shifts: np.ndarray) -> None:
    """Adds to some entries of a variable."""
    value = _numpy(bias).copy()
    value[ids] += shifts
    bias.assign(value)


def _numpy(value: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(value, "float32")))
