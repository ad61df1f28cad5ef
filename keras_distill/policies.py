"""How the gradients of the task and of the transfer become one."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill.losses.base import PACKAGE


@keras.saving.register_keras_serializable(package=PACKAGE)
class ClipToMain:
    r"""Lets the transfer move no variable further than the main task does.

    Each variable gets, in epoch e (counted from 0),

    $$g = g_\text{main} + \operatorname{clip}(g_\text{transfer},\;
    \sigma(e)\,\|g_\text{main}\|)$$

    where `clip` shortens a gradient to at most that norm. So the transfer begins with
    half of the main gradient's norm as its limit, and soon has all of it. Where only
    one of the two losses reaches a variable, its gradient is taken as it is; a main
    gradient of 0 leaves nothing of the transfer's.

    It is the `gradient_policy` of KD-SVD, for use with any links:
    `distiller.compile(optimizer, loss, gradient_policy=kd.ClipToMain())`.

    Call arguments:
        main: Gradients of hard, soft and regularisation losses, one tensor or None per
            variable.
        transfer: Gradients of the links, likewise.
        variables: The variables.
        epoch: Epoch, counted from 0, a number or a scalar tensor.

    Returns:
        A list of one gradient (or None) per variable.

    Raises:
        ValueError: If there are not as many gradients as variables.

    Example:

    >>> import numpy as np
    >>> main, transfer = np.array([3.0, 4.0]), np.array([0.0, 10.0])
    >>> combined = ClipToMain()([main], [transfer], [None], epoch=0)
    >>> print(np.asarray(combined[0]))
    [3.  6.5]

    References:
        Lee, Kim, Song, Self-supervised Knowledge Distillation Using Singular Value
        Decomposition, ECCV 2018 (arXiv 1807.06819). The official code takes the
        sigmoid of the epoch; the paper's formula is the same.
    """

    def __call__(
        self, main: list[Any], transfer: list[Any], variables: list[Any], epoch: Any
    ) -> list[Any]:
        if not len(main) == len(transfer) == len(variables):
            raise ValueError(
                "ClipToMain needs one gradient of each kind per variable. Received: "
                f"{len(main)} main, {len(transfer)} transfer, {len(variables)} "
                "variables."
            )
        return [_combined(m, t, epoch) for m, t in zip(main, transfer, strict=True)]

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ClipToMain:
        return cls(**config)

    def __eq__(self, other: Any) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return "ClipToMain()"


def _combined(main: Any, transfer: Any, epoch: Any) -> Any:
    if main is None or transfer is None:
        return transfer if main is None else main
    main = ops.convert_to_tensor(main)
    transfer = ops.convert_to_tensor(transfer)
    limit = _norm(main) * ops.sigmoid(ops.cast(epoch, main.dtype))
    longer = ops.maximum(_norm(transfer), limit)
    return main + transfer * ops.divide_no_nan(limit, longer)


def _norm(gradient: Any) -> Any:
    return ops.sqrt(ops.sum(ops.square(gradient)))
