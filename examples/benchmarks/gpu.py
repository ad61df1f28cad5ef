"""Everything that needs GPUs to be seen, on 1 to all GPUs of this machine.

Where there is no GPU it says so, and runs on logical devices of the CPU.

* Equality: the weights of every distiller after ten steps on n devices, against one;
  where there is no GPU, also on two worker processes.
* Time: a distillation step on n devices beside its floor, a plain step of the student
  and the teacher's forward pass; in float32, mixed_float16, mixed_bfloat16, and
  compiled by XLA (with a strategy only on GPUs).

Each number of devices has a process of its own. Written to docs/results/gpu.json:

    python examples/benchmarks/gpu.py [--smoke] [--rounds 30]
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from crew import Crew, choose_strategy
from keras import layers
from measure import RESULTS, TRIALS, interleaved, median_ratio, parser, write
from models import wide_resnet

import keras_distill as kd

# Many models trace many functions, and TensorFlow takes that for a mistake.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

LOGICAL = 2  # devices where there is no GPU
STEPS, BATCH = 10, 64
LABELS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
GRIDS = {"grid1": "grid1", "grid2": "grid2"}


def network(width: int = 6) -> keras.Model:
    """Two grids, an embedding, and statistics over the global batch."""
    x = inputs = keras.Input((12, 12, 3))
    for index in (1, 2):
        x = layers.Conv2D(width, 3, index, "same", use_bias=False)(x)
        x = layers.BatchNormalization(synchronized=True)(x)
        x = layers.ReLU(name=f"grid{index}")(x)
    x = layers.GlobalAveragePooling2D(name="embedding")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x))


def with_links(student: keras.Model, teacher: keras.Model) -> keras.Model:
    """One loss of each kind."""
    pair = ["grid1", "grid2"]
    links = [
        kd.Link("grid2", "grid2", "mse", adapter="auto", name="hint"),
        kd.Link("grid1", "grid1", kd.losses.AttentionTransfer(), name="attention"),
        kd.Link(pair, pair, kd.losses.FlowOfProcedure(), name="flow"),
    ]
    soft = kd.losses.DecoupledKD()
    return kd.Distiller(student, teacher, soft_loss=soft, links=links)


def relational(student: keras.Model, teacher: keras.Model) -> keras.Model:
    """All relations between rows."""
    return kd.RelationalDistiller(
        student,
        teacher,
        embedding=("embedding", "embedding"),
        similarity_weight=1.0,
        probabilistic_weight=1.0,
        congruence_weight=1.0,
        soft_loss=kd.losses.DIST(),
    )


DISTILLERS: dict[str, Callable[[keras.Model, keras.Model], keras.Model]] = {
    "soft targets": kd.Distiller,
    "links": with_links,
    "relations": relational,
    "HintDistiller": lambda s, t: kd.HintDistiller(s, t, GRIDS, joint=True),
    "AttentionDistiller": lambda s, t: kd.AttentionDistiller(s, t, GRIDS),
    "FlowDistiller": lambda s, t: kd.FlowDistiller(s, t, GRIDS, method="svd"),
    "ActivationBoundaryDistiller": lambda s, t: kd.ActivationBoundaryDistiller(
        s, t, GRIDS
    ),
    "ContrastiveDistiller": lambda s, t: kd.ContrastiveDistiller(
        s,
        t,
        embedding=("embedding", "embedding"),
        num_samples=STEPS * BATCH,
        embedding_dim=8,
        negatives=32,
    ),
    "ReusedTeacherClassifier": lambda s, t: kd.ReusedTeacherClassifier(
        s, t, features=("grid2", "grid2")
    ),
    "InheritExplore": lambda s, t: kd.InheritExplore(s, t, features=("grid2", "grid2")),
    "TeacherFree": lambda s, t: kd.TeacherFree(s),
    "OneEnsemble": lambda s, t: kd.OneEnsemble.from_model(s, "grid1", num_branches=2),
    "BeYourOwnTeacher": lambda s, t: kd.BeYourOwnTeacher.from_model(s, ["grid1"]),
    "MutualLearning": lambda s, t: kd.MutualLearning([s, network(4)]),
}


def weights_after_steps(strategy: tf.distribute.Strategy, name: str) -> np.ndarray:
    """All trainable weights of a distiller after ten steps, in one vector."""
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x = random.normal(size=(STEPS * BATCH, 12, 12, 3)).astype("float32")
    y = random.integers(0, 10, len(x))
    y[: BATCH // 2] = -1  # no labels on one replica
    teacher = network()
    inputs = {"image": x, "kd_index": np.arange(len(x))}
    with strategy.scope():
        made = DISTILLERS[name](network(), teacher)
        for layer in made._flatten_layers():  # those of adapters too
            if isinstance(layer, layers.BatchNormalization):
                layer.synchronized = True
        several = strategy.num_replicas_in_sync > 1
        made.compile(
            keras.optimizers.SGD(0.01, momentum=0.9, global_clipnorm=1.0),
            LABELS,
            jit_compile=False,
            across_replicas=several and made.compares_rows,
        )
    x = inputs if isinstance(made, kd.ContrastiveDistiller) else x
    made.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    return np.concatenate([v.numpy().ravel() for v in made.trainable_variables])


def timed(
    strategy: tf.distribute.Strategy,
    sizes: Sequence[int],
    rounds: int,
    policies: Sequence[str],
    xla: bool,
) -> dict[str, list[float]]:
    """Seconds of each round, by case."""
    depth, deep, width, batch = sizes
    random = np.random.default_rng(0)
    batch *= strategy.num_replicas_in_sync
    x = random.random((batch, 32, 32, 3), "float32")
    data = tf.data.Dataset.from_tensors((x, random.integers(0, 10, batch)))
    data = data.cache().repeat()

    def step(distil: bool, policy: str = "float32", jit: bool = False) -> Callable:
        keras.config.set_dtype_policy(policy)
        with strategy.scope():
            model = wide_resnet(depth, width)
            if distil:
                model = kd.Distiller(model, wide_resnet(deep, width))
            optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
            model.compile(optimizer, LABELS, jit_compile=jit)
        keras.config.set_dtype_policy("float32")
        logs = model.fit(data, steps_per_epoch=1, shuffle=False, verbose=0).history
        if not np.isfinite(logs["loss"][0]):
            raise RuntimeError(f"The loss in {policy} is {logs['loss'][0]}.")
        iterator = iter(strategy.experimental_distribute_dataset(data))

        def run() -> None:
            for value in model.train_function(iterator).values():
                keras.ops.convert_to_numpy(value)  # waits for the end

        return run

    with strategy.scope():
        teacher = wide_resnet(deep, width)
    iterator = iter(strategy.experimental_distribute_dataset(data))

    @tf.function
    def forward() -> Any:
        def on_replica(batch: Any) -> Any:
            return tf.reduce_sum(teacher(batch[0], training=False))

        sums = strategy.run(on_replica, args=(next(iterator),))
        return strategy.reduce("SUM", sums, axis=None)

    cases = {
        "student step": step(False),
        "teacher forward": lambda: forward().numpy(),
        "distillation": step(True),
        **{f"distillation, {policy}": step(True, policy) for policy in policies},
    }
    if xla:
        cases["distillation, XLA"] = step(True, jit=True)
    times = interleaved(cases, rounds)
    return {name: clocks["wall"] for name, clocks in times.items()}


def count_gpus(folder: Path) -> int:
    """In a process of its own: one that has seen a GPU must not fork."""

    def count(_: int) -> None:
        found = len(tf.config.list_physical_devices("GPU"))
        (folder / "gpus").write_text(str(found))

    with Crew(1, count, folder / "errors") as crew:
        crew.wait()
    return int((folder / "gpus").read_text())


def main() -> None:
    """Measures and writes."""
    options = parser("What needs GPUs to be seen.", "gpu").parse_args()
    names, rounds, sizes = list(DISTILLERS), options.rounds or 30, (16, 40, 2, 64)
    policies = [] if options.smoke else ["mixed_float16", "mixed_bfloat16"]
    weights: dict[str, dict[str, np.ndarray]] = {}
    times: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gpus = count_gpus(folder)
        what = f"{gpus} GPUs" if gpus else f"no GPU, {LOGICAL} logical devices"
        print(f"Found: {what}.")
        if options.smoke:
            names, rounds, sizes = names[:1], options.rounds or 1, (10, 10, 1, 4)
        elif not gpus:
            rounds, sizes = options.rounds or 10, (10, 16, 1, 16)
        for devices in range(1, (gpus or LOGICAL) + 1):

            def work(_: int, devices: int = devices) -> None:
                strategy = choose_strategy(devices, bool(gpus))
                tf.config.experimental.enable_tensor_float_32_execution(False)
                found = {n: weights_after_steps(strategy, n) for n in names}
                np.savez(folder / f"{devices}.npz", **found)
                tf.config.experimental.enable_tensor_float_32_execution(True)
                xla = not options.smoke and (devices == 1 or gpus > 0)
                seconds = timed(strategy, sizes, rounds, policies, xla)
                (folder / f"{devices}.json").write_text(json.dumps(seconds))

            with Crew(1, work, folder / "errors") as crew:
                crew.wait()
            key = f"{devices} device{'s' * (devices > 1)}"
            weights[key] = _loaded(folder / f"{devices}.npz")
            times[key] = json.loads((folder / f"{devices}.json").read_text())
        if not gpus and not options.smoke:

            def learn(index: int) -> None:
                strategy = choose_strategy(1)
                found = {n: weights_after_steps(strategy, n) for n in names}
                np.savez(folder / f"worker_{index}.npz", **found)

            with Crew(2, learn, folder / "errors") as crew:
                crew.wait()
            weights["2 workers"] = _loaded(folder / "worker_0.npz")

    one = weights.pop("1 device")
    result: dict[str, Any] = {
        "setting": {
            "devices": what,
            "steps and global batch of the equality": f"{STEPS} x {BATCH}",
            "student, teacher": f"WRN-{sizes[0]}-{sizes[2]}, WRN-{sizes[1]}-{sizes[2]}",
            "rows per device in the timing": sizes[3],
            "rounds": rounds,
        },
        "‖Δw‖ / ‖w‖ against one device (at most 1e-5)": {
            case: {
                key: float(
                    np.linalg.norm(found[case] - one[case]) / np.linalg.norm(one[case])
                )
                for key, found in weights.items()
            }
            for case in names
        },
        "median milliseconds": {
            case: {
                key: 1e3 * statistics.median(seconds[case])
                for key, seconds in times.items()
                if case in seconds
            }
            for case in times["1 device"]
        },
        "over student step + teacher forward": {
            case: {
                key: median_ratio(seconds[case], _floor(seconds))
                for key, seconds in times.items()
                if case in seconds
            }
            for case in times["1 device"]
            if case.startswith("distillation")
        },
    }
    for title, table in list(result.items())[1:]:
        print(title, *(f"  {case:<32} {row}" for case, row in table.items()), sep="\n")
    default = (TRIALS if options.smoke else RESULTS) / "gpu.json"
    write(options.out or default, "Devices: equality and time", result)
    worst = max(v for row in list(result.values())[1].values() for v in row.values())
    if worst > 1e-5:
        raise SystemExit("The devices do not learn the same.")


def _loaded(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def _floor(seconds: dict[str, list[float]]) -> list[float]:
    pairs = zip(seconds["student step"], seconds["teacher forward"], strict=True)
    return [step + forward for step, forward in pairs]


if __name__ == "__main__":
    main()
