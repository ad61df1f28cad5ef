"""Links: where knowledge is read in student and teacher, and how it is read."""

from __future__ import annotations

import contextlib
import difflib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from keras_distill.losses.base import DistillationLoss, number


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
            cannot be saved.
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


def check_weight(name: str, weight: Any) -> None:
    """Raises ValueError unless `weight` is finite and at least 0."""
    if not 0 <= number(weight) < float("inf"):
        raise ValueError(f"`{name}` must be finite and at least 0. Received: {weight}")


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


# -- layers by path -----------------------------------------------------------------


def children(layer: keras.Layer) -> list[keras.Layer]:
    """The layers directly inside a layer or model."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def find_layer(model: keras.Layer, path: str, argument: str) -> keras.Layer:
    """The layer at a path such as `"backbone/block2"`.

    Raises:
        ValueError: If there is none, with the nearest names that exist.
    """
    layer = model
    for depth, name in enumerate(path.split("/")):
        named = {child.name: child for child in children(layer)}
        if name not in named:
            near = difflib.get_close_matches(name, named, n=3, cutoff=0.4)
            near = near or list(named)[:10]
            where = "/".join(path.split("/")[:depth]) or model.name
            raise ValueError(
                f"`{argument}`: there is no layer {name!r} in {where!r}. "
                f"Received: {path!r}. Nearest names: {near}"
            )
        layer = named[name]
    return layer


def find_path(model: keras.Layer, layer: keras.Layer, argument: str) -> str:
    """The path of a layer object inside a model.

    Raises:
        ValueError: If it is not in the model.
    """
    pending = [("", child) for child in children(model)]
    while pending:
        prefix, candidate = pending.pop(0)
        path = f"{prefix}{candidate.name}"
        if candidate is layer:
            return path
        pending += [(f"{path}/", child) for child in children(candidate)]
    raise ValueError(
        f"`{argument}`: the layer {layer.name!r} is not part of the model "
        f"{model.name!r}."
    )


def paths_of(model: keras.Layer, layers: Any, argument: str) -> Any:
    """Checked paths of names or layer objects, in the structure given."""

    def path(item: Any) -> str:
        if isinstance(item, keras.Layer):
            return find_path(model, item, argument)
        find_layer(model, item, argument)
        return item

    return (
        [path(i) for i in layers] if isinstance(layers, (list, tuple)) else path(layers)
    )


# -- reading taps -------------------------------------------------------------------

_lock = threading.Lock()
_wrapped: dict[int, int] = {}  # id(layer) -> passes that read it now
_passes = threading.local()  # .stack: one {id(layer): [outputs]} per pass


@contextlib.contextmanager
def reading(layers: Sequence[keras.Layer]) -> Iterator[dict[int, list[Any]]]:
    """Collects what each layer returns while the block runs.

    A layer's `call` is wrapped once, however many passes read it at a time (replicas
    are traced in interleaved threads), and each thread collects for itself. When the
    last pass ends, also by an error, nothing is left on the layer.

    Args:
        layers: The layers to read.

    Yields:
        Per `id(layer)` the list of its outputs, one per call; layers that were called
        in the order in which they finished, behind those that were not.
    """
    found: dict[int, list[Any]] = {id(layer): [] for layer in layers}
    stack = _passes.__dict__.setdefault("stack", [])
    for layer in layers:
        _wrap(layer)
    stack.append(found)
    try:
        yield found
    finally:
        stack.remove(found)
        for layer in layers:
            _unwrap(layer)


def _wrap(layer: keras.Layer) -> None:
    with _lock:
        _wrapped[id(layer)] = _wrapped.get(id(layer), 0) + 1
        if _wrapped[id(layer)] > 1:
            return
        call = layer.call

        @functools.wraps(call)
        def recording(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            for found in getattr(_passes, "stack", ()):
                if id(layer) in found:  # moved to the end: see `reading`
                    found[id(layer)] = [*found.pop(id(layer)), outputs]
            return outputs

        layer.__dict__["call"] = recording


def _unwrap(layer: keras.Layer) -> None:
    with _lock:
        _wrapped[id(layer)] -= 1
        if not _wrapped[id(layer)]:
            del _wrapped[id(layer)], layer.__dict__["call"]


def run_with_taps(
    model: keras.Layer, x: Any, paths: Sequence[str], training: bool
) -> tuple[Any, dict[str, Any]]:
    """Outputs and features of a model from one forward pass.

    Args:
        model: Any built Keras model.
        x: Its inputs.
        paths: Paths of the layers to read.
        training: Passed on to the model.

    Returns:
        The outputs, and the features by path.

    Raises:
        ValueError: If a layer is used at several places of the model, or not at all.
    """
    layers = {path: find_layer(model, path, "layer") for path in paths}
    with reading(list(layers.values())) as found:
        outputs = call_model(model, x, training)
    features = {}
    for path, layer in layers.items():
        calls = found[id(layer)]
        if len(calls) != 1:
            raise ValueError(
                f"The layer {path!r} of {model.name!r} was called {len(calls)} times "
                "in one forward pass; a tap needs a layer that is used exactly once."
            )
        features[path] = calls[0]
    return outputs, features


def call_model(model: keras.Layer, x: Any, training: bool) -> Any:
    """Calls a model, with `training` if its `call` knows that argument."""
    if getattr(model, "_call_has_training_arg", True):
        return model(x, training=training)
    return model(x)


class _Symbolic(keras.Operation):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.call = fn


def symbolic_run(fn: Any, *args: Any) -> Any:
    """What a function returns for symbolic tensors: shapes, without computing."""
    failed: list[Exception] = []

    def call(*args: Any) -> Any:
        try:
            return fn(*args)
        except Exception as error:
            failed.append(error)
            raise

    try:
        return _Symbolic(call).compute_output_spec(*args)
    except Exception:
        if failed:  # its own message: Keras would wrap it in one about itself
            raise failed[0] from None
        raise


def input_spec(model: keras.Layer) -> Any:
    """Symbolic inputs of a built model.

    Raises:
        ValueError: If the model was never built.
    """
    inputs = getattr(model, "_inputs_struct", None)
    if inputs is not None:  # functional, and sequential once built
        return keras.tree.map_structure(
            lambda t: keras.KerasTensor(t.shape, t.dtype, name=t.name), inputs
        )
    functional = getattr(model, "_functional", None)
    if functional is not None:
        return input_spec(functional)
    config = model.get_build_config() if model.built else None
    if not config:
        raise ValueError(
            f"The model {model.name!r} was never built: its input shape is unknown. "
            "Call it once on a batch of data, or give it an Input."
        )
    shape = config.get("input_shape")
    if shape is None:
        shapes = list(config["shapes_dict"].values())
        shape = shapes[0] if len(shapes) == 1 else shapes

    def tensor(shape: Any) -> Any:
        if isinstance(shape, dict):
            return {key: tensor(value) for key, value in shape.items()}
        if shape and isinstance(shape[0], (list, tuple)):
            return [tensor(item) for item in shape]
        return keras.KerasTensor((None, *shape[1:]), model.input_dtype)

    return tensor(shape)
