"""What distribution and backups cost, and how a step grows with teacher and classes.

On the same cores, with the same global batch, one step of `fit` each in turn:

* one device, two logical devices, two workers; the last two also without the sum that
  Keras's optimizer takes of gradients that are summed already;
* the bytes that one step sums over the replicas (of one replica, as TensorFlow's graph
  has them), and those that workers send over the loopback interface;
* the seconds of a backup, for models of three sizes;
* one device: teachers of several widths, and a head with 10 to 10 000 classes.

Written to docs/results/distribution.json:

    python examples/benchmarks/distribution.py [--smoke] [--rounds 15]
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from crew import Crew, choose_strategy
from measure import RESULTS, TRIALS, median_ratio, parser, write
from models import resnet

import keras_distill as kd

LABELS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
# Name: workers, devices of each, whether the optimizer's own sum is left out.
LAYOUTS = {
    "1 device": (1, 1, False),
    "2 logical devices": (1, 2, False),
    "2 logical devices, summed once": (1, 2, True),
    "2 workers": (2, 1, False),
    "2 workers, summed once": (2, 1, True),
}


class Paused(keras.callbacks.Callback):
    """Trains as many batches as it is told, and says when they are done."""

    def __init__(self, pipe: Connection, told: dict[str, Any]) -> None:
        super().__init__()
        self.pipe = pipe
        self.told = told
        self.left = 2  # the first batches are not measured

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Waits where nothing is left to do."""
        self.left -= 1
        if not self.left:
            self.pipe.send(self.told)
            self.left = self.pipe.recv()


def count_sums(devices: int) -> dict[str, int]:
    """From now on notes the bytes that a traced step sums over the replicas."""
    told = {"summed": 0}
    by_graph: dict[Any, int] = defaultdict(int)
    stock = tf.distribute.ReplicaContext.all_reduce

    def noted(context: Any, operation: Any, value: Any, *args: Any, **kw: Any) -> Any:
        graph = tf.compat.v1.get_default_graph()
        for tensor in (
            tf.nest.flatten(value) if context.num_replicas_in_sync > 1 else ()
        ):
            by_graph[graph] += tensor.dtype.size * (tensor.shape.num_elements() or 0)
        told["summed"] = max(by_graph.values(), default=0) // devices
        return stock(context, operation, value, *args, **kw)

    tf.distribute.ReplicaContext.all_reduce = noted
    return told


def train(layout: str, sizes: dict[str, int], pipe: Connection) -> None:
    """One worker's endless run."""
    _, devices, once = LAYOUTS[layout]
    strategy = choose_strategy(devices)
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x = random.random((sizes["batch"], 32, 32, 3), "float32")
    data = tf.data.Dataset.from_tensors((x, random.integers(0, 10, len(x))))
    told = count_sums(devices)
    if once:
        count = strategy.num_replicas_in_sync
        keras.optimizers.SGD._all_reduce_sum_gradients = lambda self, pairs: [
            (gradient * count, variable) for gradient, variable in pairs
        ]
    with strategy.scope():
        student = resnet(sizes["depth"], sizes["width"])
        distiller = kd.Distiller(student, resnet(sizes["depth"], 2 * sizes["width"]))
        distiller.compile(keras.optimizers.SGD(0.01, momentum=0.9), LABELS)
    told["weights"] = 4 * int(sum(np.prod(v.shape) for v in student.trainable_weights))
    rows = data.cache().repeat()
    distiller.fit(
        rows, steps_per_epoch=10**9, verbose=0, callbacks=[Paused(pipe, told)]
    )


def loopback() -> int:
    """Bytes that came in over the loopback interface so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    return 0


def layouts(
    folder: Path, chosen: list[str], sizes: dict[str, int], rounds: int
) -> dict[str, Any]:
    """Layouts side by side; one of them trains at a time."""
    crews, pipes, told = [], {}, {}
    seconds = defaultdict(list)
    moved = defaultdict(list)
    try:
        for layout in chosen:
            workers = LAYOUTS[layout][0]
            ends = [Pipe() for _ in range(workers)]

            def work(index: int, layout: str = layout, ends: list = ends) -> None:
                train(layout, sizes, ends[index][1])

            crews.append(Crew(workers, work, folder / "errors"))
            pipes[layout] = [mine for mine, _ in ends]
            told[layout] = _answers(crews[-1], pipes[layout])[0]
        for _ in range(rounds):
            for crew, (layout, own) in zip(crews, pipes.items(), strict=True):
                start, before = time.perf_counter(), loopback()
                for pipe in own:
                    pipe.send(sizes["steps"])
                _answers(crew, own)
                passed = time.perf_counter() - start
                seconds[layout].append(passed / sizes["steps"])
                moved[layout].append((loopback() - before) / sizes["steps"])
    finally:
        for crew in crews:
            crew.__exit__()
    return {
        layout: {
            "milliseconds": 1e3 * statistics.median(seconds[layout]),
            "over 1 device": median_ratio(seconds[layout], seconds["1 device"]),
            "bytes of the weights": told[layout]["weights"],
            "bytes summed": told[layout]["summed"],
            "bytes over loopback": statistics.median(moved[layout])
            if LAYOUTS[layout][0] > 1
            else None,
        }
        for layout in chosen
    }


def _answers(crew: Crew, pipes: list[Connection]) -> list[Any]:
    for pipe in pipes:
        while not pipe.poll(0.5):
            crew.check()
    return [pipe.recv() for pipe in pipes]


class Timed(kd.callbacks.Backup):
    """Notes how long it took at the end of each epoch."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.seconds: list[float] = []

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes, and measures."""
        start = time.perf_counter()
        super().on_epoch_end(epoch, logs)
        self.seconds.append(time.perf_counter() - start)


def backups(folder: Path, widths: list[int], epochs: int) -> dict[str, Any]:
    """Seconds of a backup, and what share of an epoch of a minute they are."""
    found = {}
    for width in widths:
        inputs = keras.Input((64,))
        hidden = keras.layers.Dense(width)(keras.layers.Dense(width)(inputs))
        student = keras.Model(inputs, keras.layers.Dense(10)(hidden))
        distiller = kd.Distiller(student, student_like(10))
        distiller.compile("adam", LABELS, run_eagerly=True)
        backup = Timed(folder / "backup")
        x = np.zeros((2, 64), "float32")
        distiller.fit(
            x, np.zeros(2), epochs=epochs, verbose=0, callbacks=[backup], shuffle=False
        )
        seconds = statistics.median(backup.seconds)
        found[f"{student.count_params():,} parameters"] = {
            "megabytes": backup.path.stat().st_size / 1e6,
            "seconds": seconds,
            "of an epoch of a minute": f"{seconds / 60:.2%}",
        }
        backup.path.unlink()
        backup.previous.unlink(missing_ok=True)
    return found


def student_like(classes: int, width: int = 8) -> keras.Model:
    """A teacher for vectors."""
    inputs = keras.Input((64,))
    hidden = keras.layers.Dense(width, "relu")(inputs)
    return keras.Model(inputs, keras.layers.Dense(classes)(hidden))


def growth(
    sizes: dict[str, int], factors: list[int], heads: list[int], rounds: int
) -> dict[str, Any]:
    """Milliseconds of a step on one device, beside those that it is made of."""
    random = np.random.default_rng(0)
    images = random.random((sizes["batch"], 32, 32, 3), "float32")
    labels = random.integers(0, 10, len(images))
    student = resnet(sizes["depth"], sizes["width"])
    cases: dict[str, Callable[[], Any]] = {"student alone": _step(student, images)}
    for factor in factors:
        teacher = resnet(sizes["depth"], factor * sizes["width"])
        forward = tf.function(lambda x, teacher=teacher: teacher(x, training=False))
        name = f"teacher {factor} x as wide"
        image = tf.constant(images)
        cases[f"{name}, forward"] = lambda f=forward, x=image: f(x).numpy()
        student = resnet(sizes["depth"], sizes["width"])
        cases[name] = _step(kd.Distiller(student, teacher), images, labels)
    vectors = random.random((sizes["batch"], 64), "float32")
    for classes in heads:
        plain = student_like(classes, 64)
        cases[f"{classes} classes, student alone"] = _step(plain, vectors)
        made = kd.Distiller(student_like(classes, 64), student_like(classes, 64))
        cases[f"{classes} classes"] = _step(made, vectors)
    found = defaultdict(list)
    for number in range(-2, rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if number >= 0:
                found[name].append(time.perf_counter() - start)
    return {
        name: {"milliseconds": 1e3 * statistics.median(values)}
        for name, values in found.items()
    }


def _step(model: keras.Model, x: Any, y: Any = None) -> Callable[[], Any]:
    y = np.zeros(len(x), "int64") if y is None else y
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), LABELS)
    data = tf.data.Dataset.from_tensors((x, y)).cache().repeat()
    model.fit(data, steps_per_epoch=1, shuffle=False, verbose=0)
    iterator = iter(data)
    return lambda: model.train_function(iterator)


def main() -> None:
    """Measures and writes."""
    options = parser("What distribution costs.", "distribution").parse_args()
    sizes = {"depth": 14, "width": 16, "batch": 64, "steps": 5}
    rounds, widths = options.rounds or 15, [256, 1024, 3072]
    chosen, factors, heads = list(LAYOUTS), [1, 2, 4], [10, 100, 1000, 10_000]
    if options.smoke:
        sizes = {"depth": 8, "width": 2, "batch": 8, "steps": 2}
        rounds, widths = options.rounds or 2, [8]
        chosen, factors, heads = ["1 device", "2 workers"], [1], [10]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Before TensorFlow is in use here: crews are forked.
        steps = layouts(folder, chosen, sizes, rounds)
        result = {"one step of the same global batch": steps}
        result["a backup"] = backups(folder, widths, 3)
    result["one device"] = growth(sizes, factors, heads, rounds)
    for title, table in result.items():
        print(title, *(f"  {case:<36} {row}" for case, row in table.items()), sep="\n")
    setting = {
        "student": f"ResNet-{sizes['depth']}, {sizes['width']} wide",
        "teacher": "the same, twice as wide",
        "global batch": sizes["batch"],
        "rounds of steps": f"{rounds} x {sizes['steps']}",
    }
    path = options.out or (TRIALS if options.smoke else RESULTS) / "distribution.json"
    write(path, "What distribution and backups cost", {"setting": setting, **result})


if __name__ == "__main__":
    main()
