"""The callback that writes for TensorBoard."""

from __future__ import annotations

import copy
import os
import re
from typing import Any

import keras
import tensorflow as tf

from keras_distill.base import BaseDistiller
from keras_distill.distribute.workers import is_chief, several_workers
from keras_distill.losses.base import number
from keras_distill.monitoring.charts import (
    AttentionChart,
    GateCharts,
    LogitCharts,
    Rows,
    ask,
    in_graph,
)
from keras_distill.monitoring.clock import StepClock, TeacherClock, TeacherShare
from keras_distill.monitoring.layout import write_layout
from keras_distill.teachers.cache import Cache
from keras_distill.teachers.ensemble import as_teacher

_BRANCH = re.compile(r"(branch|exit|net)_\d+_accuracy|ensemble_accuracy")


class DistillationBoard(keras.callbacks.Callback):
    """Writes what a distiller is learning for TensorBoard, after every epoch.

    Always: temperature, alpha, beta, the weights of the terms, the learning rate, steps
    per second; the gradient's shares with `compile(log_gradient_share=...)`; mean gates
    and accuracies of the branches of `kd.OneEnsemble`.

    With validation data: entropy of student and teacher (at T = 1), agreement, the
    Kullback-Leibler divergence from the teacher (at T = 1), the expected calibration
    error and a reliability diagram, and per class what accuracy has been gained. The
    teacher's charts need a distiller whose soft loss compares logits. Also histograms
    of the gates, and the share of a step's time that the teacher takes: its own time
    for as many rows, measured alone (not with several workers).

    All are on one page under "custom scalars", and the run is one under "hparams". Use
    it beside `keras.callbacks.TensorBoard`, which writes the logs themselves.

    Args:
        log_dir: Folder for the logs; with keras-tuner each trial gets one inside. None
            takes that of the `keras.callbacks.TensorBoard` among the callbacks.
        validation_data: `(x, y)` arrays or a batched `tf.data.Dataset`.
        rows: How many rows of it are looked at.
        batch_size: For arrays.
        bins: Of the calibration error.
        teacher: The teacher, if it is not the distiller's: for one that is a cache.
        baseline: A student that was trained without a teacher; the gain by class is
            over it. None for the gain over the first epoch.
        attention: A pair of layers, of student and teacher, whose features
            `(B, H, W, C)` are shown as attention maps side by side.
        images: For how many rows of `validation_data` they are shown.
        hparams: Further values for the page of hyperparameters.

    Raises:
        ValueError: If an argument needs `validation_data` and there are none, or
            `log_dir` cannot be written; when training begins, if there is no folder or
            it cannot be written, the validation data have no rows, or the teacher
            cannot be run.

    Example:

    ```python
    board = kd.monitoring.DistillationBoard("logs", validation_data=(x, y))
    distiller.fit(x, y, epochs=2, callbacks=[board])
    ```
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        validation_data: Any = None,
        *,
        rows: int = 2000,
        batch_size: int = 128,
        bins: int = 15,
        teacher: Any = None,
        baseline: keras.Model | None = None,
        attention: tuple[str, str] | None = None,
        images: int = 4,
        hparams: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("rows", rows), ("bins", bins), ("images", images)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {value}")
        if validation_data is None:
            needing = {"teacher": teacher, "baseline": baseline, "attention": attention}
            for name, value in needing.items():
                if value is not None:
                    raise ValueError(f"`{name}` has no effect without validation_data.")
        if log_dir is not None:
            _check_folder(log_dir)
        self.log_dir = log_dir
        self.validation_data = validation_data
        self.rows = rows
        self.batch_size = batch_size
        self.bins = bins
        self.teacher = None if teacher is None else as_teacher(teacher)
        self.baseline = baseline
        self.attention = attention
        self.images = images
        self.hparams = hparams or {}
        self._companions: list[Any] = []
        self._writer: Any = None
        self._charts: list[Any] = []
        self._steps = StepClock()
        self._teacher_share: TeacherShare | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> DistillationBoard:
        # keras-tuner copies callbacks for each trial; data sets cannot be copied, and
        # models need not.
        return copy.copy(self)

    def with_companions(self, callbacks: list[Any]) -> None:
        """Tells the other callbacks, one of which may know the folder."""
        self._companions = callbacks

    # -- the callback ---------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        if not isinstance(self.model, BaseDistiller):
            raise TypeError(
                f"DistillationBoard needs a distiller. Received: {self.model!r}"
            )
        if not is_chief(self.model.distribute_strategy):
            return
        folder = os.path.join(self._folder(), "distillation")
        try:
            tf.io.gfile.makedirs(folder)
            self._writer = tf.summary.create_file_writer(folder)
        except tf.errors.OpError as error:
            raise ValueError(f"{folder!r} cannot be written: {error}") from error
        self._charts, self._teacher_share = [], None
        teacher = self._shown_teacher()
        if self.validation_data is not None:
            self._prepare(teacher)
        with self._writer.as_default(step=0):
            write_layout()
            self._write_hparams()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._steps.begin()
        if self._teacher_share is not None:
            self._teacher_share.begin()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._steps.tick(batch)

    def on_test_begin(self, logs: Any = None) -> None:
        self._training_ended()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._writer is None:
            return
        self._training_ended()
        with self._writer.as_default(step=epoch):
            for name, value in self._settings().items():
                tf.summary.scalar(name, value)
            for name, value in (logs or {}).items():
                _write_log(name, value)
            if self._steps.steps:
                tf.summary.scalar("steps_per_second", 1 / self._steps.seconds)
                if self._teacher_share is not None:
                    share = self._teacher_share.of(self._steps)
                    tf.summary.scalar("teacher_time_share", share)
            for chart in self._charts:
                chart.write()
        self._writer.flush()

    def _training_ended(self) -> None:
        if self._teacher_share is not None:
            self._teacher_share.note_rows()

    def on_train_end(self, logs: Any = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # -- where and with whom --------------------------------------------------------

    def _folder(self) -> str:
        if self.log_dir is not None:
            parts = [trial.trial_id for trial in self._trials()]
            return os.path.join(os.fspath(self.log_dir), *parts)
        for callback in self._companions:
            if type(callback).__name__ == "TensorBoard":
                return str(callback.log_dir)
        raise ValueError(
            "DistillationBoard has no folder: give `log_dir`, or add "
            "keras.callbacks.TensorBoard to the callbacks."
        )

    def _trials(self) -> list[Any]:
        """The trial of keras-tuner that this run is, if it is one."""
        return [c.trial for c in self._companions if hasattr(c, "trial")]

    def _shown_teacher(self) -> Any:
        """The teacher that is shown, or None."""
        model = self.model
        if self.validation_data is None or not hasattr(model, "teacher"):
            if self.teacher is not None or self.attention is not None:
                raise ValueError(
                    f"`teacher` and `attention` need a distiller with a teacher. "
                    f"Received: {type(model).__name__}"
                )
            return None
        teacher = self.teacher or model.teacher
        if isinstance(teacher, Cache):
            raise ValueError(
                "The distiller's teacher is a cache, which knows nothing of the "
                "validation data: give DistillationBoard(teacher=...) the live one."
            )
        return teacher

    def _prepare(self, teacher: Any) -> None:
        """What is written of the validation data; fails for what does not fit."""
        model = self.model
        rows = Rows(self.validation_data, self.rows, self.batch_size)
        self._charts.append(LogitCharts(model, teacher, rows, self.bins, self.baseline))
        if hasattr(model, "gate_weights"):
            self._charts.append(GateCharts(model, rows))
        if self.attention is not None:
            self._charts.append(
                AttentionChart(model, teacher, rows, self.attention, self.images)
            )
        # Only the teacher that trains takes part of a step's time.
        trains = teacher is not None and teacher is model.teacher
        if trains and not several_workers(model.distribute_strategy):
            run = in_graph(
                model,
                lambda x: ask(model, teacher, x, model._teacher_taps),
                jit_compile=bool(model.jit_compile),
            )
            clock = TeacherClock(run, rows.first()[0])
            self._teacher_share = TeacherShare(model, clock)

    # -- writing --------------------------------------------------------------------

    def _settings(self) -> dict[str, float]:
        """Everything that schedules may change."""
        model = self.model
        names = {"hard": "alpha", "soft": "beta"}
        settings = {
            names.get(term, f"weight/{term}"): number(weight)
            for term, weight in model.term_weights.items()
        }
        temperature = getattr(model, "temperature", None)
        if temperature is not None:
            settings["temperature"] = number(temperature)
        settings["learning_rate"] = number(model.optimizer.learning_rate)
        return settings

    def _write_hparams(self) -> None:
        from tensorboard.plugins.hparams import api

        # keras-tuner writes a trial's own.
        if any(isinstance(c, api.KerasCallback) for c in self._companions):
            return
        values = self._settings() | {"optimizer": type(self.model.optimizer).__name__}
        for trial in self._trials():
            values |= trial.hyperparameters.values
        api.hparams(values | self.hparams)


def _check_folder(path: str | os.PathLike[str]) -> None:
    """Raises ValueError where a folder cannot be made, and leaves no trace.

    keras-tuner would take an error in training for a failed trial, and try the next.
    """
    found = os.path.abspath(path)
    while not os.path.exists(found):
        found = os.path.dirname(found)
    if not os.path.isdir(found) or not os.access(found, os.W_OK | os.X_OK):
        raise ValueError(
            f"`log_dir` cannot be written: {found!r} is not a folder, or it may not be "
            f"written to. Received: {os.fspath(path)!r}"
        )


def _write_log(name: str, value: Any) -> None:
    """Logs that belong together get one chart; results are there for HParams."""
    if name.startswith("val_"):
        tf.summary.scalar(f"result/{name}", value)
    elif name.endswith("_gradient_share"):
        term = name.removesuffix("_gradient_share")
        tf.summary.scalar(f"gradient_share/{term}", value)
    elif name.startswith("gate_"):
        tf.summary.scalar(f"gate/{name}", value)
    elif _BRANCH.fullmatch(name):
        tf.summary.scalar(f"branch/{name}", value)
