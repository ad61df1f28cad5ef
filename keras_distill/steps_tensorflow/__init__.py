"""One step of training and of evaluation on TensorFlow."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_distill.distribute.checks import check_scope
from keras_distill.distribute.replicas import pad_empty, replica_count, share_of
from keras_distill.distribute.updates import sum_gradients
from keras_distill.distribute.workers import as_logs
from keras_distill.losses.base import number
from keras_distill.steps_tensorflow.discarding import Discarding, restore
from keras_distill.steps_tensorflow.gradients import Gradients, dense, values_of
from keras_distill.steps_tensorflow.running import Running
from keras_distill.weighting import Share, this_share


class Steps(Gradients, Discarding, Running):
    """Mixed into the distillers: what of them is TensorFlow's own."""

    def train_step(self: Any, data: Any) -> dict[str, Any]:
        x, y, sample_weight, share = self._unpack(data)
        with this_share(share):
            saved = self._snapshot(share)
            variables = self.trainable_variables
            with self._tape() as tape:
                tape.watch(values_of(variables))
                losses = self.weighted_losses(x, y, sample_weight, training=True)
                groups = self._groups(losses)
            gradients = [
                sum_gradients(tape.gradient(group, values_of(variables)))
                for group in groups
            ]
            self._log_gradient_shares(tape, losses)
            verdict = self._verdict(gradients, share)
            self._apply(gradients, variables, verdict)
            restore(saved, verdict, self._statistics())
            self._logs.update("steps", 1.0, 1.0)
            return self._step_results(share)

    def test_step(self: Any, data: Any) -> dict[str, Any]:
        x, y, sample_weight, share = self._unpack(data)
        with this_share(share):
            self.weighted_losses(x, y, sample_weight, training=False)
            return self._step_results(share)

    def _unpack(self: Any, data: Any) -> tuple[Any, Any, Any, Share]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        share = share_of(x)
        x, y, sample_weight = pad_empty((x, y, sample_weight), share)
        return x, y, sample_weight, share

    def _assert_finite(self: Any, known: Any) -> None:
        """Stops at NaN or infinity in what the teacher says."""
        finite = tf.reduce_all(
            [
                tf.reduce_all(tf.math.is_finite(tensor))
                for tensor in keras.tree.flatten(known)
                if tensor.dtype.is_floating
            ]
        )
        step = tf.cast(self._logs.count("steps"), tf.int64)
        message = "The teacher's outputs hold NaN or infinity in batch"
        tf.debugging.Assert(finite, [message, step])

    def terms_of_batch(
        self: Any, batch: Any
    ) -> dict[str, tuple[float | None, float, float]]:
        """Value, weight and norm of the weighted gradient of every term on one batch.

        As in a training step, but nothing is changed.
        """
        data = keras.tree.map_structure(
            lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf), batch
        )
        self._symbolic_build(data_batch=data)
        x, y, sample_weight, share = self._unpack(data)
        values = values_of(self.student.trainable_variables)
        states = [*self.non_trainable_variables]
        states += [v for metric in self.metrics for v in metric.variables]
        saved = [(v, tf.identity(v.value)) for v in states]
        try:
            self.reset_metrics()
            with (
                this_share(share),
                tf.GradientTape(True, watch_accessed_variables=False) as tape,
            ):
                tape.watch(values)
                losses = self.weighted_losses(x, y, sample_weight, training=True)
            return {
                name: self._term_of_batch(name, loss, tape.gradient(loss, values))
                for name, loss in losses.items()
            }
        finally:
            for variable, before in saved:
                variable.assign(before)

    def _term_of_batch(
        self: Any, name: str, loss: Any, gradients: list[Any]
    ) -> tuple[float | None, float, float]:
        some = [dense(g) for g in gradients if g is not None]
        norm = float(tf.linalg.global_norm(some)) if some else 0.0
        if name not in self._terms:
            return float(loss), 1.0, norm
        log = f"{name}_loss"
        value = float(self._logs.results([log])[log]) if self._logs.ran(log) else None
        return value, number(self.term_weight(name)), norm

    def _step_results(self: Any, share: Share) -> dict[str, Any]:
        """The logs of what this step computed."""
        results = {}
        if "loss" in share.logged:
            results["loss"] = self._loss_tracker.result()
        if "labelled" in share.logged:
            results |= self._compiled_results()
        shown = [name for name in self._logs.names if name in share.logged]
        return as_logs(results | self._logs.results(shown))

    def _check_scope(self: Any, student: Any) -> None:
        check_scope(student)

    def _check_compile(
        self: Any,
        optimizer: Any,
        loss: Any,
        jit_compile: Any,
        check_finite: bool,
        across: bool,
    ) -> None:
        """Refuses options that do not go together."""
        several = replica_count() > 1
        for one in [*keras.tree.flatten(loss), *self.transfer_losses]:
            reduction = getattr(one, "reduction", None)
            if several and reduction not in (None, "mean", "sum_over_batch_size"):
                raise ValueError(
                    f"reduction={reduction!r} is not supported with several replicas: "
                    "losses are taken as means over the global batch. Received it in "
                    f"{one!r}."
                )
        if check_finite and jit_compile is True:
            raise ValueError(
                "`check_finite=True` does not work with `jit_compile=True`: XLA has no "
                "assertions. Use `skip_nonfinite=True`, or switch one of them off."
            )
        if across and not several:
            raise ValueError(
                "`across_replicas=True` has no effect on one replica: make student and "
                "distiller in the scope of a strategy with several."
            )
        if across and not self.compares_rows:
            raise ValueError(
                "`across_replicas=True` has no effect: no loss of this distiller "
                "compares rows with each other."
            )
        if several and optimizer is not None and optimizer.gradient_accumulation_steps:
            raise ValueError(
                "`gradient_accumulation_steps` is not supported under a strategy. "
                "Use a larger batch."
            )
        if several and self._regularizes_activity() and self._synchronizes():
            raise ValueError(
                "Activity regularizers do not go with BatchNormalization("
                "synchronized=True) on replicas: Keras computes another value there "
                "than on one device. Remove one of them."
            )
        if (
            several
            and jit_compile is True
            and not tf.config.list_physical_devices("GPU")
        ):
            raise ValueError(
                "`jit_compile=True` is not supported with a strategy on CPU. Leave it "
                "at 'auto'."
            )
