"""What the presets share: links of their own, besides those that they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_distill.distiller import Distiller
from keras_distill.links import Link
from keras_distill.losses.base import PACKAGE
from keras_distill.specs import input_spec, symbolic_run
from keras_distill.taps import paths_of, run_with_taps
from keras_distill.teachers.base import Teacher


@keras.saving.register_keras_serializable(package=PACKAGE)
class Preset(Distiller):
    """A distiller that makes links of its own from the arguments of its method.

    The configuration holds those arguments instead of the links; a subclass adds them
    to `get_config`.

    Args:
        student: A built Keras model.
        teacher: As in `Distiller`.
        own: The method's links.
        links: Further links.
        **options: As in `Distiller`.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any,
        *,
        own: Sequence[Link],
        links: Sequence[Link] = (),
        **options: Any,
    ) -> None:
        super().__init__(student, teacher, links=[*own, *links], **options)
        self._own_names = [link.name for link in own]

    @property
    def own_links(self) -> tuple[Link, ...]:
        """The method's links, with paths instead of layers."""
        return self.links[: len(self._own_names)]

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config["links"] = [
            link for link in config["links"] if link["name"] not in self._own_names
        ]
        return config


def labels_and_links(options: dict[str, Any]) -> dict[str, Any]:
    """Options of methods whose papers train on labels and links alone.

    There is a soft term only if an option asks for one.
    """
    given = any(options.get(name) is not None for name in ("temperature", "beta"))
    soft_loss = "auto" if given else None
    return {"alpha": 1.0, "soft_loss": soft_loss} | options


def pairs_of_layers(argument: str, layers: Any, least: int = 1) -> list[tuple]:
    """Pairs (student layer, teacher layer) of a dict.

    Raises:
        TypeError: If `layers` is not a dict.
        ValueError: If there are fewer pairs than the method needs.
    """
    if not isinstance(layers, Mapping):
        raise TypeError(
            f"`{argument}` must be a dict {{student layer: teacher layer}}. "
            f"Received: {layers!r}"
        )
    if len(layers) < least:
        raise ValueError(
            f"`{argument}` must name at least {least} pair(s) of layers. "
            f"Received: {dict(layers)}"
        )
    return list(layers.items())


def two_layers(argument: str, layers: Any) -> tuple[Any, Any]:
    """The one student layer and the one teacher layer of an argument.

    Raises:
        ValueError: If there are not two.
    """
    if not isinstance(layers, (list, tuple)) or len(layers) != 2:
        raise ValueError(
            f"`{argument}` must be (student layer, teacher layer). Received: {layers!r}"
        )
    return tuple(layers)


def paths_by_path(links: Sequence[Link]) -> dict[str, str]:
    """Student layer: teacher layer of links with one tap each, as paths."""
    return {link.student_layer: link.teacher_layer for link in links}


def tap_shapes(
    student: keras.Model, teacher: Teacher, own: Any, other: Any, argument: str
) -> tuple[tuple, tuple]:
    """Shapes of the features at a student's and at a teacher's layer.

    Raises:
        ValueError: If there is no such layer.
    """
    path = paths_of(student, own, argument)
    features = symbolic_run(
        lambda x: run_with_taps(student, x, [path], False)[1], input_spec(student)
    )
    target = teacher.resolve(other)
    known = teacher.tap_specs([target])
    return tuple(features[path].shape), tuple(known[target].shape)
