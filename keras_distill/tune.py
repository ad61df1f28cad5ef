"""Searches temperature and weights for a small student, from the command line.

    python -m keras_distill.tune --dataset digits --trials 12

A teacher is trained first; it then runs once over the data in the whole search. The
folder (by default `runs/tune-<dataset>`) gets the table `trials.csv`, the figure
`trials.png`, the best student `student.keras`, and all that `--resume` needs: a search
that was stopped, with Ctrl-C or otherwise, goes on with the trial it was in.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import keras_tuner

from keras_distill import datasets, tuning
from keras_distill.files import read_json, whole, write_json

_WIDTHS = {"teacher": (32, 64, 64), "student": (4, 8)}
_BATCH = 64


class Search(keras_tuner.RandomSearch):
    """A random search that says after each trial how far it is."""

    def on_search_begin(self) -> None:
        self._began = time.perf_counter()
        self._already = len(self.oracle.end_order)

    def on_trial_end(self, trial: Any) -> None:
        super().on_trial_end(trial)
        print(self.progress(), flush=True)

    def progress(self) -> str:
        """One line: a bar, the time left, the best so far."""
        done, total = len(self.oracle.end_order), self.oracle.max_trials
        each = (time.perf_counter() - self._began) / max(done - self._already, 1)
        minutes, seconds = divmod(round(each * (total - done)), 60)
        filled = 20 * done // total
        line = f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{total} trials"
        line += f"  {minutes}:{seconds:02d} left"
        best = self.oracle.get_best_trials(1)
        if not best:
            return line
        values = best[0].hyperparameters.values.items()
        chosen = ", ".join(f"{name} {value:.3g}" for name, value in values)
        return (
            f"{line}  best {self.oracle.objective.name} {best[0].score:.4f} ({chosen})"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_distill.tune",
        description="Search temperature, alpha and beta for a small student.",
    )
    parser.add_argument("--dataset", choices=datasets.NAMES, default="digits")
    parser.add_argument("--trials", type=_count, default=12, help="default: 12")
    parser.add_argument("--epochs", type=_count, default=10, help="of each trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: runs/tune-<dataset>")
    parser.add_argument("--resume", action="store_true", help="go on with a search")
    options = parser.parse_args(arguments)
    folder = options.output or Path("runs") / f"tune-{options.dataset}"
    settings = {key: getattr(options, key) for key in ("dataset", "epochs", "seed")}
    problem = _prepare(folder, settings, options.resume)
    if problem:
        parser.error(problem)
    try:
        _search(folder, options.trials, **settings)
    except KeyboardInterrupt:
        print(f"\nStopped. Add --resume to go on with the search in {folder}.")
        return 130
    return 0


def _prepare(folder: Path, settings: dict[str, Any], resume: bool) -> str | None:
    """Notes the settings, or says what is wrong with the folder."""
    file = folder / "settings.json"
    if not resume:
        if file.exists():
            return f"there is a search in {folder}: add --resume, or give --output"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return None
    if not file.exists():
        return f"there is no search in {folder} to resume"
    before = read_json(file, "a search")
    if before != settings:
        return f"the search in {folder} has other settings: {before}"
    return None


def _search(folder: Path, trials: int, dataset: str, epochs: int, seed: int) -> None:
    keras.utils.set_random_seed(seed)
    data = datasets.load(dataset)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = tuning.DistillationHyperModel(
        lambda: _convnet(data, "student"),
        _teacher(folder, data, loss, epochs),
        cache=folder / "cache",
        optimizer=keras.optimizers.Adam(3e-3),
        loss=loss,
        metrics=["accuracy"],
    )
    tuner = Search(
        model,
        "val_accuracy",
        max_trials=trials,
        seed=seed,
        directory=folder,
        project_name="search",
    )
    tuner.search(
        *data.train,
        validation_data=data.validation,
        epochs=epochs,
        batch_size=_BATCH,
        verbose=0,
    )
    table = tuning.results(tuner)
    print(f"\n{table}")
    table.to_csv(folder / "trials.csv")
    if sum(row["status"] == "COMPLETED" for row in table) > 1:
        tuning.plot(tuner, folder / "trials.png")
    best = tuning.best_distiller(tuner)
    with whole(folder / "student.keras") as temporary:
        best.student.save(temporary)
    logs = best.evaluate(*data.test, verbose=0, return_dict=True)
    print(f"\nThe best student on the test part: accuracy {logs['accuracy']:.4f}")
    print(f"Written to {folder}: student.keras, trials.csv, trials.png")


def _teacher(folder: Path, data: datasets.Dataset, loss: Any, epochs: int) -> Any:
    """The teacher of this search: trained, or read if it was already."""
    path = folder / "teacher.keras"
    if path.exists():
        return keras.saving.load_model(path)
    teacher = _convnet(data, "teacher")
    teacher.compile("adam", loss, metrics=["accuracy"])
    teacher.fit(*data.train, epochs=2 * epochs, batch_size=_BATCH, verbose=0)
    logs = teacher.evaluate(*data.validation, verbose=0, return_dict=True)
    print(f"The teacher is trained: validation accuracy {logs['accuracy']:.4f}")
    with whole(path) as temporary:
        teacher.save(temporary)
    return teacher


def _convnet(data: datasets.Dataset, name: str) -> keras.Model:
    """Convolutions, all but the first of which halve the image; gives logits."""
    x = inputs = keras.Input(data.input_shape)
    for i, width in enumerate(_WIDTHS[name]):
        stride = 2 if i else 1
        x = keras.layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.ReLU()(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(data.num_classes)(x), name=name)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
