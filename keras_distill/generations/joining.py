"""Labelled and unlabelled rows in one data set."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distill.weighting import label_kind


def joined(data: Any, unlabelled: Any, none: int) -> Any:
    """Labelled and unlabelled rows, the latter with the label that means "none"."""
    if isinstance(data, tuple) != (not hasattr(unlabelled, "element_spec")):
        raise ValueError(
            "`data` and `unlabelled` must both be arrays, or both batched data sets. "
            f"Received: {type(data).__name__} and {type(unlabelled).__name__}"
        )
    if isinstance(data, tuple):
        x, y = data
        rows = len(keras.tree.flatten(unlabelled)[0])
        y = np.asarray(y)
        both = keras.tree.map_structure(
            lambda a, b: np.concatenate([a, b]), x, unlabelled
        )
        return both, np.concatenate([y, np.broadcast_to(none, (rows, *y.shape[1:]))])

    def join(labelled: Any, x: Any) -> Any:
        own, y = labelled
        if keras.backend.standardize_dtype(y.dtype).startswith("uint"):
            y = ops.cast(y, "int64")  # room for -1
        rows = ops.shape(keras.tree.flatten(x)[0])[0]
        missing = ops.full((rows, *y.shape[1:]), none, y.dtype)
        both = keras.tree.map_structure(lambda a, b: ops.concatenate([a, b], 0), own, x)
        return both, ops.concatenate([y, missing], 0)

    return data.zip((data.repeat(), unlabelled)).map(join)


def missing_label(compile_args: Any, data: Any) -> int:
    """What means "no label": -1 for integers, 0 in all of a row of one-hot labels.

    Raises:
        ValueError: If `data` are not pairs, or the loss knows no such label.
    """
    pair = data if isinstance(data, tuple) else getattr(data, "element_spec", None)
    if not isinstance(pair, tuple) or len(pair) != 2 or not hasattr(pair[1], "shape"):
        raise ValueError(
            "`data` must be (x, y), or a data set of such batches: the labels of one "
            "output, and no sample weights."
        )
    arguments = compile_args() if callable(compile_args) else compile_args
    if not isinstance(arguments, dict):
        return -1  # the chain refuses them
    kind = label_kind(arguments.get("loss"))
    if kind == "crossentropy":  # Keras decides by the shapes
        one = len(pair[1].shape) == 1 or pair[1].shape[-1] == 1
        kind = "sparse" if one else "categorical"
    if kind is None:
        raise ValueError(
            "`compile_args`: rows without a label need a loss over classes, such as "
            f"SparseCategoricalCrossentropy. Received: {arguments.get('loss')!r}"
        )
    return -1 if kind == "sparse" else 0
