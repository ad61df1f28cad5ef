"""What of the data a network sees."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_distill.links import as_list

INDEX = "kd_index"


def rows_of(data: Any) -> tf.data.Dataset:
    """Arrays `x` or `(x, y, ...)` as a data set of single rows.

    A list of arrays is several inputs, as in Keras; `tf.data` would make one array of
    it.
    """

    def with_tuples(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: with_tuples(value) for key, value in part.items()}
        if not isinstance(part, (list, tuple)):
            return part
        arrays = any(hasattr(leaf, "shape") for leaf in keras.tree.flatten(part))
        return tuple(map(with_tuples, part)) if arrays else part

    parts = with_tuples(data)
    several = isinstance(data, list) and isinstance(parts, tuple)
    return tf.data.Dataset.from_tensor_slices((parts,) if several else parts)


def plain_inputs(x: Any) -> Any:
    """The inputs themselves where the data carry a teacher's stored knowledge."""
    return x["inputs"] if isinstance(x, dict) and "kd_teacher" in x else x


def select_inputs(x: Any, keys: Any) -> Any:
    """The part of `x` that a network sees.

    The rows' positions in the training set (`x["kd_index"]`) are for distillers:
    without `keys` a network sees the rest.

    Raises:
        ValueError: If a key is not in `x`.
    """
    if keys is None:
        if not isinstance(x, dict) or INDEX not in x:
            return x
        rest = {key: value for key, value in x.items() if key != INDEX}
        return rest if len(rest) > 1 else next(iter(rest.values()))
    if callable(keys):
        return keys(x)
    missing = [key for key in as_list(keys) if key not in x]
    if missing:
        known = list(x) if isinstance(x, dict) else type(x).__name__
        raise ValueError(f"The data have no input {missing}. Inputs: {known}")
    return [x[key] for key in keys] if isinstance(keys, (list, tuple)) else x[keys]
