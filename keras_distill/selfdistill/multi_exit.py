"""A network with exits, as a Keras model, and what an exit is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distill.heads import Head, example_rows, find_heads
from keras_distill.losses.base import PACKAGE
from keras_distill.online.gated import pooled, symbolic_inputs
from keras_distill.specs import input_spec, output_spec, symbolic_run
from keras_distill.taps import call_model


@keras.saving.register_keras_serializable(package=PACKAGE)
class ExitNetwork(keras.Model):
    """A trunk in parts, with an exit behind each: features, then a classifier.

    Exit i computes `classifiers[i](bottlenecks[i](h_i))`, where `h_i` comes out of
    `trunk[i]`. The last part of the trunk has no bottleneck: what comes out of it are
    the network's own features.

    Args:
        trunk: Built models, each of which takes what the one before it gives.
        bottlenecks: One model for each part of the trunk but the last, to features
            `(B, D)` as wide as the network's own.
        classifiers: One model for each part of the trunk, to class scores.
        name: Name of the model.

    Raises:
        ValueError: If the numbers of parts or the shapes do not fit.
    """

    def __init__(
        self,
        trunk: Sequence[keras.Model],
        bottlenecks: Sequence[keras.Model],
        classifiers: Sequence[keras.Model],
        name: str | None = None,
    ) -> None:
        trunk, bottlenecks = list(trunk), list(bottlenecks)
        if len(trunk) < 2 or not len(trunk) == len(classifiers) == len(bottlenecks) + 1:
            raise ValueError(
                "An ExitNetwork needs at least two parts of the trunk, one classifier "
                "for each, and one bottleneck less. Received: "
                f"{len(trunk)}, {len(classifiers)} and {len(bottlenecks)}."
            )
        super().__init__(name=name, autocast=False)
        self.trunk = trunk
        self.bottlenecks = bottlenecks
        self.classifiers = list(classifiers)
        spec = input_spec(trunk[0])
        outputs, features = symbolic_run(lambda x: self.everything(x, False), spec)
        for name_of, tensors in (("classifiers", outputs), ("bottlenecks", features)):
            shapes = [tuple(t.shape)[1:] for t in tensors]
            if len(set(shapes)) > 1:
                raise ValueError(
                    f"`{name_of}` must give the shapes of the network's own end. "
                    f"Received: {shapes}"
                )
        self._head: Head = find_heads(
            self.classifiers[-1],
            outputs[-1],
            None,
            "classifiers",
            lambda: self.everything(example_rows(spec), False)[0][-1],
        )[0]
        self.built = True

    @property
    def exits(self) -> int:
        """Number of exits, the network's own output among them."""
        return len(self.trunk)

    @property
    def _functional(self) -> keras.Model:
        """The model whose inputs these are."""
        return self.trunk[0]

    @property
    def output_names(self) -> list[str]:
        """The names of the network's own outputs."""
        return list(getattr(self.classifiers[-1], "output_names", ["output"]))

    def everything(self, x: Any, training: bool) -> tuple[list[Any], list[Any]]:
        """Outputs and features `(B, D)` of all exits, from shallow to deep."""
        outputs, features = [], []
        for index, part in enumerate(self.trunk):
            x = call_model(part, x, training)
            output, feature = self._leave(index, x, training)
            outputs.append(output)
            features.append(feature)
        return outputs, features

    def _leave(self, index: int, x: Any, training: bool) -> tuple[Any, Any]:
        if index < len(self.bottlenecks):
            x = call_model(self.bottlenecks[index], x, training)
        return call_model(self.classifiers[index], x, training), _mean(x)

    def logits(self, output: Any) -> Any:
        """Logits `(B, ..., classes)` of an exit's output."""
        return self._head.logits(output)

    def call(self, x: Any, training: bool | None = None) -> Any:
        for part in self.trunk:
            x = call_model(part, x, bool(training))
        return call_model(self.classifiers[-1], x, bool(training))

    # -- plain models on the same weights -------------------------------------------

    def until(self, index: int) -> keras.Model:
        """The network up to an exit, as a functional model on the same weights."""
        inputs = symbolic_inputs(self.trunk[0])
        x = inputs
        for part in self.trunk[: index + 1]:
            x = part(x)
        return keras.Model(inputs, self._leave(index, x, False)[0])

    def part(self, index: int) -> keras.Model:
        """One part with its exit: what goes on, the output, and how sure it is."""
        inputs = symbolic_inputs(self.trunk[index])
        shared = call_model(self.trunk[index], inputs, False)
        output = self._leave(index, shared, False)[0]
        logits = ops.cast(self.logits(output), "float32")
        sure = ops.max(ops.softmax(logits), -1)
        model = keras.Model(inputs, {"shared": shared, "output": output, "sure": sure})
        # The number of rows changes all the time: XLA would compile for each.
        model.jit_compile = False
        return model

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            "trunk": [serialize(part) for part in self.trunk],
            "bottlenecks": [serialize(part) for part in self.bottlenecks],
            "classifiers": [serialize(part) for part in self.classifiers],
            "name": self.name,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> ExitNetwork:
        return cls(**keras.saving.deserialize_keras_object(config, custom_objects))


class Predictors:
    """Models that predict at early exits, made when they are first asked for.

    Not a dict: Keras would save the models with the weights.

    Args:
        network: Whose weights they use.
    """

    def __init__(self, network: ExitNetwork) -> None:
        self._network = network
        self._models: dict[Any, keras.Model] = {}

    def until(self, index: int) -> keras.Model:
        """The network up to an exit."""
        if ("until", index) not in self._models:
            self._models["until", index] = self._network.until(index)
        return self._models["until", index]

    def part(self, index: int) -> keras.Model:
        """One part of the network with its exit."""
        if ("part", index) not in self._models:
            self._models["part", index] = self._network.part(index)
        return self._models["part", index]

    def leave_early(
        self,
        x: Any,
        threshold: float,
        batch_size: int | None = None,
        verbose: Any = "auto",
    ) -> np.ndarray:
        """Outputs of the exit at which each row is sure enough.

        Args:
            x: Arrays of rows, or a data set of batches.
            threshold: The probability at which a row leaves.
            batch_size: Rows that go through the network together, 32 by default.
            verbose: 0 for no progress bar.
        """
        bar = keras.utils.Progbar(None, verbose=1 if verbose == "auto" else verbose)
        outputs = []
        for batch in _batches(x, batch_size or 32):
            outputs.append(self._leave_early(batch, threshold))
            bar.update(len(outputs))
        return np.concatenate(outputs)

    def _leave_early(self, x: Any, threshold: float) -> np.ndarray:
        """One batch through the parts; each gets the rows that are still there."""
        last = self._network.exits - 1
        for index in range(last + 1):
            found = self.part(index).predict_on_batch(x)
            output = found["output"]
            if index == 0:
                rows = np.arange(len(output))
                result = np.empty_like(output)
            leaves = (found["sure"] >= threshold) | (index == last)
            result[rows[leaves]] = output[leaves]
            rows = rows[~leaves]
            if not len(rows):
                break
            x = found["shared"][~leaves]
        return result


def _batches(x: Any, size: int) -> Iterator[Any]:
    """Batches of arrays, or the inputs of a data set of batches."""
    leaves = keras.tree.flatten(x)
    if all(hasattr(leaf, "shape") for leaf in leaves):
        for start in range(0, len(leaves[0]), size):
            rows = slice(start, start + size)
            yield keras.tree.map_structure(lambda leaf, rows=rows: leaf[rows], x)
    else:
        for batch in x:
            yield keras.utils.unpack_x_y_sample_weight(batch)[0]


def _mean(x: Any) -> Any:
    """The mean over all positions: `(B, ..., C)` to `(B, C)`."""
    axes = tuple(range(1, len(x.shape) - 1))
    return ops.mean(x, axes) if axes else x


def bottleneck(
    shape: Sequence[int | None],
    grid: Sequence[int | None],
    width: int,
    name: str,
    synchronized: bool = False,
) -> keras.Model:
    """What an exit makes of the trunk's tensor: features `(B, width)`.

    Args:
        shape: Of the tensor, `(None, ..., channels)`.
        grid: Shape of the last tensor of the network that has a grid, to which the
            bottleneck reduces this one.
        width: Of the network's own features.
        name: Name of the model.
        synchronized: Whether its BatchNormalization is, over replicas.
    """
    x = inputs = keras.Input(shape[1:])
    rank = len(shape) - 2
    convolution = {
        1: keras.layers.Conv1D,
        2: keras.layers.Conv2D,
        3: keras.layers.Conv3D,
    }.get(rank)
    if convolution is None:
        if rank != 0:
            raise ValueError(
                f"`exits`: a tensor of shape {tuple(shape)} needs 2 to 5 axes."
            )
        x = _normalized(keras.layers.Dense(width), x, synchronized)
        return keras.Model(inputs, x, name=name)
    stride = [1] * rank
    if len(grid) == len(shape):
        pairs = zip(shape[1:-1], grid[1:-1], strict=True)
        stride = [max(1, a // b) if a and b else 1 for a, b in pairs]
    middle = max(1, width // 4)
    for layer in (
        convolution(middle, 1, use_bias=False),
        convolution(middle, stride, strides=stride, use_bias=False),
        convolution(width, 1, use_bias=False),
    ):
        x = _normalized(layer, x, synchronized)
    return keras.Model(inputs, pooled(x), name=name)


def _normalized(layer: keras.Layer, x: Any, synchronized: bool) -> Any:
    x = keras.layers.BatchNormalization(
        momentum=0.9, epsilon=1e-5, synchronized=synchronized
    )(layer(x))
    return keras.layers.ReLU()(x)


def classifier(model: keras.Model, width: int, name: str) -> keras.Model:
    """A classifier on features `(B, width)` whose output is like a model's.

    Args:
        model: A built classifier, with logits, a softmax or a sigmoid at its end.
        width: Of the features.
        name: Name of the model.
    """
    spec = input_spec(model)
    output = output_spec(model, spec)
    if len(output.shape) != 2:
        raise ValueError(
            "`model` must give one row of class scores per row of data. Its output has "
            f"shape {tuple(output.shape)}."
        )
    head = find_heads(
        model,
        output,
        None,
        "model",
        lambda: call_model(model, example_rows(spec), False),
    )[0]
    units = output.shape[-1]
    activation = None
    if head.kind != "logits":
        activation = "softmax" if units > 1 else "sigmoid"
    inputs = keras.Input((width,))
    x = keras.layers.Dense(units, dtype="float32", activation=activation)(inputs)
    return keras.Model(inputs, x, name=name)
