"""Fitting links to two networks: paths, shapes and adapters."""

from __future__ import annotations

import copy
from typing import Any

import keras

from keras_distill.adapters import Regressor
from keras_distill.links import Link, as_list, same_shape
from keras_distill.losses.base import DistillationLoss
from keras_distill.specs import symbolic_run
from keras_distill.taps import call_model, paths_of
from keras_distill.teachers.base import Teacher


def resolved_link(link: Link, student: keras.Model, teacher: Teacher) -> Link:
    """A copy of the link with paths instead of layers."""
    link = copy.copy(link)
    link.student_layer = paths_of(student, link.student_layer, "student_layer")
    link.teacher_layer = teacher.resolve(link.teacher_layer)
    return link


def fit_link(link: Link, students: Any, teachers: Any) -> None:
    """Builds the adapters of a link and checks that its loss can be computed."""
    student = taps_of(link.student_layer, students)
    teacher = taps_of(link.teacher_layer, teachers)
    shapes = _shapes(student), _shapes(teacher)
    if link.teacher_adapter is not None:
        teacher = _build_adapter(link.teacher_adapter, teacher, *reversed(shapes))
    if link.adapter == "auto":
        same = _same_shapes(student, teacher)
        link.adapter = None if same else Regressor()
    if link.adapter is not None:
        student = _build_adapter(link.adapter, student, shapes[0], _shapes(teacher))
    link.shapes = shapes
    needs_labels = getattr(link.loss, "needs_labels", False)
    if not isinstance(link.loss, DistillationLoss):
        if not _same_shapes(student, teacher):
            raise ValueError(
                f"The link {link.name!r} compares student features of shape "
                f"{_shapes(student)} with teacher features of shape "
                f"{_shapes(teacher)}. Give `adapter='auto'` or a layer."
            )
    elif not needs_labels:
        try:
            symbolic_run(link.loss, teacher, student)
        except ValueError as error:
            raise ValueError(f"The link {link.name!r}: {error}") from error


def unique(layers: Any) -> list[str]:
    """Every path once, in the order of their first use."""
    return list(dict.fromkeys(path for layer in layers for path in as_list(layer)))


def taps_of(layer: Any, features: dict[str, Any]) -> Any:
    """The features of one path, or of a list of paths."""
    if isinstance(layer, (list, tuple)):
        return [features[path] for path in layer]
    return features[layer]


def _shapes(taps: Any) -> Any:
    if isinstance(taps, (list, tuple)):
        return [tuple(tap.shape) for tap in taps]
    return tuple(taps.shape)


def _same_shapes(one: Any, other: Any) -> bool:
    one, other = as_list(one), as_list(other)
    return len(one) == len(other) and all(
        same_shape(a.shape, b.shape) for a, b in zip(one, other, strict=True)
    )


def _build_adapter(adapter: Any, taps: Any, own: Any, other: Any) -> Any:
    """Tells an adapter the shapes, builds it, and returns what it makes of the taps."""
    if hasattr(adapter, "match"):
        adapter.match(own, other)
    return adapt(adapter, taps, False)


def adapt(adapter: Any, taps: Any, training: bool) -> Any:
    """Features as an adapter hands them on; without one as they are."""
    return taps if adapter is None else call_model(adapter, taps, training)
