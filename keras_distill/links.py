"""Links: where knowledge is read in student and teacher, and how it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_distill.losses.base import DistillationLoss, check_weight, number


class Link:
    """Compares one place of the student with one place of the teacher.

    The distiller adds `weight * loss(teacher_features, adapter(student_features))`.
    Features are read in the networks' one forward pass.

    Args:
        student_layer: Where to read the student: a layer's name, a path into nested
            models (`"backbone/block2"`), the layer object, or a list of those for
            losses on several taps.
        teacher_layer: Where to read the teacher, likewise. In a list of teachers the
            path begins with the teacher's index: `"0/block3"`.
        loss: Any Keras loss: an instance, a string or a function. Lambdas train, but
            cannot be saved. Those of `kd.losses` get a list of taps as it is; of any
            other the mean over the pairs of taps is taken.
        weight: Weight of the term, at least 0.
        adapter: Maps the student's features to the teacher's shape: None, `"auto"`
            (the smallest layer that does; nothing where the shapes agree), or any
            `keras.Layer`. It is trained with the student, and is part of the
            distiller, not of the student.
        teacher_adapter: Any `keras.Layer`, applied to the teacher's features behind
            the stop-gradient. It is trained if its `trainable` is true.
        name: Name of the term: its log is `<name>_loss`. By default the student's
            path with `-` for `/`; several are joined by `-`.

    Raises:
        ValueError: If the weight is negative or not finite.
        TypeError: If a layer, the loss or an adapter is of the wrong kind.

    Example:

    >>> link = Link("block1", "stage2", "mse", weight=10.0)
    >>> link.name
    'block1'
    """

    def __init__(
        self,
        student_layer: Any,
        teacher_layer: Any,
        loss: Any,
        *,
        weight: float = 1.0,
        adapter: Any = None,
        teacher_adapter: Any = None,
        name: str | None = None,
    ) -> None:
        for argument, layer in (
            ("student_layer", student_layer),
            ("teacher_layer", teacher_layer),
        ):
            items = as_list(layer)
            if not items or not all(
                isinstance(item, (str, keras.Layer)) for item in items
            ):
                raise TypeError(
                    f"`{argument}` must be a layer's name, a layer, or a list of "
                    f"those. Received: {layer!r}"
                )
        check_weight("weight", weight)
        if adapter is not None and adapter != "auto":
            _check_layer("adapter", adapter, "None, 'auto' or a keras.Layer")
        if teacher_adapter is not None:
            _check_layer("teacher_adapter", teacher_adapter, "None or a keras.Layer")
        self.student_layer = student_layer
        self.teacher_layer = teacher_layer
        self.loss = as_loss(loss)
        self.weight = weight
        self.adapter = adapter
        self.teacher_adapter = teacher_adapter
        self.shapes: tuple[Any, Any] | None = None  # known once a distiller has it
        self.name = name or "-".join(
            (item if isinstance(item, str) else item.name).replace("/", "-")
            for item in as_list(student_layer)
        )

    def __repr__(self) -> str:
        adapter = self.adapter
        if isinstance(adapter, keras.Layer):
            adapter = type(adapter).__name__
        ends = f"{show_layers(self.student_layer)} → {show_layers(self.teacher_layer)}"
        return (
            f"Link({ends}, {_show_loss(self.loss)}, weight={number(self.weight):g}, "
            f"adapter={adapter!r}, name={self.name!r})"
        )


def as_loss(loss: Any) -> keras.losses.Loss:
    """Any Keras loss as an instance.

    Raises:
        TypeError: If `loss` is none.
    """
    resolved = keras.losses.get(loss)
    if isinstance(resolved, keras.losses.Loss):
        return resolved
    if not callable(resolved):
        raise TypeError(
            "`loss` must be a Keras loss: an instance, a name or a function. "
            f"Received: {loss!r}"
        )
    return FunctionLoss(resolved)


@keras.saving.register_keras_serializable(package="keras_distill")
class FunctionLoss(keras.losses.Loss):
    """A loss function as a loss: Keras's own wrapper is not public."""

    def __init__(self, fn: Any, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=name or getattr(fn, "__name__", None), **kwargs)
        self.fn = fn

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self.fn(y_true, y_pred)

    def get_config(self) -> dict[str, Any]:
        fn = serialize_function("loss", self.fn)
        return {**super().get_config(), "fn": fn}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FunctionLoss:
        return cls(keras.saving.deserialize_keras_object(config.pop("fn")), **config)


def serialize_function(argument: str, fn: Any) -> Any:
    """A function (or anything else that Keras can save) as Keras saves it.

    Raises:
        ValueError: If it is a lambda, which cannot be found again by its name.
    """
    if getattr(fn, "__name__", "") == "<lambda>":
        raise ValueError(
            f"`{argument}`: a lambda cannot be saved. Define a function and register "
            "it with keras.saving.register_keras_serializable."
        )
    return keras.saving.serialize_keras_object(fn)


def same_shape(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two static shapes are equal as far as they are known."""
    return len(one) == len(other) and all(
        a == b or None in (a, b) for a, b in zip(one, other, strict=True)
    )


def as_list(value: Any) -> list[Any]:
    """The items of a list or tuple, or the one value."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check_layer(argument: str, value: Any, expected: str) -> None:
    if not isinstance(value, keras.Layer):
        raise TypeError(f"`{argument}` must be {expected}. Received: {value!r}")


def show_layers(layer: Any) -> str:
    """The names of a layer or of several."""
    names = [item if isinstance(item, str) else item.name for item in as_list(layer)]
    return ", ".join(names)


def _show_loss(loss: Any) -> str:
    return repr(loss) if isinstance(loss, DistillationLoss) else loss.name
