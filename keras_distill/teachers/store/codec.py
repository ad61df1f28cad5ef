"""How a teacher's outputs and features become records, and records become those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distill.heads import FLOOR, Head
from keras_distill.teachers.base import Teacher
from keras_distill.teachers.sparse import SparseHead, top


@dataclass(frozen=True)
class Stored:
    """How one output or one tap is kept.

    Attributes:
        name: Its field in the records.
        label: The output's name or the tap's path.
        shape: Of one row, as the teacher gives it.
        kind: As in `Head`; None for what is not logits (taps, several sigmoid units).
            Of probabilities the logits are kept: small ones would vanish in float16.
        dtype: `"float16"` or `"float32"`.
        top_k: How many logits are kept, or None for all.
        temperatures: Of the ghost's logits, with `top_k`.
    """

    name: str
    label: str
    shape: tuple[int, ...]
    kind: str | None
    dtype: str
    top_k: int | None = None
    temperatures: tuple[float, ...] = ()

    @property
    def head(self) -> Head:
        """What the output is."""
        kind = self.kind or "logits"
        if self.top_k is None:
            return Head(self.label, (None, *self.shape), kind)
        return SparseHead(
            self.label, (None, *self.shape), "logits", self.top_k, self.temperatures
        )

    @property
    def fields(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """The record's fields: names, dtypes, shapes."""
        if self.top_k is None:
            return [(self.name, self.dtype, self.shape)]
        before, classes = self.shape[:-1], self.shape[-1]
        integers = "uint16" if classes <= 1 << 16 else "uint32"
        ghosts = len(self.temperatures) if self.top_k < classes else 0
        return [
            (f"{self.name}/values", self.dtype, (*before, self.top_k)),
            (f"{self.name}/indices", integers, (*before, self.top_k)),
            (f"{self.name}/ghosts", "float32", (*before, ghosts)),
        ]

    @property
    def leaf(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of one row in the data."""
        if self.top_k is None:
            return self.shape, self.dtype
        return (*self.shape[:-1], sum(f[2][-1] for f in self.fields)), "float32"

    def encode(self, value: Any, head: Head | None) -> list[Any]:
        """Tensors for the fields, in their order."""
        if self.top_k is not None:
            assert head is not None
            relative = self.dtype == "float16"
            parts = top(head.logits(value), self.top_k, self.temperatures, relative)
            return list(parts)
        if self.kind in ("attached", "probabilities"):
            value = _logits(value)
        return [ops.cast(value, "float32")]

    def read(self, records: np.ndarray) -> np.ndarray:
        """The leaf for the data, from records."""
        parts = [records[name] for name, _, _ in self.fields]
        if self.top_k is None:
            return np.ascontiguousarray(parts[0])
        return np.concatenate([part.astype("float32") for part in parts], -1)

    def decode(self, leaf: Any) -> Any:
        """The output as the teacher gave it (a sparse one as `SparseHead` reads it)."""
        value = ops.cast(leaf, "float32")
        if self.top_k is not None or self.kind not in ("attached", "probabilities"):
            return value
        if self.shape[-1] == 1:
            probabilities = ops.sigmoid(value)
        else:
            probabilities = ops.softmax(value)
        probabilities._keras_logits = value
        return probabilities


def _logits(probabilities: Any) -> Any:
    """Numbers of which the activation makes these probabilities again."""
    attached = getattr(probabilities, "_keras_logits", None)
    if attached is not None:
        return attached
    p = ops.cast(probabilities, "float32")
    log_p = ops.log(ops.maximum(p, FLOOR))
    if p.shape[-1] == 1:
        return log_p - ops.log(ops.maximum(1 - p, FLOOR))
    return log_p


@dataclass(frozen=True)
class Codec:
    """All outputs and taps of a teacher as they are kept.

    Attributes:
        outputs: The flat outputs.
        taps: The taps.
        structure: The outputs' structure, with the outputs' places in it.
        names: Names of the flat outputs.
        multi_label: Why the outputs are not class scores, or None if they are.
    """

    outputs: list[Stored]
    taps: list[Stored]
    structure: Any
    names: list[str]
    multi_label: str | None = None

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        taps: list[str],
        example: tuple[Any, dict[str, Any]],
        dtype: str,
        top_k: int | None,
        temperatures: tuple[float, ...],
    ) -> Codec:
        """The codec for a teacher.

        Args:
            teacher: The teacher.
            taps: Paths.
            example: What it says of one batch, for the shapes.
            dtype: `"float16"` or `"float32"`.
            top_k: How many logits to keep, or None.
            temperatures: Of the ghosts.

        Raises:
            ValueError: If sparse targets cannot be made of the outputs, or the batch
                has other axes than the teacher declares.
        """
        known, features = example
        heads, reason = cls.heads_of(teacher)
        if heads is None and top_k is not None:
            raise ValueError(f"`top_k` needs class scores. {reason}")
        outputs = []
        for place, value in enumerate(keras.tree.flatten(known)):
            shape = tuple(int(size) for size in value.shape[1:])
            _check_axes(teacher.names[place], shape, teacher.outputs, place)
            head = None if heads is None else heads[place]
            if head is not None and top_k is not None:
                shape = (*shape[:-1], head.classes)
                if not 1 <= top_k <= head.classes:
                    raise ValueError(
                        f"`top_k` must be from 1 to the {head.classes} classes of the "
                        f"output {head.name!r}. Received: {top_k}"
                    )
            kind = None if head is None else head.kind
            outputs.append(
                Stored(
                    f"output{place}",
                    teacher.names[place],
                    shape,
                    kind,
                    dtype,
                    top_k,
                    temperatures if top_k is not None else (),
                )
            )
        stored_taps = [
            Stored(
                f"tap{place}",
                path,
                tuple(int(size) for size in features[path].shape[1:]),
                None,
                dtype,
            )
            for place, path in enumerate(taps)
        ]
        places = list(range(len(outputs)))
        structure = keras.tree.pack_sequence_as(teacher.outputs, places)
        return cls(outputs, stored_taps, structure, list(teacher.names), reason)

    @staticmethod
    def heads_of(teacher: Teacher) -> tuple[list[Head] | None, str | None]:
        """The teacher's heads, or None and why there are none."""
        try:
            return teacher.heads(), None
        except ValueError as error:
            return None, str(error)

    @property
    def stored(self) -> list[Stored]:
        """Outputs, then taps."""
        return [*self.outputs, *self.taps]

    @property
    def fields(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """All fields of a record."""
        return [field for stored in self.stored for field in stored.fields]

    def encode(
        self, heads: list[Head] | None, known: Any, features: dict[str, Any]
    ) -> list[Any]:
        """Tensors for all fields, in their order."""
        flat = keras.tree.flatten(known)
        encoded = []
        for place, (stored, value) in enumerate(zip(self.outputs, flat, strict=True)):
            encoded += stored.encode(value, None if heads is None else heads[place])
        for stored in self.taps:
            encoded += stored.encode(features[stored.label], None)
        return encoded

    def get_config(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "outputs": [vars(stored) for stored in self.outputs],
            "taps": [vars(stored) for stored in self.taps],
            "structure": self.structure,
            "names": self.names,
            "multi_label": self.multi_label,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Codec:
        """From JSON."""
        outputs, taps = (
            [
                Stored(
                    **entry
                    | {
                        "shape": tuple(entry["shape"]),
                        "temperatures": tuple(entry["temperatures"]),
                    }
                )
                for entry in config[part]
            ]
            for part in ("outputs", "taps")
        )
        return cls(
            outputs, taps, config["structure"], config["names"], config["multi_label"]
        )


def _check_axes(name: str, shape: tuple[int, ...], outputs: Any, place: int) -> None:
    declared = tuple(keras.tree.flatten(outputs)[place].shape)[1:]
    if len(declared) != len(shape) or any(
        size not in (None, found) for size, found in zip(declared, shape, strict=True)
    ):
        raise ValueError(
            f"The teacher's output {name!r} has shape {shape} for one element of the "
            f"data set, and should have {declared}. `dataset` must hold single rows, "
            "not batches."
        )
