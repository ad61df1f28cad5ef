"""Which layers to link: pairs of the same stage."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras

from keras_distill.adapters import Connector, margins
from keras_distill.links import Link, as_loss
from keras_distill.losses.base import DistillationLoss
from keras_distill.losses.boundary import ActivationBoundary, MarginReLU
from keras_distill.losses.flow import FlowOfProcedure, SingularValue
from keras_distill.specs import input_spec, symbolic_run
from keras_distill.tables import text_table
from keras_distill.taps import call_model, children, reading
from keras_distill.teachers.model import Model

PARTS = 3  # of a network that is one stage throughout
NORMALIZATION = keras.layers.BatchNormalization
ACTIVATIONS = (
    keras.layers.Activation,
    keras.layers.ELU,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
    keras.layers.ReLU,
)


@dataclass(frozen=True)
class Tap:
    """A place where a network can be read.

    Attributes:
        path: Path of the layer.
        layer: The layer.
        shape: Shape of its output.
        depth: Share of the network's layers that are done by then.
        before: Whether an activation follows at once.
    """

    path: str
    layer: Any
    shape: tuple[int | None, ...]
    depth: float
    before: bool

    @property
    def grid(self) -> tuple[int | None, ...]:
        return self.shape[1:-1]


def suggest_links(
    student: keras.Model,
    teacher: Any,
    loss: Any,
    *,
    weight: float = 1.0,
    adapter: Any = "auto",
) -> list[Link]:
    """Pairs the layers of two networks by stage, and prints the pairs.

    A stage is a run of layers on one grid; its last layer is read (for activation
    boundaries and the overhaul: the last one in front of an activation). Stages on the
    same grid make pairs; where there is none in common, stages of the same relative
    depth. A network that keeps one grid throughout is cut where its width changes, or
    else into three parts. Losses on flows get consecutive pairs. Layers whose output
    the loss cannot compare, and the networks' outputs, are left out.

    Args:
        student: A built Keras model.
        teacher: A built Keras model, or a `kd.teachers.Model`.
        loss: As in `Link`; for the overhaul the class `MarginReLU` itself, which gets
            its margins from the teacher's batch normalization.
        weight: Weight of each link.
        adapter: `"auto"` for an adapter where the loss cannot compare the features
            without one (for activation boundaries and the overhaul a `Connector`),
            None for none.

    Returns:
        Links from shallow to deep, to be given to a `Distiller`.

    Raises:
        TypeError: If the teacher is not one Keras model, or the adapter is a layer,
            which cannot belong to several links.
        ValueError: If no layers fit.

    Example:

    ```python
    links = kd.suggest_links(student, teacher, kd.losses.Hint(), weight=10.0)
    distiller = kd.Distiller(student, teacher, links=links)
    ```
    """
    model = teacher.model if isinstance(teacher, Model) else teacher
    for argument, network in (("student", student), ("teacher", model)):
        if not isinstance(network, keras.Model):
            raise TypeError(
                f"`{argument}` must be one keras.Model. Received: {network!r}"
            )
    if adapter not in (None, "auto"):
        raise TypeError(
            "`adapter` must be None or 'auto': one layer cannot belong to several "
            f"links. Received: {adapter!r}"
        )
    make_loss = _loss_maker(loss, model)
    sample = make_loss(None)
    before = isinstance(sample, (ActivationBoundary, MarginReLU))
    flow = isinstance(sample, (FlowOfProcedure, SingularValue))
    compares = _Compares(sample, flow)
    own, known = (
        [t for t in _taps(m) if compares(t, t) and (t.before or not before)]
        for m in (student, model)
    )
    if inspect.isclass(loss) and issubclass(loss, MarginReLU):
        known = [t for t in known if isinstance(t.layer, NORMALIZATION)]
    pairs = _pairs(*_grids_if_both(own, known))
    if len(pairs) < 1 + flow:
        raise ValueError(
            f"suggest_links found {len(pairs)} pair(s) of layers for "
            f"{type(sample).__name__}. Make kd.Link objects by hand."
        )
    links = []
    for group in itertools.pairwise(pairs) if flow else ([pair] for pair in pairs):
        mine, theirs = zip(*group, strict=True)
        needed = adapter == "auto" and not flow and not compares(*mine, *theirs)
        kind = (Connector() if before else "auto") if needed else None
        layers = [t.path for t in mine], [t.path for t in theirs]
        if not flow:
            layers = layers[0][0], layers[1][0]
        links.append(Link(*layers, make_loss(theirs[-1]), weight=weight, adapter=kind))
    print(_table(pairs, links))
    return links


def _loss_maker(loss: Any, teacher: keras.Model) -> Callable[[Tap | None], Any]:
    """A function that makes the loss for a place of the teacher."""
    if inspect.isclass(loss):
        if issubclass(loss, MarginReLU):
            return lambda tap: loss(0.0 if tap is None else margins(tap.layer))
        return lambda tap: loss()
    made = as_loss(loss)
    if getattr(made, "needs_labels", False) or not getattr(made, "needs_teacher", True):
        raise ValueError(
            "`loss` must compare features with features. "
            f"Received: {type(made).__name__}"
        )
    return lambda tap: made


class _Compares:
    """Whether a loss can compare the features of a student's and a teacher's layer."""

    def __init__(self, loss: Any, flow: bool) -> None:
        self.loss = loss
        self.flow = flow
        self.known: dict[Any, bool] = {}

    def __call__(self, own: Tap, other: Tap) -> bool:
        if not isinstance(self.loss, DistillationLoss):
            return own.shape[1:] == other.shape[1:]
        key = own.shape, other.shape
        if key not in self.known:
            features = [keras.KerasTensor(t.shape) for t in (other, own)]
            if self.flow:
                features = [[f, f] for f in features]
            try:
                symbolic_run(self.loss, *features)
                self.known[key] = True
            except ValueError:
                self.known[key] = False
        return self.known[key]


# -- where a network can be read ----------------------------------------------------


def _taps(model: keras.Model) -> list[Tap]:
    """The layers that are used once and give one tensor, in the order they finish."""
    paths = dict(_walk(model, ""))
    order: list[str] = []

    def run(x: Any) -> Any:
        with reading(list(paths)) as found:
            outputs = call_model(model, x, False)
        names = {id(layer): path for layer, path in paths.items()}
        features = {
            names[key]: calls[0]
            for key, calls in found.items()
            if len(calls) == 1 and _is_feature(calls[0])
        }
        order[:] = features
        return outputs, features

    outputs, features = symbolic_run(run, input_spec(model))
    ends = {tuple(output.shape) for output in keras.tree.flatten(outputs)}
    layers = {path: layer for layer, path in paths.items()}
    taps = []
    for index, path in enumerate(order):
        layer, shape = layers[path], tuple(features[path].shape)
        following = layers[order[index + 1]] if index + 1 < len(order) else None
        inside = isinstance(layer, (*ACTIVATIONS, keras.layers.InputLayer))
        before = isinstance(following, ACTIVATIONS) and not inside
        if shape not in ends and not isinstance(layer, keras.layers.InputLayer):
            depth = (index + 1) / len(order)
            taps.append(Tap(path, layer, shape, depth, before))
    return taps


def _walk(layer: keras.Layer, prefix: str) -> Iterator[tuple[keras.Layer, str]]:
    for child in children(layer):
        yield child, f"{prefix}{child.name}"
        yield from _walk(child, f"{prefix}{child.name}/")


def _is_feature(value: Any) -> bool:
    shape = getattr(value, "shape", None)
    if shape is None or len(shape) < 2 or shape[-1] is None:
        return False
    return "float" in keras.backend.standardize_dtype(value.dtype)


# -- pairs --------------------------------------------------------------------------


def _grids_if_both(own: list[Tap], known: list[Tap]) -> list[list[Tap]]:
    """Without the vectors, where both networks have more than vectors."""
    grids = [[t for t in taps if t.grid] for taps in (own, known)]
    return grids if all(grids) else [own, known]


def _pairs(own: list[Tap], known: list[Tap]) -> list[tuple[Tap, Tap]]:
    """Stages on the same grid; else of the same relative depth."""
    mine = {tap.grid: tap for tap in own}
    theirs = {tap.grid: tap for tap in known}
    common = [grid for grid in mine if grid in theirs]
    if common and len(mine) > 1 and len(theirs) > 1:
        found = [(mine[grid], theirs[grid]) for grid in common]
        return sorted(found, key=lambda pair: pair[0].depth)
    own, known = _stages(own), _stages(known)
    count = min(len(own), len(known))

    def last(taps: list[Tap], part: int) -> Tap:
        return taps[(part + 1) * len(taps) // count - 1]

    return [(last(own, part), last(known, part)) for part in range(count)]


def _stages(taps: list[Tap]) -> list[Tap]:
    """The last places of the stages of a network."""
    ends: dict[Any, Tap] = {tap.grid: tap for tap in taps}
    if len(ends) == 1:
        ends = {tap.shape: tap for tap in taps}
    if len(ends) == 1:
        ends = {math.ceil(tap.depth / taps[-1].depth * PARTS): tap for tap in taps}
    return sorted(ends.values(), key=lambda tap: tap.depth)


def _table(pairs: list[tuple[Tap, Tap]], links: list[Link]) -> str:
    rows = []
    for own, other in pairs:
        link = next(
            li for li in links if own.path in keras.tree.flatten(li.student_layer)
        )
        kind = link.adapter
        kind = type(kind).__name__ if isinstance(kind, keras.Layer) else str(kind)
        rows.append(
            [own.path, str(own.shape[1:]), other.path, str(other.shape[1:]), kind]
        )
    return text_table(["student", "shape", "teacher", "shape", "adapter"], rows)
