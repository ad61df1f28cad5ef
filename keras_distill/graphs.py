"""Graphs of functional models, and the parts into which they are cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from keras_distill.copies import configuration
from keras_distill.specs import functional_of, input_spec
from keras_distill.taps import paths_of


@dataclass(frozen=True)
class Step:
    """One call of one layer in a flat graph.

    Attributes:
        layer: The layer (or operation) of the model.
        path: Where it is in the model: `"backbone/block2"`.
        arguments: Its positional and keyword arguments, with symbolic tensors.
        inputs: The tensors among them, as numbers within the graph.
        outputs: The tensors it makes.
    """

    layer: Any
    path: str
    arguments: tuple[Any, dict[str, Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Graph:
    """The graph of a functional or sequential model, its nested models inlined.

    Args:
        model: The model. It is only read.
        argument: The argument it came from, for messages.

    Raises:
        TypeError: If its graph is not known: a subclassed model.
        ValueError: If it was never built, or has several outputs.
    """

    def __init__(self, model: keras.Model, argument: str = "model") -> None:
        if not isinstance(model, keras.Model):
            raise TypeError(f"`{argument}` must be a keras.Model. Received: {model!r}")
        input_spec(model)  # says so if it was never built
        functional = functional_of(model)
        if functional is None:
            raise TypeError(
                f"`{argument}` must be a functional or sequential model: the graph of "
                f"the subclassed model {model.name!r} is not known."
            )
        self.model = model
        self.steps: list[Step] = []
        self.calls: dict[str, list[tuple[int, ...]]] = {}
        self._tensors: dict[int, Any] = {}  # the models' own symbolic tensors
        self._functional = functional
        self.inputs = tuple(self._number(tensor) for tensor in functional.inputs)
        outputs = self._inline(functional, "", self.inputs)
        if len(outputs) != 1:
            raise ValueError(
                f"`{argument}` must have one output. {model.name!r} has {len(outputs)}."
            )
        self.output = outputs[0]
        self._makers = {out: step for step in self.steps for out in step.outputs}

    def _number(self, tensor: Any) -> int:
        self._tensors[len(self._tensors)] = tensor
        return len(self._tensors) - 1

    def _inline(
        self, model: Any, prefix: str, inputs: tuple[int, ...]
    ) -> tuple[int, ...]:
        numbers = {id(t): n for t, n in zip(model.inputs, inputs, strict=True)}
        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                layer = node.operation
                path = f"{prefix}{layer.name}"
                arguments = _arguments(node)
                taken = tuple(numbers[id(t)] for t in _tensors_in(arguments))
                inner = functional_of(layer)
                if inner is not None and _fits(inner, arguments):
                    made = self._inline(inner, f"{path}/", taken)
                else:
                    made = tuple(self._number(t) for t in node.outputs)
                    self.steps.append(Step(layer, path, arguments, taken, made))
                self.calls.setdefault(path, []).append(made)
                numbers |= {id(t): n for t, n in zip(node.outputs, made, strict=True)}
        return tuple(numbers[id(t)] for t in model.outputs)

    # -- where to cut ---------------------------------------------------------------

    def shape(self, tensor: int) -> tuple[int | None, ...]:
        """The shape of a tensor."""
        return tuple(self._tensors[tensor].shape)

    def tensor_of(self, layer: Any, argument: str) -> int:
        """The tensor that a layer makes.

        Args:
            layer: Its name, its path into nested models, or the layer.
            argument: The argument it came from, for messages.

        Raises:
            ValueError: If there is no such layer (with the nearest names), or not
                exactly one tensor.
        """
        path = paths_of(self.model, layer, argument)
        calls = self.calls.get(path, [])
        if not calls:
            raise ValueError(
                f"`{argument}`: the graph of {self.model.name!r} cannot be cut at "
                f"{path!r}: it is an input, or inside a layer that is not functional."
            )
        if len(calls) > 1:
            raise ValueError(
                f"`{argument}`: the layer {path!r} is used {len(calls)} times; a cut "
                "needs a layer that is used once."
            )
        if len(calls[0]) > 1:
            raise ValueError(
                f"`{argument}`: the layer {path!r} makes {len(calls[0])} tensors; a "
                "cut must go through one."
            )
        return calls[0][0]

    def ancestors(self, tensor: int) -> set[int]:
        """Indices of the steps that a tensor depends on."""
        index = {id(step): i for i, step in enumerate(self.steps)}
        found: set[int] = set()
        pending = [tensor]
        while pending:
            step = self._makers.get(pending.pop())
            if step is not None and index[id(step)] not in found:
                found.add(index[id(step)])
                pending += step.inputs
        return found

    def maker(self, tensor: int) -> Step | None:
        """The step that makes a tensor, None for an input of the model."""
        return self._makers.get(tensor)

    def split(self, cuts: Sequence[int], argument: str) -> list[Part]:
        """Cuts the graph at tensors, from the input to the output.

        Returns:
            The parts, one more than there are cuts.

        Raises:
            ValueError: If a tensor other than the cut passes it, a layer is used on
                both sides, or the cuts are out of order or at the output.
        """
        ends = [*cuts, self.output]
        done: set[int] = set()
        parts = []
        for number, end in enumerate(ends):
            steps = self.ancestors(end)
            if not done < steps:
                raise ValueError(
                    f"`{argument}`: {self._name(ends[number - 1])!r} does not come "
                    f"before {self._name(end)!r} in {self.model.name!r}. Cuts go from "
                    "the input to the output, and lie before the output."
                )
            starts = (ends[number - 1],) if number else self.inputs
            parts.append(
                Part(self, [self.steps[i] for i in sorted(steps - done)], starts, end)
            )
            done |= steps
        self._check_apart(parts, argument)
        return parts

    def _check_apart(self, parts: list[Part], argument: str) -> None:
        sides: dict[int, int] = {}
        for number, part in enumerate(parts):
            known = {
                *part.starts,
                *(out for step in part.steps for out in step.outputs),
            }
            for step in part.steps:
                for tensor in step.inputs:
                    if tensor not in known:
                        cut = self._name(part.starts[0])
                        raise ValueError(
                            f"`{argument}`: the cut at {cut!r} would have to cut two "
                            f"tensors: the output of {self._name(tensor)!r} bypasses "
                            f"it and is used by {step.path!r} behind it. Cut at a "
                            "layer that everything behind it depends on alone."
                        )
                if sides.setdefault(id(step.layer), number) != number:
                    raise ValueError(
                        f"`{argument}`: the layer {step.path!r} is used on both sides "
                        "of the cut."
                    )

    def _name(self, tensor: int) -> str:
        step = self.maker(tensor)
        if step is not None:
            return step.path
        return self._tensors[tensor]._keras_history.operation.name


@dataclass(frozen=True)
class Part:
    """A part of a graph between two cuts.

    Attributes:
        graph: The graph.
        steps: The calls in it.
        starts: The tensors it takes: the cut before it, or the model's inputs.
        end: The tensor it makes.
    """

    graph: Graph
    steps: list[Step]
    starts: tuple[int, ...]
    end: int

    def build(self, name: str, reseed: int = 0) -> tuple[keras.Model, dict[str, str]]:
        """Makes a model of new layers, with new weights.

        Args:
            name: Name of the model.
            reseed: 0 keeps the seeds of initializers and of dropout; another number
                makes other seeds of them.

        Returns:
            The model, and for each path in the original the name of its layer. Names
            stay as they are unless two nested models use the same.
        """
        inputs = [self._input(tensor) for tensor in self.starts]
        tensors = dict(zip(self.starts, inputs, strict=True))
        layers: dict[int, Any] = {}
        names: dict[str, str] = {}
        taken = {t._keras_history.operation.name for t in inputs}
        for step in self.steps:
            if id(step.layer) not in layers:
                new = _unique(step, taken)
                layers[id(step.layer)] = _copy(step.layer, new, reseed)
                taken.add(new)
                if isinstance(step.layer, keras.Layer):
                    names[step.path] = new
            own = [id(tensor) for tensor in _tensors_in(step.arguments)]
            values = dict(zip(own, (tensors[t] for t in step.inputs), strict=True))
            args, kwargs = keras.tree.map_structure(
                lambda value, values=values: values.get(id(value), value),
                step.arguments,
            )
            outputs = keras.tree.flatten(layers[id(step.layer)](*args, **kwargs))
            tensors |= dict(zip(step.outputs, outputs, strict=True))
        structure: Any = inputs[0]
        if self.starts == self.graph.inputs:
            structure = keras.tree.pack_sequence_as(
                self.graph._functional._inputs_struct, inputs
            )
        return keras.Model(structure, tensors[self.end], name=name), names

    def _input(self, tensor: int) -> Any:
        like = self.graph._tensors[tensor]
        if tensor in self.graph.inputs:
            layer = like._keras_history.operation
            return type(layer).from_config(layer.get_config()).output
        return keras.Input(batch_shape=like.shape, dtype=like.dtype)


def _arguments(node: Any) -> tuple[Any, dict[str, Any]]:
    """The arguments of a call, without the masks that Keras hands on by itself.

    In the graph of a model such a mask is a tensor of its own, which would bypass
    every cut; when the model runs it is attached to the tensor that it belongs to.
    """
    args, kwargs = node.arguments.args, node.arguments.kwargs
    attached = {
        id(getattr(tensor, "_keras_mask", None)) for tensor in keras.tree.flatten(args)
    }
    handed_on = [
        key
        for key, value in kwargs.items()
        if key.endswith("mask")
        and all(id(mask) in attached for mask in keras.tree.flatten(value))
    ]
    return args, {key: value for key, value in kwargs.items() if key not in handed_on}


def _tensors_in(arguments: Any) -> list[Any]:
    leaves = keras.tree.flatten(arguments)
    return [leaf for leaf in leaves if isinstance(leaf, keras.KerasTensor)]


def _fits(inner: Any, arguments: tuple[Any, dict[str, Any]]) -> bool:
    """Whether a nested model is called on just its inputs, in their shapes."""
    tensors = _tensors_in(arguments)
    args, _ = arguments
    structure = args[0] if args else None
    return len(tensors) == len(keras.tree.flatten(structure)) == len(
        inner.inputs
    ) and all(
        len(a.shape) == len(b.shape) for a, b in zip(tensors, inner.inputs, strict=True)
    )


def _unique(step: Step, taken: set[str]) -> str:
    name = step.layer.name
    if name in taken:
        name = step.path.replace("/", "-")
    while name in taken:
        name += "-"
    return name


def _copy(layer: Any, name: str, reseed: int) -> Any:
    config = configuration(layer)
    config["config"]["name"] = name
    config.pop("build_config", None)  # the call builds it
    if reseed:
        config = _reseeded(config, reseed)
    return keras.saving.deserialize_keras_object(config)


def _reseeded(config: Any, reseed: int) -> Any:
    """The configuration with other seeds wherever it has fixed ones."""
    if isinstance(config, dict):
        return {
            key: _new_seed(value, reseed)
            if key == "seed" and isinstance(value, int)
            else _reseeded(value, reseed)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_reseeded(item, reseed) for item in config)
    return config


def _new_seed(seed: int, reseed: int) -> int:
    # A sum would make seed 1 of one branch seed 0 of the next.
    digest = hashlib.sha256(f"{seed},{reseed}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
