"""What labels say: the compiled loss and metrics, with labels missing or weighted."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distill.links import as_list
from keras_distill.loss_values import any_of, common_layout, per_position
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
    remasked,
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
        y, shown, rows = self._where_labelled(labels, outputs)
        self._logs.update("labelled", 1.0, rows)
        if self._compile_metrics is not None:
            plain = self._metric_weights(outputs, weights)
            self._compile_metrics.update_state(y, shown, plain)
        if self._compile_loss is None:
            return None
        compared, loss_weights = self._for_losses(labels, shown, scaled)
        hard = ops.cast(self._compile_loss(y, compared, loss_weights), "float32")
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
        y, shown, rows = self._where_labelled(labels, outputs)
        compared, loss_weights = self._for_losses(labels, shown, weights)
        value = ops.cast(self._compile_loss(y, compared, loss_weights), "float32")
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

    def _where_labelled(
        self: Any, labels: list[Labels | None], outputs: Any
    ) -> tuple[Any, Any, Any]:
        """Labels, outputs whose masks leave out what has none, and rows that count."""
        share = current_share()
        shown = []
        for label, output in zip(labels, keras.tree.flatten(outputs), strict=True):
            valid = None if label is None else label.valid
            if share is not None:  # metrics must not see a padding row
                present = ops.ones_like(_values_of(output)) * share.rows > 0
                valid = present if valid is None else valid & present
            shown.append(hand_on(output, valid))
        values = [None if label is None else label.values for label in labels]
        return (
            keras.tree.pack_sequence_as(outputs, values),
            keras.tree.pack_sequence_as(outputs, shown),
            _rows(labels),
        )

    def _for_losses(
        self: Any, labels: list[Labels | None], shown: Any, scaled: Any
    ) -> tuple[Any, Any]:
        """Outputs and weights as compiled losses take them: aligned with values."""
        compared, weights = [], []
        flat = keras.tree.flatten(shown)
        for label, output, weight, losses in zip(
            labels, flat, scaled, self._losses_by_output(), strict=True
        ):
            mask = getattr(output, "_keras_mask", None)
            positions = _values_of(output)
            if label is not None and not _all_none([weight, mask]):
                layout = common_layout(losses, label.values, output)
                if layout != per_position(output):
                    weight = layout.of_positions(weight, positions, ops.mean)
                    mask = layout.of_positions(mask, positions, any_of)
                    output = remasked(output, mask)
                    positions = layout.of_positions(positions, positions, ops.mean)
            compared.append(output)
            weights.append(full(for_masked(weight, mask), positions))
        return (
            keras.tree.pack_sequence_as(shown, compared),
            None if _all_none(weights) else keras.tree.pack_sequence_as(shown, weights),
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

    def _losses_by_output(self: Any) -> list[list[Any]]:
        """What was compiled for each output."""
        loss = getattr(self, "_compiled_loss", None)
        if isinstance(loss, dict):
            losses = [loss.get(name) for name in self._names]
        elif isinstance(loss, (list, tuple)) and len(loss) == len(self._names):
            losses = list(loss)
        else:
            losses = [loss] * len(self._names)
        return [as_list(one) for one in losses]

    def _label_kinds(self: Any) -> list[str | None]:
        kinds = [{label_kind(one) for one in own} for own in self._losses_by_output()]
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
