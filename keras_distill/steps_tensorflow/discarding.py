"""A batch that must not count leaves everything as it was."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_distill.distribute.replicas import all_reduce
from keras_distill.steps_tensorflow.gradients import Verdict, dense
from keras_distill.weighting import Share


class Discarding:
    """Mixed into the steps: batches that are not finite, replicas without rows."""

    def _verdict(
        self: Any, gradients: list[list[Any]], share: Share, log: bool = True
    ) -> Verdict:
        """Whether the batch counts."""
        finite = whole = None
        if self._options["skip_nonfinite"]:
            found = [dense(g) for group in gradients for g in group if g is not None]
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in found])
            if log:
                self._logs.update("skipped", tf.where(finite, 0.0, 1.0), 1.0)
        if share.replicas == 1:
            return Verdict(finite, None, finite)
        empty = all_reduce(tf.cast(tf.equal(share.rows, 0), tf.float32))
        full = tf.equal(empty, 0)
        if self._drops_ragged(share):
            if log:
                self._logs.update("dropped", 1.0, tf.where(full, 0.0, share.rows))
            whole = full
        return Verdict(_both(finite, whole), whole, _both(finite, full))

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


def _both(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    return tf.logical_and(one, other)


def restore(saved: Any, verdict: Verdict, statistics: list[Any]) -> None:
    """Puts back what a batch that does not count has changed."""
    spoiled = {id(variable) for variable in statistics}
    for variable, before in saved:
        good = verdict.statistics if id(variable) in spoiled else verdict.weights
        variable.assign(tf.where(good, variable.value, before))
