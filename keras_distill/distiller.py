"""Distiller: a teacher, soft targets and links."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill.base import RESERVED, BaseDistiller
from keras_distill.comparing import agreement, apply_loss, positions
from keras_distill.fitting import adapt, fit_link, resolved_link, taps_of, unique
from keras_distill.links import Link, show_layers
from keras_distill.losses.base import PACKAGE, DistillationLoss
from keras_distill.remembering import Remembering
from keras_distill.soft import SoftTerm
from keras_distill.specs import symbolic_run
from keras_distill.taps import run_with_taps
from keras_distill.teachers.base import Absent, Teacher
from keras_distill.teachers.ensemble import as_teacher
from keras_distill.teachers.model import Model
from keras_distill.weighting import by_output, current_share, marked


@keras.saving.register_keras_serializable(package=PACKAGE)
class Distiller(SoftTerm, Remembering, BaseDistiller):
    r"""Trains a student to know what a teacher knows.

    The total is

    $$\alpha \cdot \text{compiled loss}(y, s) + \beta \cdot \text{soft loss}(t, s)
    + \sum_i w_i \cdot \text{link}_i + \text{the student's regularisation losses}$$

    The teacher runs once per step, with `training=False`, is never recorded for
    gradients and never changed; the student runs once, logits and taps in the same
    pass. `temperature`, `alpha`, `beta` and the weights are variables: assigning a
    number takes effect at once. `evaluate`, `predict` and saving concern the student.

    Args:
        student: A built Keras model.
        teacher: A built Keras model, a list of them (an ensemble), or any
            `kd.teachers.Teacher`.
        temperature: T of the soft loss, above 0, or a `kd.LearnedTemperature`; 4 for
            `"auto"`.
        alpha: Weight of the compiled loss.
        beta: Weight of the soft loss, 0.9 by default.
        links: `kd.Link` objects: further places at which the networks are compared.
        soft_loss: `"auto"` for `SoftTarget(temperature)`, None for no soft term, or
            any Keras loss. The losses of `kd.losses` get logits, others the outputs
            as they are.
        student_inputs: What of `x` the student sees: a key, a list of keys, a
            registered function, or None for all.
        student_from_logits: Whether the student's outputs are logits. None finds out.
        output_weights: Weights of the outputs in the soft term: a dict by name or a
            list in the order of `output_names`.
        unlabelled: The integer label that means "no label"; None switches it off.
        save_teacher: Whether a `.keras` file holds the teacher too. Checkpoints of
            weights never do.
        name: Name of the model.

    Raises:
        TypeError: If student or teacher are not models.
        ValueError: If an argument is out of range or without effect, if outputs or
            classes do not match, if a layer does not exist, or shapes differ at a
            link.

    Example:

    ```python
    distiller = kd.Distiller(student, teacher, temperature=4.0, alpha=0.1, beta=0.9)
    distiller.compile(
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    ).fit(x, y, epochs=2)
    distiller.student.save("student.keras")
    ```

    References:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015
        (arXiv 1503.02531).
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any,
        *,
        temperature: Any = None,
        alpha: float = 0.1,
        beta: float | None = None,
        links: Sequence[Link] = (),
        soft_loss: Any = "auto",
        student_inputs: Any = None,
        student_from_logits: bool | None = None,
        output_weights: Any = None,
        unlabelled: int | None = -1,
        save_teacher: bool = False,
        name: str | None = None,
    ) -> None:
        teacher = as_teacher(teacher)
        super().__init__(
            student,
            alpha=alpha,
            student_inputs=student_inputs,
            student_from_logits=student_from_logits,
            output_weights=output_weights,
            unlabelled=unlabelled,
            name=name,
        )
        _check_apart(student, teacher)
        if save_teacher and not isinstance(teacher, (Model, Absent)):
            raise ValueError(
                "`save_teacher=True` needs a teacher that is one Keras model. "
                f"Received: {teacher!r}"
            )
        self.__dict__["_teacher"] = teacher
        self.save_teacher = save_teacher
        self._add_soft_term(soft_loss, temperature, beta)
        self._add_links(links)

    # -- what is compared -----------------------------------------------------------

    def epoch_began(self, epoch: int, epochs: int) -> None:
        super().epoch_began(epoch, epochs)
        if self._learns_temperature:
            self._temperature.epoch_began(epoch)

    def described(self) -> dict[str, str]:
        return super().described() | {"teachers": self.teacher.fingerprint()}

    def _add_links(self, links: Sequence[Link]) -> None:
        self.links: tuple[Link, ...] = ()
        resolved = []
        taken = set(self._names) | set(RESERVED)
        for link in links:
            if not isinstance(link, Link):
                raise TypeError(
                    f"`links` must hold kd.Link objects. Received: {link!r}"
                )
            if link.name in taken:
                raise ValueError(
                    f"The link name {link.name!r} is taken (by another link, an output "
                    "or a log). Give `name=` to the Link."
                )
            taken.add(link.name)
            if not getattr(link.loss, "needs_teacher", True):
                raise ValueError(
                    f"{type(link.loss).__name__} needs no teacher, so it cannot be the "
                    f"loss of the link {link.name!r}."
                )
            resolved.append(resolved_link(link, self.student, self.teacher))
        self._student_taps = unique(link.student_layer for link in resolved)
        self._teacher_taps = unique(link.teacher_layer for link in resolved)
        if resolved:
            student_specs = symbolic_run(
                lambda x: run_with_taps(self.student, x, self._student_taps, False)[1],
                self._student_spec,
            )
            teacher_specs = self.teacher.tap_specs(self._teacher_taps)
            for link in resolved:
                fit_link(link, student_specs, teacher_specs)
                self.add_term(link.name, link.weight)
        self.links = tuple(resolved)
        adapters = [a for li in resolved for a in (li.adapter, li.teacher_adapter) if a]
        self._adapters = adapters

    # -- the terms ------------------------------------------------------------------

    def compute_terms(
        self, x: Any, y: Any, sample_weight: Any, training: bool
    ) -> tuple[Any, dict[str, Any]]:
        if not training:
            return self.run_student(x, training), {}
        if self.link_names and isinstance(sample_weight, dict):
            raise ValueError(
                "Links need one weight per row: `sample_weight` differs between the "
                f"outputs {list(sample_weight)}."
            )
        outputs, features = self.run_student(x, training, self._student_taps)
        if self._learns_temperature:
            self.log_metric("temperature", self._teacher_temperature)
        names = self.teacher_terms
        if not names:
            return outputs, {}
        adapted = self._adapted(features)

        def compare() -> dict[str, Any]:
            return self._compare(x, y, sample_weight, outputs, adapted)

        def nothing() -> dict[str, Any]:
            logs = [self._agreement_log(m) for m in self._matches]
            keys = [*names, *(log for log in logs if log in self._logs)]
            return {key: ops.zeros((), "float32") for key in keys}

        if self._collective(outputs, adapted):
            terms = compare()  # collectives cannot be inside a cond
        else:
            terms = ops.cond(self.term_active(names[0]), compare, nothing)
        for match in self._matches:
            log = self._agreement_log(match)
            if log in terms:
                count = positions(keras.tree.flatten(outputs)[match.student_index])
                active = ops.cast(self.term_active("soft"), "float32")
                self._logs.update(log, terms.pop(log), count * active)
        return outputs, terms

    def _compare(
        self, x: Any, y: Any, sample_weight: Any, outputs: Any, adapted: Any
    ) -> dict[str, Any]:
        """All terms that need the teacher."""
        known, features = self.teacher(x, self._teacher_taps, self._teacher_temperature)
        features = keras.tree.map_structure(ops.stop_gradient, features)
        if self._options["check_finite"]:
            self._assert_finite((known, features))
        across = self._options["across_replicas"]
        terms: dict[str, Any] = {}
        flat, flat_known = keras.tree.flatten(outputs), keras.tree.flatten(known)
        labels = [
            marked(one, output, self.unlabelled)
            for one, output in zip(by_output(y, flat, self._names), flat, strict=True)
        ]
        soft = []
        for match in self._matches:
            student, teacher = (
                flat[match.student_index],
                flat_known[match.teacher_index],
            )
            if isinstance(self._soft_loss, DistillationLoss):
                student = match.student.logits(student)
                chosen = match.teacher.chosen(teacher)
                terms[self._agreement_log(match)] = agreement(chosen, student)
                teacher, student = match.teacher.against(
                    teacher, student, self._teacher_temperature
                )
            # Only now: a copy of probabilities loses the logits attached to them.
            teacher = ops.stop_gradient(teacher)
            weight = sample_weight
            if isinstance(weight, dict):
                weight = weight[match.name]
            value = apply_loss(
                self._soft_loss,
                teacher,
                student,
                labels[match.student_index],
                weight,
                across,
            )
            soft.append(match.weight * value)
        if soft:
            terms["soft"] = sum(soft)
        for link in self.links:
            teacher = adapt(
                link.teacher_adapter, taps_of(link.teacher_layer, features), True
            )
            terms[link.name] = apply_loss(
                link.loss,
                teacher,
                adapted[link.name],
                labels[0],
                sample_weight,
                across,
            )
        return terms | self._further_terms(x, features, adapted, sample_weight)

    def _adapted(self, features: dict[str, Any]) -> dict[str, Any]:
        """The student's side of each link, and of a subclass's further terms."""
        return {link.name: self._student_side(link, features) for link in self.links}

    def _student_side(self, link: Link, features: dict[str, Any]) -> Any:
        return adapt(link.adapter, taps_of(link.student_layer, features), True)

    def _further_terms(
        self, x: Any, features: dict[str, Any], adapted: dict[str, Any], weight: Any
    ) -> dict[str, Any]:
        """A subclass's own terms that need the teacher's features.

        Their names must be in `link_names`, their taps in `_teacher_taps`.
        """
        return {}

    @property
    def link_names(self) -> tuple[str, ...]:
        return tuple(link.name for link in self.links)

    @property
    def transfer_losses(self) -> list[Any]:
        return [self._soft_loss, *(link.loss for link in self.links)]

    @property
    def compares_rows(self) -> bool:
        return any(getattr(one, "across_batch", False) for one in self.transfer_losses)

    def _collective(self, *compared: Any) -> bool:
        """Whether the terms need all replicas at once, if only to count positions."""
        masked = any(
            getattr(leaf, "_keras_mask", None) is not None
            for leaf in keras.tree.flatten(compared)
        )
        several = current_share() is not None
        return self._options["across_replicas"] or (masked and several)

    @property
    def teacher_terms(self) -> list[str]:
        """Terms that need the teacher."""
        return ["soft"] * bool(self._matches) + list(self.link_names)

    def term_active(self, term: str) -> Any:
        """The teacher runs while any weight that needs it is above 0."""
        names = self.teacher_terms
        if term not in names:
            return None
        weights = ops.stack([self._terms[n].value for n in names])
        return ops.any(weights > 0)

    # -- properties -----------------------------------------------------------------

    @property
    def teacher(self) -> Teacher:
        """The teacher, never a Keras model: its `.model` is one."""
        return self.__dict__["_teacher"]

    def __setattr__(self, name: str, value: Any) -> None:
        # Before Keras's tracker sees it: it would train and save the teacher.
        if name == "teacher":
            self._set_teacher(as_teacher(value))
        else:
            super().__setattr__(name, value)

    def _set_teacher(self, teacher: Teacher) -> None:
        _check_apart(self.student, teacher)
        before, after = (
            [tuple(t.shape)[1:] for t in keras.tree.flatten(known.outputs)]
            for known in (self.teacher, teacher)
        )
        if before != after:
            raise ValueError(
                f"The teacher's outputs have shapes {after}; this distiller was made "
                f"for {before}."
            )
        old = self.teacher
        if isinstance(old, Absent) and old.fingerprint() != teacher.fingerprint():
            raise ValueError(
                "This is not the teacher that the distiller was saved with: its "
                "weights or its architecture differ."
            )
        for tap in self._teacher_taps:
            teacher.resolve(tap)
        specs = [known.tap_specs(self._teacher_taps) for known in (teacher, old)]
        shapes, wanted = (
            {tap: tuple(spec.shape)[1:] for tap, spec in found.items()}
            for found in specs
        )
        if shapes != wanted:
            raise ValueError(
                f"The teacher's features have shapes {shapes}; this distiller was made "
                f"for {wanted}."
            )
        if self._soft_loss is not None:
            self._check_teacher(teacher)
            # Its outputs may be of another kind.
            self._matches = self._match_outputs(teacher)
        self.__dict__["_teacher"] = teacher
        self.train_function = None

    def describe_term(self, name: str) -> dict[str, str]:
        if name == "soft":
            pairs = [f"{match.name} → {match.name}" for match in self._matches]
            shapes = [f"{m.student.shape} → {m.teacher.shape}" for m in self._matches]
            return {
                "loss": self._soft_loss.name,
                "student → teacher": ", ".join(pairs),
                "shapes": ", ".join(shapes),
            }
        for link in self.links:
            if link.name == name:
                adapters = [a for a in (link.adapter, link.teacher_adapter) if a]
                count = sum(adapter.count_params() for adapter in adapters)
                student, teacher = link.shapes or ("", "")
                return {
                    "loss": link.loss.name,
                    "student → teacher": f"{show_layers(link.student_layer)} → "
                    f"{show_layers(link.teacher_layer)}",
                    "shapes": f"{student} → {teacher}",
                    "adapter parameters": f"{count:,}",
                }
        return super().describe_term(name)


def _check_apart(student: keras.Model, teacher: Teacher) -> None:
    own = {id(variable) for variable in student.variables}
    shared = [v.path for v in teacher.variables if id(v) in own]
    if shared:
        raise ValueError(
            "Teacher and student share variables, so training the student would change "
            f"the teacher: {shared[:3]}. Clone one of them."
        )
