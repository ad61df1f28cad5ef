"""How long the losses take on another Keras backend, on whatever device it finds.

Value and gradient for the student, compiled where the backend compiles (`jax.jit`),
eager on PyTorch; the median of many calls. Only Keras and the backend are needed:

    KERAS_BACKEND=jax python examples/benchmarks/backends.py --out backends_jax.json
    KERAS_BACKEND=torch python examples/benchmarks/backends.py --out backends_torch.json
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distill import losses

BATCH = 256
LOGITS, EMBEDDINGS, FEATURES = (BATCH, 100), (BATCH, 512), (64, 16, 16, 64)

CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "SoftTarget": (losses.SoftTarget(), LOGITS),
    "LogitMSE": (losses.LogitMSE(), LOGITS),
    "DIST": (losses.DIST(), LOGITS),
    "MultiLevelLogit": (losses.MultiLevelLogit(), LOGITS),
    "Hint": (losses.Hint(), FEATURES),
    "AttentionTransfer": (losses.AttentionTransfer(), FEATURES),
    "ActivationBoundary": (losses.ActivationBoundary(), FEATURES),
    "NeuronSelectivity": (losses.NeuronSelectivity(), FEATURES),
    "HierarchicalContext": (losses.HierarchicalContext(), FEATURES),
    "RelationalDistance": (losses.RelationalDistance(), EMBEDDINGS),
    "RelationalAngle": (losses.RelationalAngle(), EMBEDDINGS),
    "ProbabilisticTransfer": (losses.ProbabilisticTransfer(), EMBEDDINGS),
    "SimilarityPreserving": (losses.SimilarityPreserving(), EMBEDDINGS),
}


def step(loss: Any) -> Callable[[Any, Any], Any]:
    """Function of teacher and student that computes value and gradient, and waits."""
    if keras.backend.backend() == "jax":
        import jax

        compiled = jax.jit(jax.value_and_grad(loss, argnums=1))
        return lambda teacher, student: jax.block_until_ready(
            compiled(teacher, student)
        )
    if keras.backend.backend() == "torch":
        import torch

        def run(teacher: Any, student: Any) -> Any:
            student.grad = None
            student.requires_grad_(True)
            loss(teacher, student).backward()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return student.grad

        return run
    import tensorflow as tf

    @tf.function
    def both(teacher: Any, student: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(student)
            value = loss(teacher, student)
        return tape.gradient(value, student)

    return lambda teacher, student: both(teacher, student).numpy()


def device() -> str:
    """The device the backend computes on, in its own words."""
    if keras.backend.backend() == "jax":
        import jax

        return str(jax.devices()[0].device_kind)
    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    import tensorflow as tf

    return str([d.device_type for d in tf.config.list_physical_devices()])


def milliseconds(loss: Any, shape: tuple[int, ...], repeats: int) -> float:
    """Median time of one value and gradient."""
    rng = np.random.default_rng(0)
    teacher, student = (
        ops.convert_to_tensor(rng.normal(size=shape).astype("float32")) for _ in "ts"
    )
    run = step(loss)
    for _ in range(3):
        run(teacher, student)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(teacher, student)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the losses on a Keras backend.")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--smoke", action="store_true", help="few repeats")
    arguments = parser.parse_args()
    repeats = 2 if arguments.smoke else arguments.repeats
    report = {
        "backend": keras.backend.backend(),
        "device": device(),
        "keras": keras.__version__,
        "milliseconds": {},
    }
    for name, (loss, shape) in CASES.items():
        took = milliseconds(loss, shape, repeats)
        report["milliseconds"][name] = round(took, 3)
        print(f"{name:24} {shape!s:20} {took:8.3f} ms")
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
