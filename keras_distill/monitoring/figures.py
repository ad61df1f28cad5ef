"""Figures as images for TensorBoard."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_distill.monitoring.calibration import Calibration


def reliability_figure(measured: dict[str, Calibration], bins: int) -> np.ndarray:
    """Accuracy over confidence, one panel per network; bars on the line are right.

    Returns:
        uint8 of shape `(1, H, W, 3)`.
    """
    figure, panels = _panels(1, len(measured))
    edges = np.arange(bins) / bins
    for panel, (name, found) in zip(panels[0], measured.items(), strict=True):
        panel.bar(edges, np.nan_to_num(found.accuracy), 1 / bins, align="edge")
        panel.plot([0, 1], [0, 1], "k--", linewidth=1)
        panel.set(
            title=f"{name}: ECE {found.error:.3f}",
            xlabel="confidence",
            ylabel="accuracy",
            xlim=(0, 1),
            ylim=(0, 1),
        )
    return _image(figure)


def attention_figure(
    x: np.ndarray | None, student: np.ndarray, teacher: np.ndarray
) -> np.ndarray:
    """One row per image: the image, the student's attention, the teacher's.

    Args:
        x: Images `(B, H, W, 1 or 3)`, or None.
        student: Features `(B, H, W, C)`.
        teacher: The same, of any size.

    Returns:
        uint8 of shape `(1, H, W, 3)`.
    """
    columns = {"student": attention_map(student), "teacher": attention_map(teacher)}
    if x is not None:
        low, high = x.min(), x.max()
        columns = {"input": (x - low) / max(high - low, 1e-9)} | columns
    figure, panels = _panels(len(student), len(columns), size=1.6)
    for column, (name, values) in enumerate(columns.items()):
        panels[0][column].set_title(name)
        for row, value in enumerate(values):
            gray = name == "input" and value.shape[-1] == 1
            shown = value[..., 0] if gray else value
            panels[row][column].imshow(shown, cmap="gray" if gray else "viridis")
            panels[row][column].set_axis_off()
    return _image(figure)


def attention_map(features: np.ndarray) -> np.ndarray:
    """Mean square over the channels, scaled to a highest value of 1 per row."""
    energy = np.mean(np.square(np.asarray(features, "float64")), -1)
    return energy / np.maximum(energy.max((1, 2), keepdims=True), 1e-30)


def _panels(rows: int, columns: int, size: float = 3.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * size, rows * size), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _image(figure: Any) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[None, ..., :3].copy()
