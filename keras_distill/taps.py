"""Taps: layers by their path, and what they return in one forward pass."""

from __future__ import annotations

import contextlib
import difflib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import keras


def children(layer: keras.Layer) -> list[keras.Layer]:
    """The layers directly inside a layer or model."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def find_layer(model: keras.Layer, path: str, argument: str) -> keras.Layer:
    """The layer at a path such as `"backbone/block2"`.

    Raises:
        ValueError: If there is none, with the nearest names that exist, or several.
    """
    layer = model
    for depth, name in enumerate(path.split("/")):
        inside = {id(child): child for child in children(layer)}.values()
        named = [child for child in inside if child.name == name]
        where = "/".join(path.split("/")[:depth]) or model.name
        if not named:
            names = [child.name for child in inside]
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
            raise ValueError(
                f"`{argument}`: there is no layer {name!r} in {where!r}. "
                f"Received: {path!r}. Nearest names: {near or names[:10]}"
            )
        if len(named) > 1:
            raise ValueError(
                f"`{argument}`: {len(named)} layers in {where!r} are called {name!r}; "
                "a tap needs a layer with a name of its own."
            )
        layer = named[0]
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
        found = item
        if isinstance(item, keras.Layer):
            found = find_path(model, item, argument)
        find_layer(model, found, argument)
        return found

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
        name = _method(layer)
        call = getattr(layer, name)

        @functools.wraps(call)
        def recording(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            for found in getattr(_passes, "stack", ()):
                if id(layer) in found:  # moved to the end: see `reading`
                    found[id(layer)] = [*found.pop(id(layer)), outputs]
            return outputs

        layer.__dict__[name] = recording


def _unwrap(layer: keras.Layer) -> None:
    with _lock:
        _wrapped[id(layer)] -= 1
        if not _wrapped[id(layer)]:
            del _wrapped[id(layer)], layer.__dict__[_method(layer)]


def _method(layer: keras.Layer) -> str:
    """The method that Keras calls in a forward pass."""
    quantized = getattr(layer, "quantization_mode", None) is not None
    return "quantized_call" if quantized else "call"


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
