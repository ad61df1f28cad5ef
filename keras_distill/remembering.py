"""What a saved distiller remembers, of its teacher too."""

from __future__ import annotations

import os
from typing import Any

import keras

from keras_distill.links import Link, serialize_function
from keras_distill.losses.base import number
from keras_distill.teachers.base import Absent
from keras_distill.teachers.model import Model


class Remembering:
    """Mixed into `Distiller`: its config, and the teacher beside or instead of it."""

    def get_config(self: Any) -> dict[str, Any]:
        config = super().get_config()  # type: ignore[misc]
        serialize = keras.saving.serialize_keras_object
        config.setdefault("alpha", None)  # without a hard term
        config["teacher"] = self._remembered_teacher()
        config["soft_loss"] = serialize(self._soft_loss)
        if self._soft_loss is not None:
            config["beta"] = number(self.beta)
        config["links"] = [
            {
                "student_layer": link.student_layer,
                "teacher_layer": link.teacher_layer,
                "loss": serialize(link.loss),
                "weight": number(self._terms[link.name]),
                "adapter": serialize(link.adapter),
                "teacher_adapter": serialize(link.teacher_adapter),
                "name": link.name,
            }
            for link in self.links
        ]
        return config | {"save_teacher": self.save_teacher}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Any:
        config = dict(config)
        teacher = Absent(config.pop("teacher"))
        config = {
            key: keras.saving.deserialize_keras_object(
                value, custom_objects=custom_objects
            )
            for key, value in config.items()
        }
        config["links"] = [Link(**link) for link in config["links"]]
        if not config["output_weights"]:
            config["output_weights"] = None
        return cls(teacher=teacher, **config)  # type: ignore[call-arg]

    def _remembered_teacher(self: Any) -> dict[str, Any]:
        teacher = self.teacher
        if isinstance(teacher, Absent):
            return teacher.memory
        kinds = {match.teacher.name: match.teacher.kind for match in self._matches}
        specs = teacher.tap_specs(self._teacher_taps) if self._teacher_taps else {}
        return {
            "names": list(teacher.names),
            "shapes": [list(t.shape) for t in keras.tree.flatten(teacher.outputs)],
            "kinds": [kinds.get(name, "logits") for name in teacher.names],
            "taps": {tap: list(spec.shape) for tap, spec in specs.items()},
            "fingerprint": teacher.fingerprint(),
            "arguments": self._saved_arguments(),
        }

    def _saved_arguments(self: Any) -> dict[str, Any]:
        """How the teacher that is saved beside the distiller was wrapped."""
        if not (self.save_teacher and isinstance(self.teacher, Model)):
            return {}
        inputs = serialize_function("inputs", self.teacher.inputs)
        return {"inputs": inputs, "from_logits": self.teacher.from_logits}

    def save_assets(self: Any, dir_path: str) -> None:
        super().save_assets(dir_path)  # type: ignore[misc]
        if self.save_teacher and isinstance(self.teacher, Model):
            self.teacher.model.save(os.path.join(dir_path, "teacher.keras"))

    def load_assets(self: Any, dir_path: str) -> None:
        super().load_assets(dir_path)  # type: ignore[misc]
        path = os.path.join(dir_path, "teacher.keras")
        if os.path.exists(path):
            model = keras.saving.load_model(path, compile=False)
            arguments = keras.saving.deserialize_keras_object(
                self.teacher.memory.get("arguments", {})
            )
            self._set_teacher(Model(model, **arguments))
