"""Compiled metrics in which nothing masked counts."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops
from keras.src.trainers.compile_utils import CompileMetrics


class ValidMetrics(CompileMetrics):
    """Keras's container of compiled metrics; masked positions count for none of them.

    In Keras only metrics that are means of a function of labels and outputs read the
    mask of an output. Others, such as AUC, F1 scores or IoU, read weights alone, so
    that they would count rows without a label, and rows that fill up a replica.
    """

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        if not self.built:
            self.build(y_true, y_pred)
        labels, outputs = self._flatten_y(y_true), self._flatten_y(y_pred)
        none = [None] * len(outputs)
        weights = none if sample_weight is None else self._flatten_y(sample_weight)
        for lists, own_weights in (
            (self._flat_metrics, none),
            (self._flat_weighted_metrics, weights),
        ):
            # Where only one kind of metrics was given, the other list may be empty.
            parts = zip(lists, labels, outputs, own_weights, strict=False)
            for found, y, output, weight in parts:
                for metric in found.metrics if found else ():
                    _update(metric, y, output, weight)


def _update(metric: keras.metrics.Metric, y: Any, output: Any, weight: Any) -> None:
    mask = getattr(output, "_keras_mask", None)
    if mask is not None and not isinstance(metric, keras.metrics.MeanMetricWrapper):
        if weight is None:
            weight = ops.cast(mask, metric.dtype)
        else:
            weight = ops.cast(weight, "float32") * ops.cast(mask, "float32")
    metric.update_state(y, output, sample_weight=weight)
