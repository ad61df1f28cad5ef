"""What labels say: the compiled loss and metrics, with labels missing or weighted."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill.links import as_list
from keras_distill.terms import Counted
from keras_distill.weighting import (
    Labels,
    by_output,
    class_weights,
    current_rows,
    current_share,
    for_masked,
    full,
    hand_on,
    label_kind,
    multiply,
    read_labels,
    unscaled,
)


class Labelled:
    """Mixed into the distillers: applies what was compiled to outputs and labels."""

    def hard_loss(
        self: Any, labels: list[Labels | None], outputs: Any, scaled: Any, weights: Any
    ) -> Any:
        """The compiled loss of the outputs; also updates the compiled metrics.

        Args:
            labels: Per output, None where there are none.
            outputs: The student's outputs.
            scaled: Weights per output, with this replica's scale.
            weights: The same without it, for metrics.

        Returns:
            A scalar, or None without labels or without a compiled loss.
        """
        if _all_none(labels):
            return None
        y, shown, loss_weights, rows = self._for_losses(labels, outputs, scaled)
        self._logs.update("labelled", 1.0, rows)
        if self._compile_metrics is not None:
            plain = self._metric_weights(outputs, weights)
            self._compile_metrics.update_state(y, shown, plain)
        if self._compile_loss is None:
            return None
        hard = ops.cast(self._compile_loss(y, shown, loss_weights), "float32")
        self._logs.update("hard_loss", unscaled(hard, rows), rows)
        return hard

    def label_loss(
        self: Any, y: Any, outputs: Any, sample_weight: Any, log: str | None = None
    ) -> Counted | None:
        """The compiled loss of any outputs: of a branch, an exit or a peer.

        Unlike `hard_loss` it is for use inside `compute_terms`, and updates no
        compiled metric.

        Args:
            y: Labels, as `compute_terms` gets them.
            outputs: Outputs of the student's structure and shapes.
            sample_weight: Weights, as `compute_terms` gets them.
            log: Name of a declared log that records the value.

        Returns:
            The scalar, which may be (part of) a term, and the rows it counts; None
            without labels or without a compiled loss.
        """
        labels, weights = self._read(y, sample_weight, training=False)
        if _all_none(labels) or self._compile_loss is None:
            return None
        y, shown, loss_weights, rows = self._for_losses(labels, outputs, weights)
        value = ops.cast(self._compile_loss(y, shown, loss_weights), "float32")
        if log is not None:
            self._logs.update(log, unscaled(value, rows), rows)
        return Counted(value, rows)

    def log_accuracy(self: Any, log: str, y: Any, logits: Any) -> None:
        """Records how often the largest logit is the label's; for one output.

        Nothing is recorded without labels, or where labels are no classes.
        """
        label = self._read(y, None, training=False)[0][0]
        if label is None or label.classes is None:
            return
        found = ops.cast(ops.argmax(logits, -1), "int32")
        right = ops.cast(found == label.classes, "float32")
        weight = ops.ones_like(right)
        for mask in (label.valid, getattr(logits, "_keras_mask", None)):
            weight = weight if mask is None else weight * ops.cast(mask, "float32")
        share = current_share()
        if share is not None:
            weight = weight * ops.cast(share.rows > 0, "float32")
        self._logs.update(log, right, weight)

    def _metric_weights(self: Any, outputs: Any, weights: list[Any]) -> Any:
        """Weights as Keras's metrics take them: without this replica's scale."""
        share = current_share()
        result = []
        for output, weight in zip(keras.tree.flatten(outputs), weights, strict=True):
            if share is not None:
                here = ops.cast(share.rows > 0, "float32")
                weight = here if weight is None else ops.cast(weight, "float32") * here
            result.append(full(weight, _values_of(output)))
        if _all_none(result):
            return None
        return keras.tree.pack_sequence_as(outputs, result)

    def _for_losses(
        self: Any, labels: list[Labels | None], outputs: Any, scaled: Any
    ) -> tuple[Any, Any, Any, Any]:
        """Labels, outputs and weights as Keras's losses take them; rows that count."""
        share = current_share()
        shown, weights = [], []
        flat = keras.tree.flatten(outputs)
        for label, output, weight in zip(labels, flat, scaled, strict=True):
            valid = None if label is None else label.valid
            values = _values_of(output)
            if share is not None:  # metrics must not see a padding row
                present = ops.ones_like(values) * ops.cast(share.rows, "float32") > 0
                valid = present if valid is None else valid & present
            shown.append(hand_on(output, valid))
            mask = getattr(shown[-1], "_keras_mask", None)
            weights.append(full(for_masked(weight, mask), values))

        def pack(items: list[Any]) -> Any:
            return keras.tree.pack_sequence_as(outputs, items)

        y = pack([None if label is None else label.values for label in labels])
        return (
            y,
            pack(shown),
            None if _all_none(weights) else pack(weights),
            _rows(labels),
        )

    def _read(
        self: Any, y: Any, sample_weight: Any, training: bool
    ) -> tuple[list[Labels | None], list]:
        kinds = self._label_kinds()
        specs = keras.tree.flatten(self._symbolic_outputs)
        labels = [
            None if item is None else read_labels(item, spec, kind, self.unlabelled)
            for item, spec, kind in zip(
                by_output(y, specs, self._names), specs, kinds, strict=True
            )
        ]
        if training and self._one_weight_given:
            weights = keras.tree.flatten(sample_weight)[:1] * len(labels)
        elif isinstance(sample_weight, (dict, list, tuple)):
            weights = by_output(sample_weight, specs, self._names)
        else:
            weights = [sample_weight] * len(labels)
        if training and self._class_weight is not None:
            if all(label is None for label in labels):
                raise ValueError("`class_weight` needs labels, and the data have none.")
            table = dict(self._class_weight)
            weights = [
                w if label is None else multiply(w, class_weights(label, table))
                for w, label in zip(weights, labels, strict=True)
            ]
        return labels, weights

    def _one_weight(self: Any, weights: list[Any]) -> Any:
        first = weights[0]
        if all(weight is first for weight in weights):
            return first
        return dict(zip(self._names, weights, strict=True))

    def _label_kinds(self: Any) -> list[str | None]:
        loss = getattr(self, "_compiled_loss", None)
        if isinstance(loss, dict):
            losses = [loss.get(name) for name in self._names]
        elif isinstance(loss, (list, tuple)) and len(loss) == len(self._names):
            losses = list(loss)
        else:
            losses = [loss] * len(self._names)
        kinds = [{label_kind(item) for item in as_list(one)} for one in losses]
        return [next(iter(k)) if len(k) == 1 else None for k in kinds]


def _all_none(values: list[Any]) -> bool:
    return all(value is None for value in values)


def _values_of(output: Any) -> Any:
    """Something of the shape of an output's loss values: one per position."""
    return ops.cast(output[..., 0] if len(output.shape) > 1 else output, "float32")


def _rows(labels: list[Labels | None]) -> Any:
    """How much a batch counts: its rows, in the share of positions with a label.

    With several outputs that is the mean over those for which the data have labels.
    """
    rows = current_rows()
    shares = [
        1.0 if label.valid is None else ops.mean(ops.cast(label.valid, "float32"))
        for label in labels
        if label is not None
    ]
    return rows * (sum(shares) / len(shares))
