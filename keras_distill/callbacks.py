"""Backup: a run continues exactly where it was killed."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import pathlib
import warnings
from typing import Any

import keras
import numpy as np

from keras_distill.distribute.states import assign_to_replicas, values_of_replicas
from keras_distill.distribute.workers import is_chief
from keras_distill.files import whole
from keras_distill.links import as_list

_MAGIC = b"keras_distill backup 1\n"


class Backup(keras.callbacks.Callback):
    """Saves the whole state of a run, so that a killed run continues exactly.

    One checksummed file holds weights, the states of random generators, optimizer,
    metrics, epoch, batch and the other callbacks' scalar state. It is written to a
    temporary name and renamed; the one before stays beside it as `<path>.previous`.
    Calling the same `fit` again continues: in mid-epoch the batches that were trained
    already are read but not trained, other callbacks do not see them, and batch
    numbers continue. After a finished run the same `fit` returns at once with the
    final weights. To train anew, delete both files.

    The continued run equals the uninterrupted one bit by bit if the order of the data
    is a function of seed and epoch alone: see `kd.data.per_epoch`. Weights that another
    callback keeps, as `EarlyStopping(restore_best_weights=True)` does, are not in the
    file. Under a strategy with several workers the chief writes, and all read.

    Args:
        path: The file. Its folder is made if needed.
        save_freq: `"epoch"`, or a number of batches.

    Raises:
        TypeError: When a run begins, if it is not a distiller's.
        ValueError: If `save_freq` is neither; when a run begins, if the file is
            truncated, foreign or of another run and there is no good one before it.

    Example:

    ```python
    backup = kd.callbacks.Backup("runs/backup.kd", save_freq=100)
    distiller.fit(data, epochs=10, callbacks=[backup])
    ```
    """

    def __init__(self, path: str | os.PathLike, save_freq: str | int = "epoch") -> None:
        super().__init__()
        if save_freq != "epoch" and not (isinstance(save_freq, int) and save_freq > 0):
            raise ValueError(
                "`save_freq` must be 'epoch' or a number of batches above 0. "
                f"Received: {save_freq!r}"
            )
        self.path = pathlib.Path(path)
        self.save_freq = save_freq
        self._companions: list[keras.callbacks.Callback] = []
        self._epoch = 0
        self._saved_batch = 0
        self._finished = False
        self._resumed: dict[str, Any] | None = None
        self._muted: list[tuple[Any, str, Any]] = []

    @property
    def previous(self) -> pathlib.Path:
        """The file that was written before the last one."""
        return self.path.with_name(f"{self.path.name}.previous")

    def with_companions(self, callbacks: list[keras.callbacks.Callback]) -> None:
        """Tells the other callbacks, whose state is saved too (`fit` calls this)."""
        self._companions = [c for c in callbacks if c is not self]

    # -- continuing -----------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        if not hasattr(self.model, "epoch_began"):
            raise TypeError(
                "Backup needs a distiller; kd.BaseDistiller(model) makes one of any "
                f"model, with labels alone. Received: {self.model!r}"
            )
        self._resumed = None
        self._finished = False
        state = self._read()
        if state is None:
            return
        self._restore(state)
        for companion, saved in zip(self._companions, state["callbacks"], strict=False):
            if type(companion).__name__ == saved["class"]:
                vars(companion).update(saved["state"])
        self._epoch = self.model._initial_epoch = state["epoch"]
        wanted = self.params["epochs"]
        if state["epoch"] > wanted:
            warnings.warn(
                f"The backup {str(self.path)!r} is of {state['epoch']} epochs, more "
                f"than `epochs={wanted}`: nothing is trained. {self._anew()}",
                stacklevel=2,
            )
        self._finished = state["finished"] and state["target"] == wanted
        if self._finished:
            self.model._initial_epoch = wanted
        elif state["batch"]:
            self._resumed = state

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        self._saved_batch = 0
        if self._resumed is not None and epoch == self._resumed["epoch"]:
            # Keras has just reset the metrics.
            self._restore(self._resumed)
            self._saved_batch = self._resumed["batch"]
            self._skip(self._resumed["batch"])
        self._resumed = None

    def _skip(self, batches: int) -> None:
        """Reads the first batches of the epoch without training on them."""
        model, train = self.model, self.model.train_function
        left = batches
        steps = model.steps_per_execution

        def read(iterator: Any) -> Any:
            nonlocal left
            count, left = min(steps, left), left - steps
            if left <= 0:  # before the data may end: the last execution can be shorter
                model.train_function = train
            for _ in range(count):
                next(iterator)
            return model.get_metrics_result()

        model.train_function = read
        for companion in self._companions:
            for hook in ("on_train_batch_begin", "on_train_batch_end"):
                self._muted.append((companion, hook, vars(companion).get(hook)))
                setattr(companion, hook, _from_batch(batches, getattr(companion, hook)))

    def _unmute(self) -> None:
        for companion, hook, own in self._muted:
            delattr(companion, hook)
            if own is not None:  # a LambdaCallback's
                setattr(companion, hook, own)
        self._muted = []

    # -- saving ---------------------------------------------------------------------

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if isinstance(self.save_freq, str):  # "epoch"
            return
        done = batch + 1
        if done // self.save_freq > self._saved_batch // self.save_freq:
            self._saved_batch = done
            self._write(self._epoch, done)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._unmute()
        self._epoch = epoch + 1
        self._write(epoch + 1, 0)

    def on_train_end(self, logs: Any = None) -> None:
        if not self._finished:
            self._write(self._epoch, 0, finished=True)

    def _variables(self) -> list[Any]:
        """Everything that makes the state of the run, in a fixed order."""
        model = self.model
        optimizers = as_list(getattr(model, "optimizers", model.optimizer))
        found = [*model.variables]
        found += [v for optimizer in optimizers for v in optimizer.variables]
        found += [v for metric in model.metrics for v in metric.variables]
        return list({id(v): v for v in found}.values())

    def _differing(self) -> list[Any]:
        """What may have another value on each replica."""
        model = self.model
        if model.distribute_strategy.num_replicas_in_sync == 1:
            return []
        found = [v for metric in model.metrics for v in metric.variables]
        found += model.non_trainable_variables
        return list({id(v): v for v in found}.values())

    def _write(self, epoch: int, batch: int, finished: bool = False) -> None:
        strategy = self.model.distribute_strategy
        values = [np.asarray(v.numpy()) for v in self._variables()]
        differing = self._differing()
        if differing:
            values += values_of_replicas(strategy, differing)
        if not is_chief(strategy):
            return
        header = {
            "epoch": epoch,
            "batch": batch,
            "finished": finished,
            "target": self.params["epochs"],
            "replicas": strategy.num_replicas_in_sync,
            "values": [[list(v.shape), str(v.dtype)] for v in values],
            "callbacks": [
                {"class": type(c).__name__, "state": _scalars(c)}
                for c in self._companions
            ],
        }
        head = json.dumps(header).encode()
        parts = [len(head).to_bytes(8, "little"), head, *map(_bytes, values)]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        try:
            self._replace([_MAGIC, digest.hexdigest().encode(), *parts])
        except OSError as error:
            warnings.warn(
                f"The backup {str(self.path)!r} could not be written: {error}. "
                "Training goes on without it.",
                stacklevel=2,
            )

    def _replace(self, parts: list[Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole(self.path) as temporary:
            with open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
            if self.path.exists():
                os.replace(self.path, self.previous)

    # -- reading --------------------------------------------------------------------

    def _read(self) -> dict[str, Any] | None:
        """The newest good state, or None if there is no file."""
        problems = []
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                state = _parse(path)
            except ValueError as error:
                problems.append(f"{path.name}: {error}")
                continue
            if problems:
                warnings.warn(
                    f"The backup {problems[0]}; the one before it is used.",
                    stacklevel=2,
                )
            return state
        if problems:
            raise ValueError(
                f"There is no good backup at {str(self.path)!r}: "
                f"{'; '.join(problems)}. {self._anew()}"
            )
        return None

    def _anew(self) -> str:
        files = " and ".join(repr(str(p)) for p in (self.path, self.previous))
        return f"To start anew, delete {files}."

    def _restore(self, state: dict[str, Any]) -> None:
        variables, strategy = self._variables(), self.model.distribute_strategy
        values = state["values"]
        common, own = values[: len(variables)], values[len(variables) :]
        wanted = [
            (tuple(v.shape), keras.backend.standardize_dtype(v.dtype))
            for v in variables
        ]
        found = [(value.shape, str(value.dtype)) for value in common]
        if wanted != found:
            raise ValueError(
                f"The backup {str(self.path)!r} is of another run: it holds "
                f"{len(values)} variables that do not fit this run's {len(wanted)}. "
                f"{self._anew()}"
            )
        for variable, value in zip(variables, common, strict=True):
            variable.assign(value)
        if own and state["replicas"] == strategy.num_replicas_in_sync:
            assign_to_replicas(strategy, self._differing(), own)


def _bytes(value: np.ndarray) -> Any:
    """What an array holds, without a copy."""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _from_batch(first: int, hook: Any) -> Any:
    def hidden(batch: int, logs: Any = None) -> None:
        if batch >= first:
            hook(batch, logs)

    return hidden


def _scalars(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """The numbers, texts and flags that a callback keeps.

    What it was told in its constructor (a patience, say) is not state. Of Keras's own
    only numbers are: texts and flags say where and how they write at the moment.
    """
    state = {}
    kinds = (int, float) if _of_keras(callback) else (int, float, bool, str)
    told = inspect.signature(type(callback)).parameters
    for name, value in vars(callback).items():
        if name in told:
            continue
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) in kinds:
            state[name] = value
    return state


def _of_keras(callback: keras.callbacks.Callback) -> bool:
    return type(callback).__module__.partition(".")[0] == "keras"


def _parse(path: pathlib.Path) -> dict[str, Any]:
    """The state in a file.

    Raises:
        ValueError: If the file is foreign, truncated or damaged.
    """
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        raise ValueError("not a backup of this library")
    digest = data[len(_MAGIC) : len(_MAGIC) + 64]
    payload = memoryview(data)[len(_MAGIC) + 64 :]
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise ValueError("truncated or damaged (its checksum is wrong)")
    length = int.from_bytes(payload[:8], "little")
    state = json.loads(bytes(payload[8 : 8 + length]))
    values, start = [], 8 + length
    for shape, dtype in state["values"]:
        kind = np.dtype(_numpy_dtype(dtype))
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        values.append(np.frombuffer(payload[start : start + size], kind).reshape(shape))
        start += size
    return state | {"values": values}


def _numpy_dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes  # NumPy knows this type through TensorFlow's dependency

        return ml_dtypes.bfloat16
    return name
