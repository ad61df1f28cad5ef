"""The temperature at which a teacher's targets are as soft as is wanted."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_distill.files import save_figure
from keras_distill.teachers.base import Teacher
from keras_distill.teachers.ensemble import as_teacher
from keras_distill.teachers.reading import class_head, dataset_of, reader

LOWEST, HIGHEST = 1e-3, 1e6


def suggest_temperature(
    teacher: Any,
    data: Any,
    perplexity: float = 2.0,
    *,
    plot: str | os.PathLike[str] | None = None,
) -> float:
    r"""The temperature at which the teacher's targets have a given perplexity.

    With `p = softmax(z / T)` for each row, it solves

        exp(mean over rows of H(p)) = perplexity,   H(p) = -Σ_c p_c log p_c

    by bisection: the entropy grows with T, from 0 (one class has it all) to the
    logarithm of the number of classes (all are alike). A perplexity of 2 is that of
    targets spread over two classes evenly: the likeliest class still leads, and what is
    said of the others is large enough to be learned from.

    Args:
        teacher: Any teacher with one output of class scores, of any rank. Positions
            that its mask hides do not count.
        data: As for `select_transfer_set`: arrays or a `tf.data.Dataset`. A few
            thousand rows are enough, and labels are not needed.
        perplexity: Between 1 and the number of classes, both excluded.
        plot: Of an image of the entropy over T. Its ending says the format.

    Returns:
        T. An arithmetic ensemble is run again for each T that is tried.

    Raises:
        ValueError: If `perplexity` is out of range, or the teacher's logits are so
            alike that no temperature gives it.
        ImportError: If `plot` is given and matplotlib is not installed.

    Example:

    >>> import keras, numpy as np
    >>> teacher = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
    >>> teacher.set_weights([np.eye(3), np.zeros(3)])
    >>> x = 10 * np.eye(3, dtype="float32")
    >>> round(suggest_temperature(teacher, x, perplexity=2.0), 2)
    5.21
    """
    teacher = as_teacher(teacher)
    classes = class_head(teacher).classes
    if not 1 < perplexity < classes:
        raise ValueError(
            f"`perplexity` must be above 1 and below the number of classes, {classes}. "
            f"Received: {perplexity}"
        )
    entropy = _entropy_of(teacher, data)
    wanted = math.log(perplexity)
    low, high = LOWEST, HIGHEST
    for end, reached in ((low, entropy(low) < wanted), (high, wanted < entropy(high))):
        if not reached:
            raise ValueError(
                f"`perplexity`={perplexity} is out of reach: at T = {end:g} it is "
                f"{math.exp(entropy(end)):.4g}. The teacher's logits differ too little "
                "or too much."
            )
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if entropy(middle) < wanted else (low, middle)
    found = math.sqrt(low * high)
    if plot is not None:
        _draw(entropy, found, perplexity, classes, plot)
    return found


def _entropy_of(teacher: Teacher, data: Any) -> Callable[[float], float]:
    """The mean entropy of the targets as a function of the temperature."""
    read = reader(teacher, dataset_of(data), labels=False)

    def logits(temperature: float) -> np.ndarray:
        reading = read(temperature)
        return reading.logits[reading.valid]

    if teacher.one_temperature:
        return lambda t: mean_entropy(logits(t), t)
    known = logits(1.0)
    return lambda t: mean_entropy(known, t)


def mean_entropy(logits: np.ndarray, temperature: float) -> float:
    """Mean over all positions of the entropy of `softmax(logits / temperature)`."""
    z = logits.reshape(-1, logits.shape[-1]).astype("float64")
    z = (z - z.max(-1, keepdims=True)) / temperature
    e = np.exp(z)
    total = e.sum(-1)
    return float(np.mean(np.log(total) - (e * z).sum(-1) / total))


def _draw(
    entropy: Callable[[float], float],
    found: float,
    perplexity: float,
    classes: int,
    path: str | os.PathLike[str],
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    temperatures = np.geomspace(found / 30, found * 30, 61)
    axes.plot(temperatures, [entropy(float(t)) for t in temperatures])
    axes.axhline(math.log(classes), color="gray", ls=":", label=f"log {classes}")
    label = f"T = {found:.3g}: perplexity {perplexity:g}"
    axes.plot([found], [math.log(perplexity)], "o", color="C3", label=label)
    axes.set(xscale="log", xlabel="temperature T", ylabel="mean entropy of the targets")
    axes.legend()
    save_figure(figure, path)
