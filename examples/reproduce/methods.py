"""Every method with a teacher, on one pair of networks.

CIFAR-10 averaged to 16 x 16. The teacher, a ResNet-20, learns from 20,000 images; the
student, a ResNet-8 of the same width, has 5,000 of these. Each method trains it from
the same initial weights and with the same batches: SGD with Nesterov momentum 0.9, rate
0.05 falling to 0 as a cosine, weight decay 5e-4, batches of 128, 15 epochs, mirrored
images. Accuracy is that of the last epoch on the 10,000 test images; time per step is
that of the processor's cores in the epochs after the first.

Weights are those of the method's paper or official code for its smallest networks.
Methods with a first stage get an eighth of the epochs for it beforehand. What a paper
does besides its loss (a second augmented view, a warm-up of 20 epochs) is left out; all
soft targets have the factor T², also those of FitNets; CRD contrasts with 1024 images
instead of 16384, of which there are fewer here. The papers' weights are for images of
32 x 32: what is a mean over a grid is the larger, the smaller the grid. The time of a
step leaves a first stage out.

With --tuned each method is run again with weights that `kd.tuning` found: the paper's
times 0.1, 0.3, 1, 3 and 10, each in a trial half as long as a run, compared on 5,000
validation images.
Every run is written as soon as it is there, to docs/results/methods.json: the same
command goes on where a run was interrupted.

    TFDS_DATA_DIR=... python examples/reproduce/methods.py [--tuned] [--smoke]
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np
import tensorflow as tf
from experiment import Experiment, Row, means, parser
from models import resnet

import keras_distill as kd

# Many models trace many functions, and TensorFlow takes that for a mistake.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

BATCH = 128
PER_CLASS = {"teacher": 2000, "student": 500}  # training images
STAGES = ("stage1", "stage2", "stage3")
ACCURACY, COST = "accuracy %", "CPU ms per step"
PLAIN, TEACHER, TUNED = "labels alone", "teacher", ", tuned"
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # on the weights, in the search

Arrays = tuple[np.ndarray, np.ndarray]
Make = Callable[[keras.Model, keras.Model, float], kd.BaseDistiller]


# -- the methods ---------------------------------------------------------------------


def answers() -> dict[str, Make]:
    """Methods that compare logits: see `inner`."""
    losses = kd.losses

    def compared(loss: Any, alpha: float, beta: float) -> Make:
        return lambda student, teacher, factor: kd.Distiller(
            student, teacher, soft_loss=loss, alpha=alpha, beta=beta * factor
        )

    return {
        "soft targets (KD)": compared(losses.SoftTarget(4.0), 0.1, 0.9),
        "logit regression": compared(losses.LogitMSE(), 0.0, 1.0),
        "decoupled (DKD)": compared(losses.DecoupledKD(beta=2.0), 1.0, 1.0),
        "correlation (DIST)": compared(losses.DIST(temperature=4.0), 1.0, 2.0),
        "several levels (MLLD)": compared(losses.MultiLevelLogit(), 0.1, 0.9),
        "standardized (LS-KD)": compared(
            losses.SoftTarget(2.0, standardize=True), 0.1, 9.0
        ),
    }


def inner(rows: int, paraphraser: Any) -> dict[str, Make]:
    """Methods with links, adapters or stages of their own.

    Args:
        rows: Number of training images.
        paraphraser: One that is trained.

    Returns:
        Functions of student, teacher, and a factor on the paper's weights.
    """
    losses, adapters, link = kd.losses, kd.adapters, kd.Link

    def linked(links: Callable[[float], list[kd.Link]]) -> Make:
        """Labels, and the links that a function makes of the factor."""
        return lambda student, teacher, factor: kd.Distiller(
            student, teacher, alpha=1.0, soft_loss=None, links=links(factor)
        )

    def preset(cls: Any, weights: dict[str, float], *args: Any, **fixed: Any) -> Make:
        def make(student: Any, teacher: Any, factor: float) -> kd.BaseDistiller:
            scaled = {key: factor * value for key, value in weights.items()}
            return cls(student, teacher, *args, **fixed, **scaled)

        return make

    def related(*layers: str, **weights: float) -> Make:
        nothing = {"distance_weight": 0.0, "angle_weight": 0.0}
        return preset(kd.RelationalDistiller, nothing | weights, embedding=layers)

    def boundaries(student: Any, teacher: Any, factor: float) -> kd.BaseDistiller:
        layers = {before(student, s): before(teacher, s) for s in STAGES}
        return kd.ActivationBoundaryDistiller(
            student, teacher, layers, weight=0.003 * factor
        )

    def overhaul(student: Any, teacher: Any, factor: float) -> kd.BaseDistiller:
        def links(factor: float) -> list[kd.Link]:
            return [
                link(
                    before(student, stage),
                    before(teacher, stage),
                    losses.MarginReLU(adapters.margins(before(teacher, stage, 2))),
                    weight=1e-3 * 2.0 ** (i - 2) * factor,
                    adapter=adapters.Connector(),
                )
                for i, stage in enumerate(STAGES)
            ]

        return linked(links)(student, teacher, factor)

    def inherit_explore(student: Any, teacher: Any, factor: float) -> kd.BaseDistiller:
        weights = {"inherit_weight": 500.0, "explore_weight": 500.0}
        make = preset(
            kd.InheritExplore,
            weights,
            features=("stage3", "stage3"),
            paraphraser=paraphraser,
        )
        return make(student, teacher, factor)

    def curriculum(student: Any, teacher: Any, factor: float) -> kd.BaseDistiller:
        temperature = kd.LearnedTemperature()
        return kd.Distiller(
            student, teacher, temperature=temperature, alpha=0.1, beta=0.9 * factor
        )

    stages = {stage: stage for stage in STAGES}
    pooled = ("embedding", "embedding")
    return {
        "learned temperature (CTKD)": curriculum,
        "hint, two stages (FitNets)": preset(
            kd.HintDistiller, {"weight": 1.0}, {"stage2": "stage2"}
        ),
        "hint, one stage": linked(
            lambda f: [link("stage2", "stage2", losses.Hint(), weight=100.0 * f)]
        ),
        "attention (AT)": preset(kd.AttentionDistiller, {"weight": 1000.0}, stages),
        "boundaries (AB)": boundaries,
        "overhaul (OFD)": overhaul,
        "selectivity (NST)": linked(
            lambda f: [
                link(s, s, losses.NeuronSelectivity(), weight=50.0 * f) for s in STAGES
            ]
        ),
        "information (VID)": linked(
            lambda f: [
                link(
                    *(s, s, losses.VariationalInformation()),
                    weight=f,
                    adapter=adapters.VariationalHead(),
                )
                for s in STAGES
            ]
        ),
        "factors (FT)": linked(
            lambda f: [
                link(
                    *("stage3", "stage3", losses.FactorTransfer()),
                    weight=500.0 * f,
                    adapter=adapters.Translator(),
                    teacher_adapter=paraphraser,
                )
            ]
        ),
        "review (ReviewKD)": linked(
            lambda f: [
                link(
                    *([*STAGES], [*STAGES], losses.HierarchicalContext()),
                    weight=f,
                    adapter=adapters.Fusion(),
                    name="review",
                )
            ]
        ),
        "masked generation (MGD)": linked(
            lambda f: [
                link(
                    *("stage3", "stage3", losses.Hint(variant="paper")),
                    weight=2 * 7e-5 * f,  # the loss holds a half
                    adapter=adapters.MaskedGeneration(),
                )
            ]
        ),
        # With the paper's weight, 1, stage one ends in NaN at this rate; this one is
        # of the code by the authors of KD-SVD.
        "flow (FSP)": preset(kd.FlowDistiller, {"weight": 5e-4}, stages),
        "singular vectors (KD-SVD)": preset(
            kd.FlowDistiller, {"weight": 1.0}, stages, method="svd"
        ),
        "relations (RKD)": related(*pooled, distance_weight=25.0, angle_weight=50.0),
        "similarities (SP)": related("stage3", "stage3", similarity_weight=3000.0),
        "probabilities (PKT)": related(*pooled, probabilistic_weight=30000.0),
        "congruence (CC)": related(*pooled, congruence_weight=0.02),
        "contrast (CRD)": preset(
            kd.ContrastiveDistiller,
            {"weight": 0.8},
            embedding=pooled,
            num_samples=rows,
            negatives=min(1024, rows - 1),
        ),
        "teacher's classifier (SimKD)": preset(
            kd.ReusedTeacherClassifier, {"weight": 1.0}, features=("stage3", "stage3")
        ),
        "inherit, explore (IE-KD)": inherit_explore,
    }


def before(network: Any, stage: str, steps: int = 1) -> keras.Layer:
    """A stage's sum before its ReLU; with 2 steps the normalization before that."""
    model = getattr(network, "model", network)  # a search wraps its teacher
    names = [layer.name for layer in model.layers]
    return model.layers[names.index(stage) - steps]


# -- data and networks ---------------------------------------------------------------


def images(cache: Path) -> dict[str, Arrays]:
    """Images of 16 x 16 with labels: for the teacher, the student, and the choices.

    They are kept in a file, which also serves a machine without CIFAR-10.
    """
    if not cache.exists():
        data = kd.datasets.load("cifar10")
        labels = data.train[1]
        found = {"validation": data.validation, "test": data.test}
        for name, count in PER_CLASS.items():
            rows = [np.flatnonzero(labels == c)[:count] for c in range(10)]
            few = np.sort(np.concatenate(rows))
            found[name] = (data.train[0][few], labels[few])
        arrays = {}
        for name, (x, y) in found.items():
            pooled = x.reshape(len(x), 16, 2, 16, 2, 3).mean((2, 4))
            arrays |= {f"{name}_x": np.round(255 * pooled).astype("uint8")}
            arrays |= {f"{name}_y": y}
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, **arrays)
    with np.load(cache) as file:
        return {
            name: (file[f"{name}_x"].astype("float32") / 127.5 - 1, file[f"{name}_y"])
            for name in ("teacher", "student", "validation", "test")
        }


def batches(data: Arrays, seed: int) -> tf.data.Dataset:
    """Mirrored images, with their numbers, in an order of seed and epoch alone."""
    x, y = (tf.constant(part) for part in data)
    last = len(data[1]) - 1

    def make(key: tf.Tensor) -> tf.data.Dataset:
        def batch(rows: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
            rows = tf.random.experimental.index_shuffle(rows, key, last)
            coins = tf.random.stateless_uniform(tf.shape(rows), key)
            image = tf.gather(x, rows)
            mirrored = tf.reverse(image, [2])
            image = tf.where(coins[:, None, None, None] < 0.5, mirrored, image)
            return {"image": image, "kd_index": rows}, tf.gather(y, rows)

        return tf.data.Dataset.range(last + 1).batch(BATCH).map(batch)

    return kd.data.per_epoch(make, seed=seed).prefetch(2)


def options(steps: int) -> dict[str, Any]:
    """Arguments of `compile`, new for each model."""
    rate = keras.optimizers.schedules.CosineDecay(0.05, steps)
    return {
        "optimizer": keras.optimizers.SGD(
            rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
    }


class Clock(keras.callbacks.Callback):
    """Seconds that the processor's cores spent on each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start = time.process_time()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(time.process_time() - self._start)


# -- the runs ------------------------------------------------------------------------


class Space(kd.tuning.DistillationHyperModel):
    """The search for the factor on the weights of a method's paper."""

    def __init__(self, make: Make, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, soft_loss=None, alpha=1.0, **kwargs)
        self._make = make

    def build(self, hp: Any) -> kd.BaseDistiller:
        factor = hp.Choice("factor", FACTORS, default=1.0)
        self.distiller = lambda student, teacher, **_: self._make(
            student, teacher, factor
        )
        return super().build(hp)


class Comparison:
    """One teacher and what the methods make of it.

    Args:
        data: What `images` returns.
        epochs: Of a student's run.
        folder: Where the teacher and the searches are kept.
        depths: Of teacher and student.
        trials: Of each search.
    """

    def __init__(
        self,
        data: dict[str, Arrays],
        epochs: int,
        folder: Path,
        depths: tuple[int, int],
        trials: int,
    ) -> None:
        self._data, self._epochs, self._folder = data, epochs, folder
        self._depths, self._trials = depths, trials
        self._steps = -(-len(data["student"][1]) // BATCH)
        self.teacher = self._taught()
        rows = len(data["student"][1])
        self._methods = answers() | inner(rows, self._trained_paraphraser())
        self.names = list(self._methods)

    def _network(self, depth: int, seed: int) -> keras.Model:
        shape = self._data["test"][0].shape[1:]
        return resnet(depth, 16, input_shape=shape, seed=seed)

    def _taught(self) -> keras.Model:
        path = self._folder / "teacher.keras"
        if path.exists():
            return keras.saving.load_model(path)
        keras.utils.set_random_seed(0)
        model = self._network(self._depths[0], 99)
        data = self._data["teacher"]
        steps = self._epochs * -(-len(data[1]) // BATCH)
        trainer = kd.BaseDistiller(model).compile(**options(steps))
        trainer.fit(batches(data, 99), epochs=self._epochs, verbose=0)
        model.save(path)
        return model

    def _trained_paraphraser(self) -> Any:
        """The factor of the teacher's last stage: the same for all runs."""
        path = self._folder / "paraphraser.keras"
        if path.exists():
            return keras.saving.load_model(path).layers[-1]
        keras.utils.set_random_seed(77)
        paraphraser = kd.adapters.Paraphraser()
        x, epochs = self._data["student"][0], max(1, self._epochs // 3)
        paraphraser.pretrain(
            self.teacher, "stage3", x, epochs=epochs, batch_size=BATCH, verbose=0
        )
        factor = keras.Input(self.teacher.get_layer("stage3").output.shape[1:])
        keras.Model(factor, paraphraser(factor)).save(path)
        return paraphraser

    def accuracy(self, model: keras.Model) -> float:
        """Of a compiled model on the test images."""
        x, y = self._data["test"]
        return 100 * model.evaluate(x, y, 500, verbose=0, return_dict=True)["accuracy"]

    def run(self, name: str, seed: int) -> Row:
        """Trains a student with the paper's weights."""
        keras.utils.set_random_seed(seed)
        student = self._network(self._depths[1], seed)
        if name == PLAIN:
            distiller = kd.BaseDistiller(student)
        else:
            distiller = self._methods[name](student, self.teacher, 1.0)
        distiller.compile(**options(self._epochs * self._steps))
        return self._train(distiller, seed)

    def run_tuned(self, name: str, seed: int) -> Row:
        """Trains a student with the weights of the best trial."""
        tuner = self._searched(name)
        best = tuner.get_best_hyperparameters(1)[0]
        keras.utils.set_random_seed(seed)
        space = self._space(name, seed, self._epochs)
        chosen = {k: round(v, 3) for k, v in best.values.items()}
        return self._train(space.build(best), seed) | {"chosen": chosen}

    def _train(self, distiller: kd.BaseDistiller, seed: int) -> Row:
        clock = Clock()
        data = batches(self._data["student"], seed)
        first_stage(distiller, data, self._epochs)
        distiller.fit(data, epochs=self._epochs, verbose=0, callbacks=[clock])
        seconds = statistics.median(clock.seconds[1:] or clock.seconds)
        cost = 1e3 * seconds / self._steps
        return {ACCURACY: self.accuracy(distiller), COST: cost}

    def _space(self, name: str, seed: int, epochs: int) -> Space:
        return Space(
            self._methods[name],
            build_student=lambda: self._network(self._depths[1], seed),
            teacher=self.teacher,
            optimizer=lambda: options(epochs * self._steps)["optimizer"],
            loss=options(1)["loss"],
            metrics=["accuracy"],
        )

    def _searched(self, name: str) -> keras_tuner.Tuner:
        """The search of a method; a finished one is read from the disk."""
        epochs, seed = max(1, self._epochs // 2), 1000
        keras.utils.set_random_seed(seed)
        space = Staged(self._space(name, seed, epochs), epochs)

        def grid(overwrite: bool) -> keras_tuner.Tuner:
            return keras_tuner.GridSearch(
                space,
                "val_accuracy",
                max_trials=self._trials,
                seed=seed,
                overwrite=overwrite,
                directory=self._folder / "searches",
                project_name="".join(c for c in name if c.isalnum()),
            )

        tuner = grid(False)
        if len(tuner.oracle.end_order) < self._trials:
            tuner = grid(True)  # keras-tuner cannot go on with an interrupted grid
        tuner.search(
            batches(self._data["student"], seed),
            validation_data=self._data["validation"],
            validation_batch_size=500,
            epochs=epochs,
            verbose=0,
        )
        return tuner


class Staged(keras_tuner.HyperModel):
    """A search in which methods with a first stage have it in every trial."""

    def __init__(self, space: Any, epochs: int) -> None:
        super().__init__()
        self._space, self._epochs = space, epochs

    def build(self, hp: Any) -> kd.BaseDistiller:
        return self._space.build(hp)

    def fit(self, hp: Any, model: Any, data: Any, **fit: Any) -> Any:
        first_stage(model, data, self._epochs)
        return self._space.fit(hp, model, data, **fit)


def first_stage(distiller: Any, data: tf.data.Dataset, epochs: int) -> None:
    """An eighth of the epochs for hints, if the method has a stage for them."""
    if hasattr(distiller, "fit_hints") and not distiller.joint:
        distiller.fit_hints(data, epochs=-(-epochs // 8), verbose=0)


# -- what came out -------------------------------------------------------------------


def summary(rows: list[Row]) -> dict[str, Any]:
    """The table: the largest gain first, the cost of a step beside it."""
    table = means(rows, ACCURACY, PLAIN)
    costs = {
        name: statistics.median(r[COST] for r in rows if r["run"] == name)
        for name in table
        if name != TEACHER
    }
    for name, cost in costs.items():
        table[name][COST] = cost
        if PLAIN in costs:
            table[name]["times the plain step"] = cost / costs[PLAIN]
        chosen = [r["chosen"] for r in rows if r["run"] == name and "chosen" in r]
        if chosen:
            values = (f"{key} {value:g}" for key, value in chosen[0].items())
            table[name]["chosen"] = ", ".join(values)
    table.get(TEACHER, {}).pop("difference", None)  # of one run, with other data
    table.get(TEACHER, {}).pop("± (95 %)", None)
    order = sorted(table, key=lambda name: -(table[name].get("difference") or 0))
    fixed = [name for name in (TEACHER, PLAIN) if name in table]
    return {name: table[name] for name in [*fixed, *order]}


def plot(rows: list[Row], path: Path) -> None:
    """Gains of all runs, and what a step of each method costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = {n: v for n, v in summary(rows).items() if v.get("difference") is not None}
    plain = {r["seed"]: r[ACCURACY] for r in rows if r["run"] == PLAIN}
    names = [name for name in table if not name.endswith(TUNED)]
    size = (9, 0.32 * len(names) + 1.4)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=size, sharey=True, width_ratios=(3, 1), layout="constrained"
    )
    for height, name in enumerate(names):
        for mode, color, shift in (
            ("", "tab:blue", -0.12),
            (TUNED, "tab:orange", 0.12),
        ):
            gains = [
                row[ACCURACY] - plain[row["seed"]]
                for row in rows
                if row["run"] == name + mode and row["seed"] in plain
            ]
            if gains:
                y, mean = height + shift, statistics.mean(gains)
                left.plot(gains, [y] * len(gains), "o", c=color, alpha=0.5, mec="none")
                left.plot([mean, mean], [y - 0.2, y + 0.2], color=color, lw=2)
        right.barh(height, table[name]["times the plain step"], color="tab:gray")
    left.plot([], [], "o-", color="tab:blue", label="the paper's weights")
    if any(row["run"].endswith(TUNED) for row in rows):
        left.plot([], [], "o-", color="tab:orange", label="tuned")
    left.legend(loc="upper left")
    left.axvline(0, color="gray", lw=1)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("test accuracy, points above labels alone (same seed)")
    right.set_xlabel("a step's cost,\nin plain steps")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Runs what is missing in the result file."""
    arguments = parser(__doc__.splitlines()[0], "methods", seeds=3)
    arguments.add_argument("--epochs", type=int, default=15)
    arguments.add_argument("--tuned", action="store_true", help="search for weights")
    arguments.add_argument("--methods", nargs="+", help="only these, by their names")
    chosen = arguments.parse_args()
    epochs, seeds, only = chosen.epochs, chosen.seeds, chosen.methods
    depths, trials = (20, 8), 5
    if chosen.smoke:
        epochs, seeds, depths, trials = 1, 1, (8, 8), 1
        only = only or ["soft targets (KD)", "attention (AT)"]
        random = np.random.default_rng(0)
        data = {
            name: (random.random((32, 8, 8, 3), "float32"), random.integers(0, 10, 32))
            for name in ("teacher", "student", "validation", "test")
        }
    else:
        data = images(chosen.runs / "images.npz")
    experiment = Experiment(
        chosen,
        "methods",
        "Every method with a teacher, on one pair of networks",
        {
            "teacher": f"ResNet-{depths[0]}, 16 wide, {len(data['teacher'][1])} images",
            "student": f"ResNet-{depths[1]}, 16 wide, {len(data['student'][1])} images",
            "images": "CIFAR-10, averaged to 16 x 16 x 3",
            "epochs": epochs,
            "tuned": f"{trials} trials of {max(1, epochs // 2)} epochs for each method",
            "command": "python examples/reproduce/methods.py [--tuned]",
        },
        summary,
    )
    comparison = Comparison(data, epochs, experiment.folder, depths, trials)
    if not experiment.has(TEACHER, 0):
        model = comparison.teacher
        model.compile(**options(1))
        experiment.add(TEACHER, 0, [{ACCURACY: comparison.accuracy(model)}])
    names = only or comparison.names
    for seed in range(seeds):
        for name in [PLAIN, *names]:
            if not experiment.has(name, seed):
                experiment.add(name, seed, [comparison.run(name, seed)])
    if chosen.tuned or chosen.smoke:
        for seed in range(seeds):
            for name in names:
                if not experiment.has(name + TUNED, seed):
                    found = comparison.run_tuned(name, seed)
                    experiment.add(name + TUNED, seed, [found])
    plot(experiment.rows, experiment.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
