"""What is computed from the logits of one output."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_distill.heads import Head, example_rows, find_heads
from keras_distill.losses.base import DistillationLoss
from keras_distill.monitoring.calibration import calibration
from keras_distill.monitoring.figures import reliability_figure
from keras_distill.taps import call_model


class View:
    """One output of the student, and of the teacher where both are compared.

    Args:
        suffix: Of the tags; empty for a student with one output.
        index: The place among the student's outputs.
        head: Of the student.
        teacher_index: The place among the teacher's outputs.
        teacher_head: Of the teacher, or None.
    """

    def __init__(
        self,
        suffix: str,
        index: int,
        head: Head,
        teacher_index: int = 0,
        teacher_head: Head | None = None,
    ) -> None:
        self.suffix = suffix
        self.index = index
        self.head = head
        self.teacher_index = teacher_index
        self.teacher_head = teacher_head
        self.first: np.ndarray | None = None  # accuracies that gains are over

    def of_student(self, outputs: Any) -> dict[str, Any]:
        """The student's logits, and which positions count."""
        output = keras.tree.flatten(outputs)[self.index]
        mask = getattr(output, "_keras_mask", None)
        logits = tf.cast(self.head.logits(output), "float32")
        valid = tf.ones(tf.shape(logits)[:-1], bool) if mask is None else mask
        return {"student": logits, "valid": valid}

    def of_teacher(self, known: Any) -> dict[str, Any]:
        """The teacher's logits, if it has this output."""
        if self.teacher_head is None:
            return {}
        output = keras.tree.flatten(known)[self.teacher_index]
        return {"teacher": tf.cast(self.teacher_head.logits(output), "float32")}

    def write(self, found: dict[str, np.ndarray], bins: int) -> None:
        """Writes the charts of this output to the current writer."""
        log_p: dict[str, np.ndarray] = {
            name: _log_softmax(found[name])
            for name in ("student", "teacher")
            if name in found
        }
        for name, values in log_p.items():
            entropy = -np.sum(np.exp(values) * values, -1).mean()
            self._scalar(f"entropy/{name}", entropy)
        if "teacher" in log_p:
            student, teacher = log_p["student"], log_p["teacher"]
            self._scalar("agreement", np.mean(student.argmax(-1) == teacher.argmax(-1)))
            kl = np.sum(np.exp(teacher) * (teacher - student), -1).mean()
            self._scalar("kl", kl)
        labels = found.get("labels")
        if labels is None or not np.any(labels >= 0):
            return
        known = labels >= 0
        measured = {
            name: calibration(np.exp(values[known]), labels[known], bins)
            for name, values in log_p.items()
        }
        for name, value in measured.items():
            self._scalar(f"ece/{name}", value.error)
        tag = f"reliability{self.suffix}"
        tf.summary.image(tag, reliability_figure(measured, bins))
        accuracies = class_accuracies(log_p["student"], labels)
        if self.first is None:
            self.first = accuracies
        for index, gain in enumerate(accuracies - self.first):
            if np.isfinite(gain):  # the class has rows
                self._scalar(f"class_gain/{index}", gain)

    def _scalar(self, tag: str, value: Any) -> None:
        tf.summary.scalar(tag + self.suffix, value)


def views_of(distiller: Any, teacher: Any) -> list[View]:
    """A view of each output.

    Args:
        distiller: Any distiller.
        teacher: The one whose outputs are compared; None for none.
    """
    student = distiller.student
    heads = find_heads(
        student,
        distiller._symbolic_outputs,
        distiller.student_from_logits,
        "student_from_logits",
        lambda: call_model(student, example_rows(distiller._student_spec), False),
    )
    suffixes = [f"/{head.name}" if len(heads) > 1 else "" for head in heads]
    matches = {}
    if teacher is not None:
        known = teacher.heads()
        matches = {
            match.student_index: (match.teacher_index, known[match.teacher_index])
            for match in distiller._matches
        }
    return [
        View(suffixes[index], index, head, *matches.get(index, ()))
        for index, head in enumerate(heads)
    ]


def compares_logits(distiller: Any) -> bool:
    """Whether a teacher's logits can be set beside the student's."""
    return isinstance(getattr(distiller, "soft_loss", None), DistillationLoss) and bool(
        getattr(distiller, "_matches", None)
    )


def class_accuracies(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of right rows per class; NaN for a class without rows."""
    classes = scores.shape[-1]
    known = labels >= 0
    right = (scores.argmax(-1) == labels)[known]
    count = np.bincount(labels[known], minlength=classes)
    with np.errstate(invalid="ignore"):
        return np.bincount(labels[known], right, classes) / count


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.asarray(logits, "float64")
    shifted = shifted - shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
