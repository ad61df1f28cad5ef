"""BaseDistiller: weighted terms, logs and compile, on top of `keras.Model`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distill.compiling import Compiling
from keras_distill.heads import output_names
from keras_distill.identity import architecture
from keras_distill.inputs import plain_inputs, select_inputs
from keras_distill.labelled import Labelled
from keras_distill.links import serialize_function
from keras_distill.logs import Logs
from keras_distill.losses.base import (
    PACKAGE,
    check_positive,
    check_weight,
    number,
    reduce_values,
)
from keras_distill.matching import weights_by_output
from keras_distill.random_states import RandomStates
from keras_distill.specs import input_spec, output_spec
from keras_distill.steps_tensorflow import Steps
from keras_distill.tables import text_table
from keras_distill.taps import call_model, children, run_with_taps
from keras_distill.terms import Counted, TermWeights
from keras_distill.weighting import (
    current_rows,
    current_share,
    full,
    note_log,
    note_losses,
    noted_losses,
    unscaled,
)

RESERVED = ("loss", "hard", "soft", "agreement", "regularization", "skipped")


@keras.saving.register_keras_serializable(package=PACKAGE)
class BaseDistiller(Labelled, Compiling, Steps, RandomStates, keras.Model):
    """What every distiller shares: a `keras.Model` that trains by weighted terms.

    The total is `alpha * compiled loss + Σ weight * term + regularisation losses`. A
    subclass declares its terms in the constructor (`add_term`, `add_log`) and computes
    them in one hook, `compute_terms`; `fit`, `evaluate`, `predict`, callbacks, saving,
    precision and replicas are the same for all.

    Args:
        student: A built Keras model: functional, sequential, subclassed or nested.
        alpha: Weight of the compiled loss; None for a distiller whose terms replace it.
        student_inputs: What of `x` the student sees: a key, a list of keys (in that
            order), a registered function of `x`, or None for all.
        student_from_logits: Whether the student's outputs are logits. None finds out.
        output_weights: Weights of the outputs in the soft term: a dict by name, or a
            list in the order of `output_names`. 1 where not given.
        unlabelled: The integer label that means "no label" under sparse categorical
            losses; under categorical ones a row of zeros means it. None switches it
            off.
        name: Name of the model.

    Raises:
        TypeError: If `student` is not a Keras model.
        ValueError: If `student` was never built, or a weight is negative.

    Example:

    ```python
    @keras.saving.register_keras_serializable(package="example")
    class Confident(kd.BaseDistiller):
        def __init__(self, student, **kwargs):
            super().__init__(student, **kwargs)
            self.add_term("entropy", weight=0.1)

        def compute_terms(self, x, y, sample_weight, training):
            outputs = self.run_student(x, training)
            log_p = keras.ops.log_softmax(outputs)
            entropy = -keras.ops.sum(keras.ops.exp(log_p) * log_p, -1)
            return outputs, {"entropy": self.mean(entropy, sample_weight)}
    ```
    """

    def __init__(
        self,
        student: keras.Model,
        *,
        alpha: float | None = 1.0,
        student_inputs: Any = None,
        student_from_logits: bool | None = None,
        output_weights: Any = None,
        unlabelled: int | None = -1,
        name: str | None = None,
    ) -> None:
        if not isinstance(student, keras.Model):
            raise TypeError(f"`student` must be a keras.Model. Received: {student!r}")
        student_spec = input_spec(student)
        # The student casts its inputs, or not: as it does without a distiller.
        super().__init__(name=name, autocast=False)
        self._check_scope(student)
        self._temperature: Any = None
        self.student = student
        self.student_inputs = student_inputs
        self.student_from_logits = student_from_logits
        self.unlabelled = unlabelled
        self._terms = TermWeights(self._weight_variable)
        self._logs = Logs()
        self._logs.add("hard_loss")
        self._logs.add("labelled", shown=False)  # counts rows with labels
        self._logs.add("dropped", shown=False)  # counts rows of dropped batches
        self._logs.add("steps", shown=False)  # counts the epoch's steps
        self._epoch = self._scalar("epoch", 0.0)
        self._one_weight_given = False  # for all outputs: see `fit`
        self._class_weight: tuple[tuple[int, float], ...] | None = None
        self._student_spec = student_spec
        self._symbolic_outputs = output_spec(student, student_spec)
        self._names = output_names(student, self._symbolic_outputs)
        self.output_weights = weights_by_output(output_weights, self._names)
        if alpha is not None:
            check_weight("alpha", alpha)
            self._terms.add("hard", alpha)
        self.built = True

    # -- terms and logs -------------------------------------------------------------

    def add_term(self, name: str, weight: float = 1.0) -> None:
        """Declares a term: its weight becomes a variable, its log `<name>_loss`."""
        self._terms.add(name, weight)
        self._logs.add(f"{name}_loss")

    def add_log(self, name: str) -> None:
        """Declares something that is only watched: see `log_metric`."""
        self._logs.add(name)

    def compute_terms(
        self, x: Any, y: Any, sample_weight: Any, training: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The one hook: runs the networks, and computes the terms.

        Args:
            x: Inputs, as the data give them.
            y: Labels, or None.
            sample_weight: None, or the weights of the rows (a dict by output name
                where the outputs differ). They hold sample and class weights and the
                scale of this replica: pass them to `Loss.__call__` or `self.mean`, and
                scale nothing else.
            training: False in `evaluate`, where whatever needs a teacher is left out.

        Returns:
            The student's outputs, and the unweighted scalar terms by name; `Counted`
            where the log of a term counts only rows with labels.
        """
        return self.run_student(x, training), {}

    def run_student(self, x: Any, training: bool, taps: Any = None) -> Any:
        """Runs the student once.

        Args:
            x: Inputs, as the data give them.
            training: Passed on to the student.
            taps: Paths of layers to read, or None.

        Returns:
            The outputs; with `taps` a pair of outputs and features by path.
        """
        x = select_inputs(plain_inputs(x), self.student_inputs)
        if taps is None:
            found = call_model(self.student, x, training)
        else:
            found = run_with_taps(self.student, x, taps, training)
        note_losses(self.student)
        return found

    def mean(self, values: Any, sample_weight: Any = None) -> Any:
        """Weighted mean over rows (positions), scaled as every term must be."""
        return reduce_values(values, sample_weight)

    def log_metric(self, name: str, values: Any, sample_weight: Any = None) -> None:
        """Records values per row (or a scalar per batch) in a declared log."""
        values = ops.convert_to_tensor(values)
        share = current_share()
        if sample_weight is not None:
            weight = full(sample_weight, values)
            if share is not None:
                weight = ops.divide_no_nan(weight, share.factor)
        else:
            weight = ops.ones_like(values) if len(values.shape) else current_rows()
            if share is not None:
                weight = weight * ops.cast(share.rows > 0, weight.dtype)
        self._logs.update(name, values, weight)

    def log_term(self, name: str, value: Any) -> None:
        """Records a term in a declared log without adding it to the loss."""
        self._logs.update(name, unscaled(value), current_rows())

    def _weight_variable(self, name: str, value: float) -> Any:
        return self._scalar(f"{name}_weight", value)

    def _scalar(self, name: str, value: float) -> Any:
        return self.add_weight(
            name=name,
            shape=(),
            dtype="float32",
            initializer=keras.initializers.Constant(value),
            trainable=False,
            autocast=False,
        )

    @property
    def term_weights(self) -> TermWeights:
        """Weights of the terms: `distiller.term_weights["soft"] = 0.5`."""
        return self._terms

    @property
    def alpha(self) -> Any:
        """Weight of the compiled loss, a variable."""
        if "hard" not in self._terms:
            raise AttributeError(f"{type(self).__name__} has no `alpha`.")
        return self._terms["hard"]

    @alpha.setter
    def alpha(self, value: Any) -> None:
        check_weight("alpha", value)
        self._terms["hard"] = value

    @property
    def temperature(self) -> Any:
        """T of what is softened, a variable or the layer that learns it."""
        if self._temperature is None:
            raise AttributeError(f"This {type(self).__name__} has no temperature.")
        return self._temperature

    @temperature.setter
    def temperature(self, value: Any) -> None:
        check_positive("temperature", value)
        self._check_temperature(number(value))
        self.temperature.assign(number(value))

    def _check_temperature(self, value: float) -> None:
        """Raises ValueError for a temperature that cannot be used."""

    @property
    def output_names(self) -> list[str]:
        """The student's names: Keras resolves dicts of losses with them."""
        return self.student.output_names

    # -- the total ------------------------------------------------------------------

    def weighted_losses(
        self, x: Any, y: Any, sample_weight: Any, training: bool
    ) -> dict[str, Any]:
        """Everything that is differentiated, weighted and scaled, by name.

        Also records all logs. In evaluation the compiled loss counts with weight 1.
        """
        labels, weights = self._read(y, sample_weight, training)
        scaled = self._scaled(weights)
        outputs, terms = self.compute_terms(x, y, self._one_weight(scaled), training)
        losses = {}
        hard = self.hard_loss(labels, outputs, scaled, weights)
        if hard is not None and "hard" in self._terms:
            losses["hard"] = hard * self._terms["hard"] if training else hard
        for term, value in terms.items():
            losses[term] = self._weighted(term, value)
        # In evaluation nothing but the student runs: an adapter's would be stale.
        others = [layer for layer in children(self) if layer is not self.student]
        extra = self.regularization(others if training else ())
        if extra is not None:
            losses["regularization"] = extra
        if losses:
            self._log_total(list(losses.values()))
        elif training or self._compile_metrics is None:
            raise ValueError(
                "There is no loss to compute: no labels, or no `loss` in compile(), "
                "and no other term."
            )
        return losses

    def _scaled(self, weights: list[Any]) -> list[Any]:
        """The weights of the outputs with this replica's scale."""
        share = current_share()
        if share is None:
            return weights
        ones = ops.ones((current_rows(padded=True),))
        scaled = {  # one tensor for outputs that have one weight: see `_one_weight`
            id(w): (ones if w is None else ops.cast(w, "float32")) * share.factor
            for w in weights
        }
        return [scaled[id(w)] for w in weights]

    def _weighted(self, term: str, value: Any) -> Any:
        """A term as it is differentiated; also records it."""
        value, labelled = value if isinstance(value, Counted) else (value, None)
        value = ops.cast(value, "float32")
        rows = current_rows() if labelled is None else labelled
        active = self.term_active(term)
        if active is not None:
            rows = rows * ops.cast(active, "float32")
        self._logs.update(f"{term}_loss", unscaled(value, labelled), rows)
        return value * self.term_weight(term)

    def _log_total(self, losses: list[Any]) -> None:
        total = ops.sum(ops.stack(losses))
        note_log("loss")
        self._loss_tracker.update_state(
            unscaled(ops.stop_gradient(total)), current_rows()
        )

    def term_active(self, term: str) -> Any:
        """Whether a term was computed in this step: None (always) or a boolean."""
        return None

    def term_weight(self, term: str) -> Any:
        """The weight of a term in this step."""
        return self._terms[term]

    def regularization(self, others: Sequence[keras.Layer] = ()) -> Any:
        """Regularisation losses of the student's pass, this replica's part.

        Args:
            others: Further layers whose losses count, such as adapters.
        """
        losses = list(noted_losses(self.student))
        for layer in others:
            losses += layer.losses
        if not losses:
            return None
        total = ops.sum(ops.stack([ops.cast(loss, "float32") for loss in losses]))
        share = current_share()
        return total if share is None else total / share.replicas

    def epoch_began(self, epoch: int, epochs: int) -> None:
        """Called by `fit` before epoch `epoch` of `epochs`, before the callbacks."""

    def epoch_ended(self, logs: dict[str, Any]) -> None:
        """Called by `fit` after each epoch, with its logs, before the callbacks."""

    def described(self) -> dict[str, str]:
        """What the workers of a cluster must have in common, beside their variables."""
        return {"teachers": "", "students or distillers": architecture(self)}

    def describe_term(self, name: str) -> dict[str, str]:
        """What `summary` says of a term, by column; a subclass knows more."""
        if name != "hard":
            return {}
        loss = getattr(self, "_compiled_loss", None)
        if isinstance(loss, keras.losses.Loss):
            return {"loss": loss.name}
        return {"loss": loss if isinstance(loss, str) else "as compiled"}

    # -- Keras ----------------------------------------------------------------------

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Prints the layers, as `keras.Model.summary`, and a table of the terms."""
        super().summary(*args, **kwargs)
        columns = ["loss", "student → teacher", "shapes", "adapter parameters"]
        rows = []
        for name, weight in self._terms.items():
            told = self.describe_term(name)
            cells = [told.get(column, "") for column in columns]
            rows.append([name, f"{number(weight):g}", *cells])
        show = kwargs.get("print_fn") or print
        show(text_table(["term", "weight", *columns], rows))

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.run_student(x, bool(training))

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        logs = getattr(self, "_logs", None)
        return super().metrics + (logs.metrics if logs is not None else [])

    @property
    def log_names(self) -> list[str]:
        """What training may log, beside `loss` and the compiled metrics."""
        return self._logs.names

    def get_metrics_result(self) -> dict[str, Any]:
        """The logs of what ran since the last reset; the rest is left out."""
        results = {}
        if number(self._loss_tracker.count) > 0:
            results["loss"] = self._loss_tracker.result()
        if self._logs.ran("labelled"):
            results |= self._compiled_results()
        return results | self._logs.results(filter(self._logs.ran, self._logs.names))

    def _get_metrics_result_or_logs(self, logs: Any) -> dict[str, Any]:
        # Keras 3.12 expects plain numbers here.
        results = self.get_metrics_result()
        return {k: number(v) if _is_scalar(v) else v for k, v in results.items()}

    def _compiled_results(self) -> dict[str, Any]:
        results: dict[str, Any] = {}
        if self._compile_loss is not None:
            results |= {m.name: m.result() for m in self._compile_loss.metrics}
        if self._compile_metrics is not None:
            results |= self._compile_metrics.result()
        return results

    def get_config(self) -> dict[str, Any]:
        config = {
            "student": keras.saving.serialize_keras_object(self.student),
            "student_inputs": serialize_function("student_inputs", self.student_inputs),
            "student_from_logits": self.student_from_logits,
            "output_weights": self.output_weights,
            "unlabelled": self.unlabelled,
            "name": self.name,
        }
        if "hard" in self._terms:
            config["alpha"] = number(self.alpha)
        return config

    def export(self, filepath: str, *args: Any, **kwargs: Any) -> None:
        """Exports the student, as `keras.Model.export`."""
        self.student.export(filepath, *args, **kwargs)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> BaseDistiller:
        return cls(
            **{
                key: keras.saving.deserialize_keras_object(
                    value, custom_objects=custom_objects
                )
                for key, value in config.items()
            }
        )


def _is_scalar(value: Any) -> bool:
    return getattr(value, "shape", None) == ()
