"""One step of training and of evaluation on TensorFlow."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import tensorflow as tf

from keras_distill import distribute
from keras_distill.data import reads_epoch, set_epoch
from keras_distill.heads import two_rows
from keras_distill.links import children, reading, run_with_taps, symbolic_run
from keras_distill.losses.base import number
from keras_distill.weighting import Share, this_share


class EpochCounter(keras.callbacks.Callback):
    """Tells the distiller which epoch it is in, and the user what it dropped."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.model._epoch.assign(epoch)
        set_epoch(epoch)
        self.model.epoch_began(epoch, self.params["epochs"])

    def on_test_begin(self, logs: Any = None) -> None:
        self._warn()  # validation begins with new logs

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.epoch_ended(logs or {})
        self._warn()

    def _warn(self) -> None:
        rows = self.model._dropped_rows()
        if rows:
            warnings.warn(
                f"{rows} rows of epoch {int(self.model._epoch.numpy())} were dropped: "
                "their batch left a replica without rows, which synchronized "
                "BatchNormalization cannot train on. Choose a batch size whose last "
                "batch has a row for every replica.",
                stacklevel=2,
            )


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
            self._log_gradient_shares(tape, losses)
            ok, statistics_ok = self._verdict(gradients, share)
            self._apply(gradients, variables, ok)
            _restore(saved, ok, self._statistics(), statistics_ok)
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
        several = (
            self._options["gradient_policy"] or self._options["log_gradient_share"]
        )
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

    @property
    def compares_rows(self: Any) -> bool:
        """Whether any loss compares the rows of a batch with each other."""
        return False

    def _apply(
        self: Any,
        groups: list[list[Any]],
        variables: list[Any],
        ok: Any,
        optimizer: Any = None,
    ) -> None:
        optimizer = optimizer or self.optimizer
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
                gradients = self._combined(policy, *groups, variables)
            gradients = distribute.clip(optimizer, gradients)
            gradients = [None if g is None else g * scale for g in gradients]
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            ok = None  # it skips such batches itself, and lowers its scale
        distribute.apply(optimizer, gradients, variables, ok)

    def _combined(
        self: Any,
        policy: Any,
        main: list[Any],
        transfer: list[Any],
        variables: list[Any],
    ) -> list[Any]:
        """The student's gradients by the policy, those of adapters added.

        The main task does not depend on an adapter: a policy that compares with it
        would hold the adapter where it is.
        """
        own = {id(v) for v in self.student.trainable_variables}
        mine = [i for i, v in enumerate(variables) if id(v) in own]
        combined = [
            t if m is None else m if t is None else m + t
            for m, t in zip(main, transfer, strict=True)
        ]
        chosen = policy(
            [main[i] for i in mine],
            [transfer[i] for i in mine],
            [variables[i] for i in mine],
            self._epoch.value,
        )
        for i, gradient in zip(mine, chosen, strict=True):
            combined[i] = gradient
        return combined

    def _log_gradient_shares(self: Any, tape: tf.GradientTape, losses: Any) -> None:
        every = self._options["log_gradient_share"]
        if not every:
            return
        names = [name for name in losses if name in self._terms]
        values = _values(self.student.trainable_variables)

        def shares() -> Any:
            norms = []
            for name in names:
                gradients = distribute.sum_gradients(
                    tape.gradient(losses[name], values)
                )
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

    def _reached_by(self: Any, paths: list[str]) -> set[int]:
        """Ids of the student's variables that the features at some layers depend on.

        Found by differentiating the features of two rows, which works for any model:
        trainable variables by their own gradient, others (statistics, states of random
        generators) by that of their layer's outputs.
        """
        layers = list(self.student._flatten_layers(include_self=False))
        trainable = self.student.trainable_variables
        x = two_rows(self._student_spec)
        with tf.GradientTape() as tape, reading(layers) as found:
            tape.watch([t for t in keras.tree.flatten(x) if t.dtype.is_floating])
            features = run_with_taps(self.student, x, paths, False)[1]
            outputs = [
                [
                    tensor
                    for tensor in keras.tree.flatten(found[id(layer)])
                    if tf.is_tensor(tensor) and tensor.dtype.is_floating
                ]
                for layer in layers
            ]
        by_variable, by_layer = tape.gradient(
            keras.tree.flatten(features),
            ([distribute.first(v.value) for v in trainable], outputs),
        )
        reached = {
            id(v)
            for v, gradient in zip(trainable, by_variable, strict=True)
            if gradient is not None
        }
        for layer, gradients in zip(layers, by_layer, strict=True):
            if any(gradient is not None for gradient in gradients):
                inner = {id(v) for child in children(layer) for v in child.variables}
                reached |= {id(v) for v in layer.non_trainable_variables} - inner
        return reached

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
        values = _values(self.student.trainable_variables)
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
        some = [_dense(g) for g in gradients if g is not None]
        norm = float(tf.linalg.global_norm(some)) if some else 0.0
        if name not in self._terms:
            return float(loss), 1.0, norm
        log = f"{name}_loss"
        value = float(self._logs.results([log])[log]) if self._logs.ran(log) else None
        return value, number(self._terms[name]), norm

    # -- a batch that must not count ------------------------------------------------

    def _verdict(
        self: Any, gradients: list[list[Any]], share: Share, log: bool = True
    ) -> Any:
        """Whether the batch counts, and whether its statistics do; None for surely."""
        ok = None
        if self._options["skip_nonfinite"]:
            dense = [_dense(g) for group in gradients for g in group if g is not None]
            ok = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in dense])
            if log:
                self._logs.update("skipped", tf.where(ok, 0.0, 1.0), 1.0)
        if share.replicas == 1:
            return ok, ok
        empty = distribute.all_reduce(tf.cast(tf.equal(share.rows, 0), tf.float32))
        full = tf.equal(empty, 0)
        if self._drops_ragged(share):
            if log:
                self._logs.update("dropped", 1.0, tf.where(full, 0.0, share.rows))
            ok = full if ok is None else tf.logical_and(ok, full)
        return ok, (full if ok is None else tf.logical_and(ok, full))

    def _drops_ragged(self: Any, share: Share) -> bool:
        """With synchronized statistics a padding row would reach every replica."""
        return share.replicas > 1 and self._synchronizes()

    def _synchronizes(self: Any) -> bool:
        return any(layer.synchronized for layer in self._normalizations())

    def _regularizes_activity(self: Any) -> bool:
        layers = self._flatten_layers(include_self=False)
        return any(layer.activity_regularizer is not None for layer in layers)

    def _dropped_rows(self: Any) -> int:
        return int(self._logs.count("dropped").numpy())

    def _snapshot(self: Any, share: Share) -> list[tuple[Any, Any]]:
        """What a step changes besides what the optimizer does."""
        if self._options["skip_nonfinite"] or self._drops_ragged(share):
            own = {id(v) for v in (*self._terms.values(), self._epoch)}
            states = [v for v in self.non_trainable_variables if id(v) not in own]
            states += [
                variable
                for metric in self.metrics
                if metric.name not in ("skipped", "dropped")
                for variable in metric.variables
            ]
        else:
            states = self._statistics() if share.replicas > 1 else []
        return [(v, tf.identity(v.value)) for v in states]

    def _normalizations(self: Any) -> list[Any]:
        return [
            layer
            for layer in self._flatten_layers(include_self=False)
            if isinstance(layer, keras.layers.BatchNormalization)
        ]

    def _statistics(self: Any) -> list[Any]:
        """Moving statistics, which a padding row would spoil."""
        layers = self._normalizations()
        return [v for layer in layers for v in layer.non_trainable_variables]

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
        if kwargs.get("steps_per_epoch") is not None and reads_epoch(x):
            raise ValueError(
                "`steps_per_epoch` cannot go with data that depend on the epoch: Keras "
                "would begin an epoch with rows of the one before. Use `.take(n)` on "
                "the data set instead."
            )
        distribute.check_batch_size(batch_size, self.distribute_strategy)
        self._set_class_weight(class_weight)
        self._note_one_weight(kwargs.get("sample_weight"))
        x = self._shared_data(x)
        validation_data = self._shared_data(validation_data)
        distribute.begin_together(self.distribute_strategy, self.variables)
        counter = EpochCounter()
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks.append(counter)
        else:
            callbacks = _in_order(keras.tree.flatten(callbacks or []))
            callbacks = [counter, *callbacks]
        self._initial_epoch = None  # a callback that resumed leaves its epoch there
        return super().fit(  # type: ignore[misc]
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

    def evaluate(
        self: Any,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Evaluates the student, as `keras.Model.evaluate`."""
        distribute.check_batch_size(batch_size, self.distribute_strategy)
        return super().evaluate(  # type: ignore[misc]
            self._shared_data(x), y, batch_size, *args, **kwargs
        )

    def predict(
        self: Any, x: Any, batch_size: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Predicts with the student, as `keras.Model.predict`."""
        distribute.check_batch_size(batch_size, self.distribute_strategy)
        return super().predict(  # type: ignore[misc]
            self._shared_data(x), batch_size, *args, **kwargs
        )

    def _shared_data(self: Any, x: Any) -> Any:
        return distribute.sharded_by_rows(x, self.distribute_strategy)

    def _note_one_weight(self: Any, sample_weight: Any) -> None:
        """Keras repeats one array of weights for every output: remembers it was one."""
        one = sample_weight is not None and not keras.tree.is_nested(sample_weight)
        if one != self._one_weight_given:
            self._one_weight_given = one
            self.train_function = None

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

    def _make_function(self: Any, step_function: Any) -> Any:
        """Several steps per execution also under a strategy.

        There Keras's own loop inside the graph fails; a loop over the one-step
        function does the same.
        """
        function = super()._make_function(step_function)  # type: ignore[misc]
        steps = self.steps_per_execution
        if steps == 1 or self.distribute_strategy.num_replicas_in_sync == 1:
            return function

        def several(iterator: Any) -> Any:
            outputs = None
            self.steps_per_execution = 1  # read where the function is traced
            try:
                for _ in range(steps):
                    outputs = function(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                if outputs is None:
                    raise
            finally:
                self.steps_per_execution = steps
            return outputs

        return several

    def _maybe_symbolic_build(
        self: Any, iterator: Any = None, data_batch: Any = None
    ) -> None:
        self._symbolic_build(iterator, data_batch)

    def _symbolic_build(
        self: Any, iterator: Any = None, data_batch: Any = None
    ) -> None:
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
            with this_share(distribute.alone()):
                outputs = self(x, training=False)
                labels, weights = self._read(y, None, training=False)
                self.hard_loss(labels, outputs, weights, weights)
            return outputs

        with self.distribute_strategy.scope():
            symbolic_run(run, x, y)

    def _step_results(self: Any, share: Share) -> dict[str, Any]:
        """The logs of what this step computed."""
        results = {}
        if "loss" in share.logged:
            results["loss"] = self._loss_tracker.result()
        if "labelled" in share.logged:
            results |= self._compiled_results()
        shown = [name for name in self._logs.names if name in share.logged]
        return distribute.as_logs(results | self._logs.results(shown))

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


def _restore(saved: Any, ok: Any, statistics: list[Any], statistics_ok: Any) -> None:
    """Puts back what a batch that does not count has changed."""
    spoiled = {id(variable) for variable in statistics}
    for variable, before in saved:
        good = statistics_ok if id(variable) in spoiled else ok
        variable.assign(tf.where(good, variable.value, before))


def _in_order(callbacks: list[Any]) -> list[Any]:
    """Callbacks with those last that save the others' state."""
    savers = [c for c in callbacks if hasattr(c, "with_companions")]
    others = [c for c in callbacks if c not in savers]
    for saver in savers:
        saver.with_companions(others)
    return others + savers


def _values(variables: list[Any]) -> list[Any]:
    return [variable.value for variable in variables]


def _dense(gradient: Any) -> Any:
    return tf.convert_to_tensor(gradient)


def _symbol(spec: Any) -> Any:
    if spec is None or not hasattr(spec, "shape") or isinstance(spec, tf.OptionalSpec):
        return None
    dtype = keras.backend.standardize_dtype(spec.dtype)
    return keras.KerasTensor((None, *tuple(spec.shape)[1:]), dtype)
