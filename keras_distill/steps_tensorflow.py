"""One step of training and of evaluation on TensorFlow."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_distill import distribute
from keras_distill.links import symbolic_run
from keras_distill.weighting import Share, this_share


class EpochCounter(keras.callbacks.Callback):
    """Tells the distiller which epoch it is in."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.model._epoch.assign(epoch)


class Steps:
    """Mixed into the distillers: what of them is TensorFlow's own."""

    def train_step(self: Any, data: Any) -> dict[str, Any]:
        x, y, sample_weight, share = self._unpack(data)
        with this_share(share):
            saved = self._snapshot(share)
            variables = self.trainable_variables
            with self._tape() as tape:
                tape.watch(_values(variables))
                losses = self.weighted_losses(x, y, sample_weight, training=True)
                groups = self._groups(losses)
            gradients = [
                distribute.sum_gradients(tape.gradient(group, _values(variables)))
                for group in groups
            ]
            ok = self._finite(gradients)
            self._log_gradient_shares(tape, losses)
            self._apply(gradients, variables, ok)
            self._restore(saved, ok, share)
            self._logs.update("steps", 1.0, 1.0)
            return self._step_results(share)

    def test_step(self: Any, data: Any) -> dict[str, Any]:
        x, y, sample_weight, share = self._unpack(data)
        with this_share(share):
            self.weighted_losses(x, y, sample_weight, training=False)
            return self._step_results(share)

    def _unpack(self: Any, data: Any) -> tuple[Any, Any, Any, Share]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        share = distribute.share_of(x)
        x, y, sample_weight = distribute.pad_empty((x, y, sample_weight), share)
        return x, y, sample_weight, share

    # -- gradients ------------------------------------------------------------------

    def _tape(self: Any) -> tf.GradientTape:
        """A tape that records what is trained, and never a teacher."""
        several = self._options["gradient_policy"] or self._options["log_gradient_share"]
        return tf.GradientTape(bool(several), watch_accessed_variables=False)

    def _groups(self: Any, losses: dict[str, Any]) -> list[Any]:
        """What is differentiated: the total, or main and transfer for a policy."""
        if not self._options["gradient_policy"]:
            return [self.optimizer.scale_loss(tf.add_n(list(losses.values())))]
        links = self.link_names
        main = [loss for name, loss in losses.items() if name not in links]
        transfer = [loss for name, loss in losses.items() if name in links]
        return [
            self.optimizer.scale_loss(tf.add_n(group) if group else tf.zeros(()))
            for group in (main, transfer)
        ]

    @property
    def link_names(self: Any) -> tuple[str, ...]:
        """Terms that are transfer from links: see `gradient_policy`."""
        return ()

    def _finite(self: Any, gradients: list[list[Any]]) -> Any:
        if not self._options["skip_nonfinite"]:
            return None
        dense = [_dense(g) for group in gradients for g in group if g is not None]
        ok = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in dense])
        self._logs.update("skipped", tf.where(ok, 0.0, 1.0), 1.0)
        return ok

    def _apply(self: Any, groups: list[list[Any]], variables: list[Any], ok: Any) -> None:
        optimizer = self.optimizer
        policy = self._options["gradient_policy"]
        gradients = groups[0]
        if policy or distribute.replicas() > 1:
            # Policies and clipping see gradients without the loss scale.
            scale = optimizer.scale_loss(tf.ones(()))
            groups = [
                [None if g is None else _dense(g) / scale for g in group]
                for group in groups
            ]
            gradients = groups[0]
            if policy:
                gradients = policy(*groups, variables, self._epoch.value)
            gradients = distribute.clip(optimizer, gradients)
            gradients = [None if g is None else g * scale for g in gradients]
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            ok = None  # it skips such batches itself, and lowers its scale
        distribute.apply(optimizer, gradients, variables, ok)

    def _log_gradient_shares(self: Any, tape: tf.GradientTape, losses: Any) -> None:
        every = self._options["log_gradient_share"]
        if not every:
            return
        names = [name for name in losses if name in self._terms]
        values = _values(self.student.trainable_variables)

        def shares() -> Any:
            norms = []
            for name in names:
                gradients = distribute.sum_gradients(tape.gradient(losses[name], values))
                some = [_dense(g) for g in gradients if g is not None]
                norms.append(tf.linalg.global_norm(some) if some else tf.zeros(()))
            return tf.math.divide_no_nan(tf.stack(norms), tf.add_n(norms))

        due = tf.equal(tf.cast(self.optimizer.iterations, tf.int64) % every, 0)
        if distribute.replicas() > 1:
            found = shares()  # collectives cannot be inside a cond
        else:
            found = tf.cond(due, shares, lambda: tf.zeros(len(names)))
        for index, name in enumerate(names):
            weight = tf.cast(due, tf.float32)
            self._logs.update(f"{name}_gradient_share", found[index], weight)

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

    # -- a batch that must not count ------------------------------------------------

    def _snapshot(self: Any, share: Share) -> list[tuple[Any, Any]]:
        """Everything a step changes besides what the optimizer does."""
        if self._options["skip_nonfinite"]:
            own = {id(v) for v in self._own_variables()}
            states = [v for v in self.non_trainable_variables if id(v) not in own]
            states += [v for m in self.metrics if m.name != "skipped" for v in m.variables]
        elif share.replicas > 1:
            states = self._statistics()
        else:
            states = []
        return [(v, tf.identity(v.value)) for v in states]

    def _restore(self: Any, saved: list[tuple[Any, Any]], ok: Any, share: Share) -> None:
        if not saved:
            return
        keep = tf.constant(True) if ok is None else ok
        statistics = {id(v) for v in self._statistics()}
        complete = keep
        if share.replicas > 1:
            empty = distribute.all_reduce(tf.cast(tf.equal(share.rows, 0), tf.float32))
            complete = tf.logical_and(keep, tf.equal(empty, 0))
        for variable, before in saved:
            good = complete if id(variable) in statistics else keep
            variable.assign(tf.where(good, variable.value, before))

    def _statistics(self: Any) -> list[Any]:
        """Moving statistics of normalisation layers."""
        return [
            v
            for layer in self._flatten_layers(include_self=False)
            if isinstance(layer, keras.layers.BatchNormalization)
            for v in layer.non_trainable_variables
        ]

    def _own_variables(self: Any) -> list[Any]:
        return [*self._terms.values(), self._epoch]

    # -- Keras ----------------------------------------------------------------------

    def fit(
        self: Any,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Trains, as `keras.Model.fit`.

        Labels may be missing for all rows (a data set of `x` alone) or for some (see
        `unlabelled`). `class_weight` is applied in the step, so that missing labels
        have weight 1, and soft and link terms are weighted too.

        Returns:
            Keras's History.
        """
        self._set_class_weight(class_weight)
        counter = EpochCounter()
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks.append(counter)
        else:
            callbacks = [counter, *keras.tree.flatten(callbacks or [])]
        return super().fit(
            x=x,
            y=y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            validation_split=validation_split,
            validation_data=validation_data,
            shuffle=shuffle,
            **kwargs,
        )

    def _set_class_weight(self: Any, class_weight: dict[int, float] | None) -> None:
        new = None
        if class_weight is not None:
            if not class_weight or any(
                int(c) != c or c < 0 or not 0 <= w < float("inf")
                for c, w in class_weight.items()
            ):
                raise ValueError(
                    "`class_weight` must map classes (integers from 0) to weights of "
                    f"at least 0. Received: {class_weight}"
                )
            new = tuple(sorted((int(c), float(w)) for c, w in class_weight.items()))
        if new != self._class_weight:
            self._class_weight = new
            self.train_function = None  # the weights are constants of its graph

    def _maybe_symbolic_build(self: Any, iterator: Any = None, data_batch: Any = None) -> None:
        self._symbolic_build(iterator, data_batch)

    def _symbolic_build(self: Any, iterator: Any = None, data_batch: Any = None) -> None:
        """Creates the variables of compiled losses and metrics before any graph."""
        parts = (self._compile_loss, self._compile_metrics)
        if all(part is None or part.built for part in parts):
            return
        spec = distribute.element_spec(iterator) if iterator is not None else data_batch
        x, y, _ = keras.utils.unpack_x_y_sample_weight(
            keras.tree.map_structure(_symbol, spec)
        )
        if all(leaf is None for leaf in keras.tree.flatten(y)):
            return

        def run(x: Any, y: Any) -> Any:
            with this_share(Share(tf.ones(()), tf.ones(()), 1, tf.identity)):
                outputs = self(x, training=False)
                labels, weights = self._read(y, None, training=False)
                self.hard_loss(labels, outputs, weights, weights)
            return outputs

        symbolic_run(run, x, y)

    def _step_results(self: Any, share: Share) -> dict[str, Any]:
        """The logs of what this step computed."""
        results = {"loss": self._loss_tracker.result()}
        if "labelled" in share.logged:
            results |= self._compiled_results()
        shown = [name for name in self._logs.names if name in share.logged]
        return results | self._logs.results(shown)

    def _check_scope(self: Any, student: Any) -> None:
        distribute.check_scope(student)

    def _check_compile(
        self: Any, optimizer: Any, jit_compile: Any, check_finite: bool, across: bool
    ) -> None:
        """Refuses options that do not go together."""
        several = distribute.replicas() > 1
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
        if several and optimizer is not None and optimizer.gradient_accumulation_steps:
            raise ValueError(
                "`gradient_accumulation_steps` is not supported under a strategy. "
                "Use a larger batch."
            )
        if several and jit_compile is True and not tf.config.list_physical_devices("GPU"):
            raise ValueError(
                "`jit_compile=True` is not supported with a strategy on CPU. Leave it "
                "at 'auto'."
            )


def _values(variables: list[Any]) -> list[Any]:
    return [variable.value for variable in variables]


def _dense(gradient: Any) -> Any:
    return tf.convert_to_tensor(gradient)


def _symbol(spec: Any) -> Any:
    if spec is None or not hasattr(spec, "shape") or isinstance(spec, tf.OptionalSpec):
        return None
    dtype = keras.backend.standardize_dtype(spec.dtype)
    return keras.KerasTensor((None, *tuple(spec.shape)[1:]), dtype)
