"""Losses against plain transcriptions of their formulas: time and memory.

Value and gradient for the student, inside `tf.function`, both ways in one process and
in turns; reported is the ratio of the medians. Peak memory is measured in a process
of its own for each way: by how much the largest resident size grows beyond that of
the same process after a tiny batch.

    python examples/benchmarks/losses.py [--smoke]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from measure import RESULTS, TRIALS, parser, write

from keras_distill import losses

Function = Callable[[Any, Any], tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, the plain transcription of its formula, and their inputs.

    Attributes:
        ours: `ours(teacher, student)`, a scalar.
        plain: The same by the formula, step by step.
        inputs: `inputs(rng, batch)` returns teacher and student.
        batch: Size of the batch.
        smoke: Size of the batch for a quick run.
        repeats: How often each way is timed.
    """

    ours: Function
    plain: Function
    inputs: Callable[[np.random.Generator, int], tuple[Any, Any]]
    batch: int = 256
    smoke: int = 32
    repeats: int = 30


def embeddings(rng: np.random.Generator, batch: int) -> tuple[Any, Any]:
    teacher, student = rng.normal(size=(2, batch, 512)).astype("float32")
    return tf.constant(teacher), tf.constant(student)


def huber(gap: tf.Tensor) -> tf.Tensor:
    size = tf.abs(gap)
    return tf.reduce_mean(tf.where(size < 1, 0.5 * gap**2, size - 0.5))


def plain_distance(teacher: tf.Tensor, student: tf.Tensor) -> tf.Tensor:
    def relative(x: tf.Tensor) -> tf.Tensor:
        squares = tf.reduce_sum(x**2, 1)
        products = tf.matmul(x, x, transpose_b=True)
        distances = squares[:, None] + squares[None] - 2 * products
        distances = tf.sqrt(tf.maximum(distances, 1e-12))
        distances = tf.linalg.set_diag(distances, tf.zeros_like(squares))
        positive = tf.cast(distances > 0, x.dtype)
        return distances * tf.reduce_sum(positive) / tf.reduce_sum(distances)

    return huber(relative(student) - relative(teacher))


def plain_angle(teacher: tf.Tensor, student: tf.Tensor) -> tf.Tensor:
    def cosines(x: tf.Tensor) -> tf.Tensor:
        # normalize(): divided by max(norm, 1e-12)
        unit = tf.math.l2_normalize(x[None] - x[:, None], -1, epsilon=1e-24)
        return tf.matmul(unit, unit, transpose_b=True)

    return huber(cosines(student) - cosines(teacher))


def plain_similarity(teacher: tf.Tensor, student: tf.Tensor) -> tf.Tensor:
    def similarity(x: tf.Tensor) -> tf.Tensor:
        products = tf.matmul(x, x, transpose_b=True)
        return tf.math.l2_normalize(products, 1, epsilon=1e-24)

    gap = similarity(student) - similarity(teacher)
    return tf.reduce_sum(gap**2) / tf.cast(tf.shape(gap)[0], gap.dtype) ** 2


def plain_transfer(teacher: tf.Tensor, student: tf.Tensor) -> tf.Tensor:
    def neighbours(x: tf.Tensor) -> tf.Tensor:
        x = x / (tf.sqrt(tf.reduce_sum(x**2, 1, keepdims=True)) + 1e-7)
        closeness = (tf.matmul(x, x, transpose_b=True) + 1) / 2
        return closeness / tf.reduce_sum(closeness, 1, keepdims=True)

    p, q = neighbours(teacher), neighbours(student)
    return tf.reduce_mean(p * tf.math.log((p + 1e-7) / (q + 1e-7)))


def features(rng: np.random.Generator, batch: int) -> tuple[Any, Any]:
    """Two layers of 32 × 32 × 64, after a ReLU; the student is like the teacher."""
    shape = (2, batch, 32, 32, 64)
    teacher = rng.normal(size=shape).astype("float32")
    student = teacher + 0.5 * rng.normal(size=shape).astype("float32")
    teacher, student = np.maximum(teacher, 0), np.maximum(student, 0)
    return [tf.constant(x) for x in teacher], [tf.constant(x) for x in student]


def plain_singular(teacher: list[tf.Tensor], student: list[tf.Tensor]) -> tf.Tensor:
    def vectors(x: tf.Tensor, count: int) -> tf.Tensor:
        _, height, width, channels = x.shape
        matrix = tf.reshape(x, (-1, height * width, channels))
        return tf.linalg.svd(matrix)[2][:, :, :count]

    def kernel(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
        return tf.exp(-((second[:, :, None] - first[:, None]) ** 2) / 8)

    pairs = []
    for t, s in zip(teacher, student, strict=True):
        v, u = vectors(t, 1), vectors(s, 4)
        largest = tf.one_hot(tf.argmax(tf.abs(v), 1), v.shape[1], axis=1)
        v *= tf.sign(tf.reduce_sum(v * largest, 1, keepdims=True))
        cosine = tf.matmul(u, v, transpose_a=True)
        chosen = tf.one_hot(tf.argmax(tf.abs(cosine), 1), u.shape[2], axis=1)
        pairs.append((v, tf.matmul(u, tf.stop_gradient(chosen * tf.sign(cosine)))))
    (v1, u1), (v2, u2) = pairs
    gap = kernel(u1, u2) - kernel(v1, v2)
    return tf.reduce_sum(gap**2) / tf.cast(tf.shape(gap)[0], gap.dtype)


CASES = {
    "RKD angles": Case(
        losses.RelationalAngle(), plain_angle, embeddings, smoke=16, repeats=7
    ),
    "RKD distances": Case(losses.RelationalDistance(), plain_distance, embeddings),
    "SP": Case(losses.SimilarityPreserving(), plain_similarity, embeddings),
    "PKT": Case(losses.ProbabilisticTransfer(), plain_transfer, embeddings),
    "KD-SVD": Case(
        losses.SingularValue(), plain_singular, features, batch=64, smoke=4, repeats=7
    ),
}


def compiled(function: Function) -> Callable[[Any, Any], tuple[tf.Tensor, Any]]:
    """Value and gradient for the student as one graph."""

    @tf.function
    def step(teacher: Any, student: Any) -> tuple[tf.Tensor, Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(student)
            value = function(teacher, student)
        return value, tape.gradient(value, student)

    return step


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    value, _ = function()  # a graph is done when it returns
    value.numpy()  # the gradient is not copied: training does not copy it either
    return time.perf_counter() - start


def compare(case: Case, batch: int, repeats: int) -> dict[str, Any]:
    """Times both ways in turns; also says how far their results are apart."""
    inputs = case.inputs(np.random.default_rng(0), batch)
    steps = {"ours": compiled(case.ours), "plain": compiled(case.plain)}
    results = {name: step(*inputs) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            # A short case is repeated until the clock can resolve it.
            for _ in range(3):
                times[name].append(seconds(lambda step=step: step(*inputs)))

    def distance(found: Any, wanted: Any) -> float:
        pairs = list(zip(tf.nest.flatten(found), tf.nest.flatten(wanted), strict=True))
        gap = sum(float(tf.reduce_sum((a - b) ** 2)) for a, b in pairs)
        return (gap / sum(float(tf.reduce_sum(b**2)) for _, b in pairs)) ** 0.5

    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "batch": batch,
        "ours, ms": 1e3 * medians["ours"],
        "plain, ms": 1e3 * medians["plain"],
        "times faster": medians["plain"] / medians["ours"],
        "values apart by": distance(results["ours"][0], results["plain"][0]),
        "gradients apart by": distance(results["ours"][1], results["plain"][1]),
    }


def peak(name: str, way: str, smoke: bool) -> float:
    """MiB by which one step grows the largest resident size of a fresh process."""
    command = [sys.executable, __file__, "--peak", name, way]
    command += ["--smoke"] if smoke else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(name: str, way: str, smoke: bool) -> None:
    case = CASES[name]
    step = compiled(getattr(case, way))
    rng = np.random.default_rng(0)
    inputs = case.inputs(rng, case.smoke if smoke else case.batch)

    def largest() -> float:
        # `ru_maxrss` would begin with the size of the process that started this one.
        status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    step(*case.inputs(rng, 4))
    before = largest()
    for _ in range(3):
        step(*inputs)
    print(largest() - before)


def main() -> None:
    options = parser(__doc__.splitlines()[0], "losses")
    options.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    options.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.peak:
        print_peak(*chosen.peak, chosen.smoke)
        return

    report = {}
    for name in chosen.only:
        case = CASES[name]
        batch, repeats = case.batch, chosen.rounds or case.repeats
        if chosen.smoke:
            batch, repeats = case.smoke, 2
        row = compare(case, batch, repeats)
        for way in ("ours", "plain"):
            row[f"{way}, MiB"] = peak(name, way, chosen.smoke)
        report[name] = row
        print(f"{name:18}" + ", ".join(f"{k} {v:.3g}" for k, v in row.items()))
    setting = {"step": "value and gradient for the student", "differences": "relative"}
    write(
        chosen.out or (TRIALS if chosen.smoke else RESULTS) / "losses.json",
        "Losses against plain transcriptions of their formulas",
        {"setting": setting, "": report},
    )


if __name__ == "__main__":
    main()
