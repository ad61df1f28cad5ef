"""Looking rows up in a finished cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from keras_distill.teachers.store.codec import Codec
from keras_distill.teachers.store.manifest import record_dtype
from keras_distill.teachers.store.shards import KEY, Index, Shards


class Lookup:
    """What a cache holds of given rows, on NumPy arrays.

    Args:
        path: The directory.
        manifest: Of a finished cache whose files are whole.

    Attributes:
        codec: How the records were made.
        shards: The records.
        views: How many records each row has.
        augmented: Whether each record has the seed of its view.
    """

    def __init__(self, path: str, manifest: dict[str, Any]) -> None:
        directory = Path(path).absolute()  # files are opened when they are read
        arguments = manifest["arguments"]
        self.views: int = arguments["views"]
        self.augmented: bool = arguments["augmented"]
        self.codec = Codec.from_config(manifest["codec"])
        record = record_dtype(manifest["record"])
        self.shards = Shards(directory, manifest["shards"], record, self.views)
        self._path = path
        self._parts = np.cumsum([0, *manifest["parts"]])
        self._index = None
        if arguments["key"] == "content":
            self._index = Index(directory, manifest["index"])

    @property
    def leaves(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of what `read` returns for one row, by name."""
        specs: dict[str, tuple[tuple[int, ...], str]]
        specs = {stored.name: stored.leaf for stored in self.codec.stored}
        return specs | ({"seed": ((2,), "int32")} if self.augmented else {})

    def read(
        self, keys: np.ndarray, positions: np.ndarray, views: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The stored values of some rows, by name.

        Args:
            keys: The rows' hashes, int64 `(B,)`.
            positions: Their places in the data.
            views: Which view of each is wanted.

        Raises:
            ValueError: If a row is not in the cache, or not at that place.
        """
        found, records = self.shards.read(self._rows(keys, positions), views)
        if self._index is None and not np.array_equal(found, keys.view(KEY)):
            first = positions[np.argmax(found != keys.view(KEY))]
            raise ValueError(
                f"Row {first} is not the one at that place in the cache {self._path!r}:"
                " with key='position' the data must come in the order in which the "
                "cache was built. Shuffle after `attach`."
            )
        leaves = {stored.name: stored.read(records) for stored in self.codec.stored}
        if self.augmented:
            leaves["seed"] = np.ascontiguousarray(records["seed"])
        return leaves

    def first_view(self, key: np.ndarray, position: np.ndarray) -> tuple[Any, int]:
        """Seed and hash of the first view of one row."""
        rows = self._rows(key, position)
        _, records = self.shards.read(rows, np.zeros(1, "int64"))
        return records["seed"][0], records["view"][0]

    def _rows(self, keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Row numbers, for hashes or for places in the data."""
        if self._index is None:
            if positions.max() >= len(self.shards):
                raise ValueError(
                    f"Row {positions.max()} is not in the cache {self._path!r}, which "
                    f"holds {len(self.shards)}."
                )
            # Part i of n holds the rows i, i + n, i + 2 n, ...
            parts = len(self._parts) - 1
            return self._parts[positions % parts] + positions // parts
        rows, known = self._index.rows(keys.view(KEY))
        if not known.all():
            raise ValueError(
                f"{np.sum(~known)} of {len(keys)} rows are not in the cache "
                f"{self._path!r}, the first of them at place "
                f"{positions[np.argmin(known)]}. `x` must be as it was when the cache "
                "was built: same values, dtypes and keys, not augmented, not batched."
            )
        return rows
