"""`fit`, `evaluate` and `predict`: what Keras's loops need to be told."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import tensorflow as tf

from keras_distill.data import reads_epoch, set_epoch
from keras_distill.distribute.agreement import begin_together
from keras_distill.distribute.checks import check_batch_size
from keras_distill.distribute.replicas import alone
from keras_distill.distribute.workers import is_chief, sharded_by_rows, written_by_chief
from keras_distill.specs import symbolic_run
from keras_distill.weighting import this_share


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


class Running:
    """Mixed into the steps: Keras's entry points, for any labels and any strategy."""

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
        check_batch_size(batch_size, x, self.distribute_strategy)
        self._set_class_weight(class_weight)
        self._note_one_weight(kwargs.get("sample_weight"))
        x = self._shared_data(x)
        validation_data = self._shared_data(validation_data)
        begin_together(self.distribute_strategy, self.variables, self.described)
        counter = EpochCounter()
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = callbacks.callbacks
        callbacks = [counter, *_in_order(keras.tree.flatten(callbacks or []))]
        self._initial_epoch = None  # a callback that resumed leaves its epoch there
        if not is_chief(self.distribute_strategy):
            verbose = 0
        with written_by_chief(self.distribute_strategy, callbacks):
            return super().fit(  # type: ignore[misc]
                x=x,
                y=y,
                batch_size=batch_size,
                epochs=epochs,
                verbose=verbose,
                callbacks=callbacks,
                validation_split=validation_split,
                validation_data=validation_data,
                # The default means arrays; of a data set Keras would warn of it.
                shuffle=shuffle and not isinstance(x, tf.data.Dataset),
                **kwargs,
            )

    def train_on_batch(
        self: Any,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        class_weight: dict[int, float] | None = None,
        return_dict: bool = False,
    ) -> Any:
        """Trains on one batch, as `keras.Model.train_on_batch`."""
        self._set_class_weight(class_weight)
        self._note_one_weight(sample_weight)
        return super().train_on_batch(  # type: ignore[misc]
            x, y, sample_weight, return_dict=return_dict
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
        check_batch_size(batch_size, x, self.distribute_strategy)
        return super().evaluate(  # type: ignore[misc]
            self._shared_data(x), y, batch_size, *args, **kwargs
        )

    def predict(
        self: Any, x: Any, batch_size: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Predicts with the student, as `keras.Model.predict`."""
        check_batch_size(batch_size, x, self.distribute_strategy)
        return super().predict(  # type: ignore[misc]
            self._shared_data(x), batch_size, *args, **kwargs
        )

    def _shared_data(self: Any, x: Any) -> Any:
        return sharded_by_rows(x, self.distribute_strategy)

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
        spec = _element_spec(iterator) if iterator is not None else data_batch
        x, y, _ = keras.utils.unpack_x_y_sample_weight(
            keras.tree.map_structure(_symbol, spec)
        )
        if all(leaf is None for leaf in keras.tree.flatten(y)):
            return

        def run(x: Any, y: Any) -> Any:
            with this_share(alone()):
                outputs = self(x, training=False)
                labels, weights = self._read(y, None, training=False)
                self.hard_loss(labels, outputs, weights, weights)
            return outputs

        with self.distribute_strategy.scope():
            symbolic_run(run, x, y)


def _in_order(callbacks: list[Any]) -> list[Any]:
    """Callbacks with those last that save the others' state."""
    savers = [c for c in callbacks if hasattr(c, "with_companions")]
    others = [c for c in callbacks if c not in savers]
    for saver in savers:
        saver.with_companions(others)
    return others + savers


def _element_spec(iterator: Any) -> Any:
    """The structure of one batch on one replica, without reading any."""

    def local(spec: Any) -> Any:
        values = getattr(spec, "_value_specs", None)
        return values[0] if values else spec

    return tf.nest.map_structure(local, iterator._distributed_dataset.element_spec)


def _symbol(spec: Any) -> Any:
    if spec is None or not hasattr(spec, "shape") or isinstance(spec, tf.OptionalSpec):
        return None
    dtype = keras.backend.standardize_dtype(spec.dtype)
    return keras.KerasTensor((None, *tuple(spec.shape)[1:]), dtype)
