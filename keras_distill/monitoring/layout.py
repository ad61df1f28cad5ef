"""The page of TensorBoard that holds all charts."""

from __future__ import annotations

import tensorflow as tf

# Groups of charts: title, and patterns of tags.
_LAYOUT = {
    "Knowledge": {
        "entropy": [r"entropy/.*"],
        "agreement": [r"agreement.*"],
        "divergence from the teacher": [r"kl.*"],
        "calibration error": [r"ece/.*"],
        "gain by class": [r"class_gain/.*"],
    },
    "Training": {
        "temperature": ["temperature"],
        "weights": ["alpha", "beta", r"weight/.*"],
        "learning rate": ["learning_rate"],
        "shares of the gradient": [r"gradient_share/.*"],
        "gates": [r"gate/.*"],
        "accuracy of branches": [r"branch/.*"],
        "steps per second": ["steps_per_second"],
        "the teacher's share of the time": ["teacher_time_share"],
    },
    "Losses": {
        "hard": ["epoch_hard_loss", "result/val_hard_loss"],
        "terms": [r"epoch_(?!hard).*_loss", "epoch_loss"],
    },
}


def write_layout() -> None:
    """Writes the layout of the page "custom scalars" to the current writer."""
    from tensorboard.plugins.custom_scalar import layout_pb2, summary

    categories = []
    for title, charts in _LAYOUT.items():
        lines = [
            layout_pb2.Chart(
                title=name, multiline=layout_pb2.MultilineChartContent(tag=tags)
            )
            for name, tags in charts.items()
        ]
        categories.append(layout_pb2.Category(title=title, chart=lines))
    written = summary.pb(layout_pb2.Layout(category=categories))
    tf.summary.experimental.write_raw_pb(written.SerializeToString(), step=0)
