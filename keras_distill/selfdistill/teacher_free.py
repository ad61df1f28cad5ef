"""Distillation without any teacher: soft targets made of the labels."""

from __future__ import annotations

import copy
from typing import Any

import keras
from keras import ops

from keras_distill.base import BaseDistiller
from keras_distill.heads import example_rows, find_heads
from keras_distill.losses.base import PACKAGE, DistillationLoss, number
from keras_distill.losses.regularization import VirtualTeacher
from keras_distill.taps import call_model
from keras_distill.terms import Counted
from keras_distill.weighting import for_masked


@keras.saving.register_keras_serializable(package=PACKAGE)
class TeacherFree(BaseDistiller):
    r"""Tf-KD: learns from the labels, and from a teacher that is made of them by hand.

    The total is `alpha * compiled loss + beta * regularizer + the student's
    regularisation losses`. In the paper the two weights are `1 - α` and `α`. With the
    default regularizer, a virtual teacher, the second term is the paper's divergence
    without T²; the released code sets the student's temperature to 1 and takes the mean
    over classes, too, against which it sets a factor for every network.

    Logs: `hard_loss` and `soft_loss` (training only). `evaluate` gives the compiled
    loss.

    Args:
        student: A built Keras model.
        regularizer: A loss of labels and logits, such as `kd.losses.VirtualTeacher`,
            which is what None means. It is copied.
        alpha: Weight of the compiled loss.
        beta: Weight of the regularizer.
        student_inputs: What of `x` the student sees: a key, a list of keys, a
            registered function, or None for all.
        student_from_logits: Whether the student's outputs are logits. None finds out.
        output_weights: Weights of the outputs in the regularizer: a dict by name, or a
            list in the order of `output_names`.
        unlabelled: The integer label that means "no label"; None switches it off.
        name: Name of the model.

    Raises:
        TypeError: If `regularizer` is not a loss of this package.
        ValueError: If it needs a teacher, or a weight is negative.

    Example:

    ```python
    distiller = kd.TeacherFree(student, kd.losses.VirtualTeacher(temperature=20.0))
    distiller.compile("adam", "sparse_categorical_crossentropy")
    distiller.fit(x, y, epochs=30)
    ```

    References:
        Yuan et al., Revisiting Knowledge Distillation via Label Smoothing
        Regularization, CVPR 2020 (arXiv 1909.11723).
    """

    def __init__(
        self,
        student: keras.Model,
        regularizer: DistillationLoss | None = None,
        *,
        alpha: float = 0.9,
        beta: float = 0.1,
        student_inputs: Any = None,
        student_from_logits: bool | None = None,
        output_weights: Any = None,
        unlabelled: int | None = -1,
        name: str | None = None,
    ) -> None:
        regularizer = VirtualTeacher() if regularizer is None else regularizer
        if not isinstance(regularizer, DistillationLoss):
            raise TypeError(
                "`regularizer` must be a loss of keras_distill.losses. "
                f"Received: {regularizer!r}"
            )
        if regularizer.needs_teacher:
            raise ValueError(
                "`regularizer` must be a loss without a teacher, such as "
                f"VirtualTeacher. Received: {regularizer!r}"
            )
        super().__init__(
            student,
            alpha=alpha,
            student_inputs=student_inputs,
            student_from_logits=student_from_logits,
            output_weights=output_weights,
            unlabelled=unlabelled,
            name=name,
        )
        self._regularizer = copy.copy(regularizer)
        if hasattr(regularizer, "temperature"):
            value = number(regularizer.temperature)
            self._temperature = self._scalar("temperature", value)
            self._regularizer.temperature = self._temperature
        self.add_term("soft", beta)
        self._heads = find_heads(
            student,
            self._symbolic_outputs,
            student_from_logits,
            "student_from_logits",
            lambda: call_model(student, example_rows(self._student_spec), False),
        )

    def compute_terms(
        self, x: Any, y: Any, sample_weight: Any, training: bool
    ) -> tuple[Any, dict[str, Any]]:
        outputs = self.run_student(x, training)
        if not training:
            return outputs, {}
        labels, weights = self._read(y, sample_weight, training=False)
        values, counted = [], []
        for head, output, label, weight in zip(
            self._heads, keras.tree.flatten(outputs), labels, weights, strict=True
        ):
            if label is not None:
                logits = head.logits(output)
                known, own, rows = self._where_labelled([label], logits)
                weight = for_masked(weight, getattr(own, "_keras_mask", None))
                value = self._regularizer(known, own, weight)
                counted.append(rows)
                values.append(self.output_weights.get(head.name, 1.0) * value)
        if not values:
            return outputs, {}
        return outputs, {
            "soft": Counted(ops.sum(ops.stack(values)), ops.mean(ops.stack(counted)))
        }

    @property
    def regularizer(self) -> DistillationLoss:
        """The loss of labels and logits."""
        return self._regularizer

    @property
    def beta(self) -> Any:
        """Weight of the regularizer, a variable."""
        return self._terms["soft"]

    @beta.setter
    def beta(self, value: Any) -> None:
        self._terms["soft"] = value

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "regularizer": keras.saving.serialize_keras_object(self._regularizer),
            "beta": number(self.beta),
        }
