"""The transfer set: which rows were kept, filtered from data and reported."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import numpy as np
import tensorflow as tf

from keras_distill.files import save_figure
from keras_distill.inputs import plain_inputs
from keras_distill.tables import text_table
from keras_distill.teachers.reading import NO_LABEL, in_batches, is_batched
from keras_distill.teachers.store.rows import as_tuple, content_keys, inputs_of

PICTURES = 40


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Which rows of a data set were kept. One entry per row, in the order read.

    Attributes:
        keep: bool `(N,)`.
        cost: What it costs to keep the row, float `(N,)`: see `select_transfer_set`.
        labels: Integers `(N,)`, -1 for none.
        predicted: The teacher's likeliest class, integers `(N,)`.
        confidence: Its probability, float `(N,)`.
        method: How it was decided.
    """

    keep: np.ndarray
    cost: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    method: str
    _keys: np.ndarray
    _data: tf.data.Dataset

    def filter(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The rows of a data set that were kept.

        Rows are recognised by their inputs, so that they may come in any order, only
        some of them, or repeatedly; filter before augmentation.

        Args:
            dataset: Single rows, or batches. Batches lose their dropped rows, and are
                left out when nothing remains: `.rebatch(size)` fills them up again.

        Returns:
            A `tf.data.Dataset` with elements of the same kind. A row that was not
            among the data of the selection is a `tf.errors.OpError` when it is read.
        """
        return self._part(dataset, self.keep)

    def _part(self, dataset: tf.data.Dataset, wanted: np.ndarray) -> tf.data.Dataset:
        if not isinstance(dataset, tf.data.Dataset):
            raise TypeError(
                f"`dataset` must be a tf.data.Dataset. Received: {type(dataset)}"
            )
        keys, first = np.unique(self._keys, return_index=True)
        known, verdicts_of = tf.constant(keys), tf.constant(wanted[first])
        in_tuples = isinstance(dataset.element_spec, tuple)

        def element_of(arguments: tuple[Any, ...]) -> Any:
            return arguments if in_tuples else arguments[0]

        def verdicts(element: Any) -> Any:
            found = content_keys(plain_inputs(inputs_of(*as_tuple(element))))
            place = tf.minimum(tf.searchsorted(known, found), len(keys) - 1)
            check = tf.debugging.assert_equal(
                tf.gather(known, place),
                found,
                "A row was not among the data of `select_transfer_set`: `x` must be as "
                "it was there (same values, dtypes and keys, not augmented).",
            )
            with tf.control_dependencies([check]):
                return tf.gather(verdicts_of, place)

        if not is_batched(dataset):

            def is_wanted(*arguments: Any) -> Any:
                one = tf.nest.map_structure(
                    lambda leaf: None if leaf is None else leaf[None], arguments
                )
                return verdicts(element_of(one))[0]

            return dataset.filter(is_wanted)

        def rest(*arguments: Any) -> Any:
            mask = verdicts(element_of(arguments))
            return tf.nest.map_structure(
                lambda leaf: None if leaf is None else tf.boolean_mask(leaf, mask),
                element_of(arguments),
            )

        def is_there(*element: Any) -> Any:
            return tf.shape(tf.nest.flatten(element)[0])[0] > 0

        return dataset.map(rest, tf.data.AUTOTUNE).filter(is_there)

    def report(self, path: str | os.PathLike[str] | None = None) -> str:
        """How many rows of each class were dropped, with pictures.

        Args:
            path: Of an image with the costs of all rows, and where the inputs are
                images `(H, W)`, `(H, W, 1)` or `(H, W, 3)`, the 40 dropped ones that
                cost most. Its ending says the format.

        Returns:
            A table in text: per class (the label, or the teacher's likeliest) the
            number of rows, of dropped ones, and how often the teacher chooses the label
            among kept and among dropped rows.

        Raises:
            ImportError: If `path` is given and matplotlib is not installed.
        """
        if path is not None:
            self._draw(path)
        groups = [(str(c), self._classes == c) for c in np.unique(self._classes)]
        rows = []
        for name, group in [*groups, ("all", np.ones(len(self.keep), bool))]:
            kept, dropped = group & self.keep, group & ~self.keep
            rows.append(
                [
                    name,
                    str(group.sum()),
                    f"{dropped.sum()} ({100 * dropped.sum() / group.sum():.1f} %)",
                    self._as_label(kept),
                    self._as_label(dropped),
                ]
            )
        header = ["class", "rows", "dropped", "as label, kept", "as label, dropped"]
        return text_table(header, rows)

    def __repr__(self) -> str:
        return (
            f"Selection({self.method!r}, {self.keep.sum()} of {len(self.keep)} rows "
            "kept)"
        )

    @property
    def _classes(self) -> np.ndarray:
        return np.where(self.labels == NO_LABEL, self.predicted, self.labels)

    def _as_label(self, rows: np.ndarray) -> str:
        """How often the teacher chooses the label, among rows that have one."""
        known = rows & (self.labels != NO_LABEL)
        if not known.any():
            return "-"
        return f"{100 * np.mean((self.predicted == self.labels)[known]):.1f} %"

    def _draw(self, path: str | os.PathLike[str]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        dropped = np.flatnonzero(~self.keep)
        worst = dropped[np.argsort(-self.cost[dropped], kind="stable")][:PICTURES]
        pictures = self._pictures(worst)
        lines = math.ceil(len(pictures) / 10)
        figure = Figure(figsize=(10, 3 + 1.3 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1 + lines, 10, height_ratios=[2.2] + [1] * lines)
        axes = figure.add_subplot(grid[0, :])
        parts = [self.cost[self.keep], self.cost[~self.keep]]
        names = [f"kept ({len(parts[0])})", f"dropped ({len(parts[1])})"]
        bins = np.histogram_bin_edges(self.cost, 50).tolist()
        for values, name, color in zip(parts, names, ["C0", "C3"], strict=True):
            axes.hist(values, bins, alpha=0.6, label=name, color=color)
        axes.set(yscale="log", xlabel="cost of keeping the row", ylabel="rows")
        axes.set_title(f"Transfer set by {self.method}")
        axes.legend()
        for place, (row, picture) in enumerate(pictures.items()):
            axes = figure.add_subplot(grid[1 + place // 10, place % 10])
            axes.imshow(picture, cmap="gray")
            axes.set_axis_off()
            label = self.labels[row]
            label = "no label" if label == NO_LABEL else f"label {label}"
            said = f"{self.predicted[row]} ({self.confidence[row]:.2f})"
            axes.set_title(f"{label}\nteacher {said}", fontsize=7)
        save_figure(figure, path)

    def _pictures(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Some rows' inputs, scaled to [0, 1]; empty if they are not images."""
        x = plain_inputs(inputs_of(*as_tuple(self._data.element_spec)))
        shape: tuple[int | None, ...] = ()
        if isinstance(x, tf.TensorSpec):
            shape = tuple(x.shape)[1 if is_batched(self._data) else 0 :]
        if len(shape) == 3 and shape[-1] in (1, 3):
            shape = shape[:2]
        if len(shape) != 2 or not len(rows):
            return {}
        wanted = np.isin(self._keys, self._keys[rows])
        found: dict[int, np.ndarray] = {}
        for element in in_batches(self._part(self._data, wanted)):
            x = plain_inputs(inputs_of(*as_tuple(element)))
            found |= zip(content_keys(x).numpy().tolist(), x.numpy(), strict=True)
        pictures = {row: found[int(self._keys[row])] for row in rows}
        return {row: _to_unit(picture) for row, picture in pictures.items()}


def _to_unit(picture: np.ndarray) -> np.ndarray:
    picture = picture.astype("float32")
    low, high = picture.min(), picture.max()
    picture = (picture - low) / max(high - low, 1e-12)
    return picture[..., 0] if picture.shape[-1:] == (1,) else picture
