"""A teacher's knowledge, computed once and kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_distill.heads import Head
from keras_distill.losses.response import SoftTarget
from keras_distill.teachers.base import Teacher
from keras_distill.teachers.ensemble import as_teacher
from keras_distill.teachers.store.attaching import attached, check_first, check_replay
from keras_distill.teachers.store.building import Builder, checked_arguments
from keras_distill.teachers.store.lookup import Lookup
from keras_distill.teachers.store.manifest import (
    check_fingerprint,
    join_parts,
    open_manifest,
)
from keras_distill.teachers.store.rows import check_dataset, check_rows
from keras_distill.teachers.store.shards import locked
from keras_distill.teachers.store.verifying import largest_difference


class Cache(Teacher):
    """What a teacher says of every row of a data set, read from disk.

    `build` runs the teacher once over the data; `attach` puts what is stored beside
    the inputs, inside the `tf.data` pipeline; and `Distiller(student, cache)` trains
    at the student's own speed. Outputs and features come back in the teacher's own
    structure, so that all losses and links work as with the teacher itself.

    ```python
    cache = kd.teachers.Cache.build(teacher, rows, "cache")
    train = cache.attach(rows).shuffle(1000).batch(64)
    kd.Distiller(student, cache).compile("adam", loss).fit(train)
    ```

    A cache is made with `Cache.build` or `Cache.open`. Its data are mapped into memory,
    so that any number of processes read one copy, and none of them loads it whole.

    Attributes:
        path: The directory.
        temperatures: Those that it serves; empty for any.
        views: How many augmented views of each row it holds.

    References:
        Faghri et al., Reinforce Data, Multiply Impact: Improved Model Accuracy and
        Robustness with Dataset Reinforcement, ICCV 2023 (arXiv 2303.08983), for views.
        Beyer et al., Knowledge Distillation: A Good Teacher is Patient and Consistent,
        CVPR 2022 (arXiv 2106.05237), for why teacher and student should see the same
        view.
    """

    def __init__(
        self, path: str | os.PathLike[str], manifest: dict[str, Any], augment: Any
    ) -> None:
        arguments = manifest["arguments"]
        self.path = os.fspath(path)
        self.views = arguments["views"]
        self.temperatures = tuple(arguments["temperatures"])
        self.one_temperature = manifest["one_temperature"]
        self._manifest = manifest
        self._augment = augment
        self._lookup = Lookup(self.path, manifest)
        self._codec = codec = self._lookup.codec
        self.names = codec.names
        self.outputs = keras.tree.map_structure(
            lambda place: _symbol(codec.outputs[place].shape), codec.structure
        )
        # In the data it tells the knowledge of one cache from another's.
        self._id = manifest["id"]

    # -- making ---------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        teacher: Any,
        dataset: tf.data.Dataset,
        path: str | os.PathLike[str],
        *,
        taps: Sequence[Any] = (),
        top_k: int | None = None,
        temperatures: Sequence[float] = (),
        dtype: str = "float16",
        views: int = 1,
        augment: Callable[[Any, Any], Any] | None = None,
        batch_size: int = 128,
        key: str = "content",
        shard: tuple[int, int] | None = None,
    ) -> Cache:
        """Runs the teacher over the data, and stores what it says.

        The data stream through: memory does not grow with their number. A run that was
        killed goes on where it was when it is started again with the same arguments
        and the same data in the same order; a finished cache is opened. Of several
        processes that build the same cache one works and the others wait.

        Args:
            teacher: A model, a list of models or a `kd.teachers.Teacher`.
            dataset: Single rows, not batches: `x`, `(x,)`, `(x, y)`, `(x, y, weight)`.
            path: A directory of its own; made if it does not exist.
            taps: Layers of the teacher whose outputs are stored too, for links: names,
                paths or layer objects.
            top_k: Store the k largest logits, and one ghost class for the rest.
                Only `SoftTarget` can use such a cache. None stores all.
            temperatures: At which it will be used; needed with `top_k`, and exactly one
                for a teacher that is an arithmetic ensemble.
            dtype: `"float16"` or `"float32"`.
            views: How many augmented views of each row to store.
            augment: Function `(x, seed) -> x` of one row, with an int32 seed of shape
                `(2,)`, that has no other source of randomness (`tf.image.stateless_*`).
            batch_size: Rows (views) that the teacher gets at once.
            key: `"content"`: a row is recognised by a hash of its `x`, in any order.
                `"position"`: by its place, for very large sets: there is no index to
                search, and data in another order are refused.
            shard: `(i, n)`: only every n-th row beginning with the i-th, as in
                `dataset.shard(n, i)`, for n machines. `Cache.join` makes one of them.

        Returns:
            The cache, opened.

        Raises:
            ValueError: If an argument is out of range or without effect, the data are
                empty or batched, the teacher's outputs are not finite in this dtype, or
                there is another cache at `path`.
            OSError: If the disk is full. What was written before is kept.
        """
        teacher = as_teacher(teacher)
        if isinstance(teacher, Cache):
            raise ValueError("`teacher` is a cache already. Build from a live one.")
        arguments = checked_arguments(
            teacher,
            taps,
            top_k,
            temperatures,
            dtype,
            views,
            augment,
            batch_size,
            key,
            shard,
        )
        check_dataset(dataset)
        if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError("`dataset` must end. Received one that repeats for ever.")
        if shard is not None:
            dataset = dataset.shard(shard[1], shard[0])
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            builder = Builder(teacher, dataset, directory, arguments, augment)
            builder.run()
        cache = cls.open(path, augment=augment)
        check_first(cache._lookup, dataset)
        return cache

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        augment: Callable[[Any, Any], Any] | None = None,
    ) -> Cache:
        """Opens a finished cache, and checks that its files are whole.

        Args:
            path: The directory.
            augment: The function with which it was built, if it was: functions are not
                stored. `attach` checks that it gives the same views.

        Raises:
            ValueError: If there is no cache, it is unfinished or damaged, or `augment`
                is missing or has no effect.
        """
        return cls(path, open_manifest(Path(path), augment is not None), augment)

    @classmethod
    def join(
        cls, paths: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]
    ) -> Cache:
        """Makes one cache of those that were built with `shard=(i, n)`.

        Args:
            paths: The n parts, in any order. Their files are linked where that is
                possible, else copied; the parts can be deleted afterwards.
            path: A directory of its own.

        Returns:
            The cache. One with views has to be opened with
            `Cache.open(path, augment=...)` before it can be attached.

        Raises:
            ValueError: If parts are missing, unfinished or damaged, twice there, or not
                of the same teacher and arguments.
        """
        return cls(path, join_parts([Path(part) for part in paths], Path(path)), None)

    # -- using ----------------------------------------------------------------------

    def attach(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """Puts the teacher's knowledge beside the inputs.

        Call it on single rows, before `batch`; before `shuffle` too where the
        cache's key is `"position"`. With `key="content"` the rows may come in any
        order, and only some of them.

        Args:
            dataset: Elements `x`, `(x,)`, `(x, y)`, `(x, y, weight)`.

        Returns:
            A data set in the same order, in which a dictionary with the entries
            `inputs` and `kd_teacher` takes the place of `x`. With views, the inputs
            are the augmented ones: each row shows another view in each epoch of
            `fit`, all of them in turn.

        Raises:
            ValueError: If the rows are not of the cache's kind, or `augment` does not
                replay the stored views. A row that is not in the cache is a
                `tf.errors.OpError` when it is read.
        """
        check_dataset(dataset)
        check_rows(dataset, self._manifest["inputs"])
        self._check_augment()
        if self._augment is not None:
            check_replay(self._lookup, dataset, self._augment)
        return attached(self._lookup, dataset, self._augment, self._id)

    def verify(
        self, teacher: Any, dataset: tf.data.Dataset, rows: int = 256
    ) -> dict[str, float]:
        """Runs the teacher again on some rows, and compares.

        Args:
            teacher: The teacher that the cache was built with.
            dataset: The data that it was built from (of a part: `dataset.shard(n, i)`).
            rows: How many rows, spread evenly.

        Returns:
            `rows`, and `max_difference`, the largest difference found, relative to
            `1 + |value|`. The teacher on another machine agrees within float16.

        Raises:
            ValueError: If the teacher is another one, or the values differ by more than
                0.004.
        """
        teacher = as_teacher(teacher)
        check_fingerprint(self._manifest["fingerprint"], teacher, self.path)
        check_dataset(dataset)
        self._check_augment()
        if rows < 1:
            raise ValueError(f"`rows` must be at least 1. Received: {rows}")
        seen, largest = largest_difference(
            self._lookup,
            teacher,
            dataset,
            rows,
            self._augment,
            self._manifest["arguments"],
        )
        if not seen:
            raise ValueError("`dataset` is empty.")
        if not largest <= 0.004:
            raise ValueError(
                f"The teacher's values differ from the cache {self.path!r} by "
                f"{largest:.3g} (relative to 1 + |value|) on {seen} rows."
            )
        return {"rows": seen, "max_difference": largest}

    # -- the contract of a teacher --------------------------------------------------

    def __call__(
        self, x: Any, taps: Sequence[str], temperature: Any
    ) -> tuple[Any, dict[str, Any]]:
        found = x.get("kd_teacher") if isinstance(x, dict) else None
        if found is None:
            raise ValueError(
                "The teacher is a cache, and the data do not hold its knowledge: fit "
                "on `cache.attach(dataset).batch(...)`, with single rows in `dataset`."
            )
        if self._id not in found:
            raise ValueError(
                "The data were attached by another cache than the distiller's teacher, "
                f"{self!r}."
            )
        leaves = found[self._id]
        codec = self._codec
        outputs = keras.tree.map_structure(
            lambda place: codec.outputs[place].decode(leaves[f"output{place}"]),
            codec.structure,
        )
        return outputs, {
            stored.label: stored.decode(leaves[stored.name])
            for stored in codec.taps
            if stored.label in taps
        }

    def fingerprint(self) -> str:
        """The fingerprint of the teacher that is remembered."""
        return self._manifest["fingerprint"]

    def resolve(self, layer: Any) -> Any:
        if isinstance(layer, (list, tuple)):
            return [self.resolve(item) for item in layer]
        names = self._manifest["tap_names"]
        name = layer if isinstance(layer, str) else layer.name
        if name not in names:
            raise ValueError(
                f"`teacher_layer`: the cache does not hold {name!r}. It was built with "
                f"taps={list(names)}."
            )
        return names[name]

    def tap_specs(self, taps: Sequence[str]) -> dict[str, Any]:
        stored = {tap.label: tap for tap in self._codec.taps}
        return {tap: _symbol(stored[tap].shape) for tap in taps}

    def heads(self) -> list[Head]:
        if self._codec.multi_label is not None:
            raise ValueError(self._codec.multi_label)
        return [stored.head for stored in self._codec.outputs]

    def check_loss(self, loss: Any) -> None:
        super().check_loss(loss)
        if self._manifest["arguments"]["top_k"] is None:
            return
        if not isinstance(loss, SoftTarget) or loss.standardize:
            raise ValueError(
                f"{self!r} holds {self._manifest['arguments']['top_k']} logits per "
                "row: only SoftTarget (without `standardize`) can use them. Received: "
                f"{loss!r}"
            )

    def check_temperature(self, temperature: float) -> None:
        fits = [abs(temperature - t) <= 1e-6 * t for t in self.temperatures]
        if fits and not any(fits):
            raise ValueError(
                f"`temperature` must be one of {list(self.temperatures)}, for which "
                f"the cache was built. Received: {temperature}"
            )

    def __len__(self) -> int:
        return len(self._lookup.shards)

    def __repr__(self) -> str:
        return f"teachers.Cache({self.path!r}, {len(self)} rows)"

    def _check_augment(self) -> None:
        """Raises ValueError for views that were joined, and not opened."""
        if self._lookup.augmented and self._augment is None:
            raise ValueError(
                "This cache holds augmented views. Open it with "
                "Cache.open(path, augment=...)."
            )


def _symbol(shape: Sequence[int]) -> keras.KerasTensor:
    return keras.KerasTensor((None, *shape), "float32")
