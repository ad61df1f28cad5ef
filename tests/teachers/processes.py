"""Caches in processes of their own: killed, at the same time, with replicas.

Run as a script: `processes.py <directory>`. TensorFlow is imported once; each process
is forked before it is used. Each check writes `<check>/result.txt`: "done", or what
went wrong.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_distill as kd
from keras_distill.teachers.store import shards

ROWS = 1500


def network(width: int, seed: int) -> keras.Model:
    initializer = keras.initializers.GlorotUniform(seed)
    dense = keras.layers.Dense
    return keras.Sequential(
        [
            keras.Input((6,)),
            dense(width, "relu", kernel_initializer=initializer),
            dense(3, kernel_initializer=initializer),
        ]
    )


def rows(seconds: float = 0.0) -> tf.data.Dataset:
    """Rows that take their time."""
    x = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("float32")

    def slow(value):
        time.sleep(seconds)
        return value

    dataset = tf.data.Dataset.from_tensor_slices((x, np.arange(ROWS) % 3))
    if not seconds:
        return dataset
    return dataset.map(
        lambda x, y: (tf.ensure_shape(tf.numpy_function(slow, [x], x.dtype), (6,)), y)
    )


def build(path: Path, seconds: float = 0.0) -> kd.teachers.Cache:
    shards.SHARD_ROWS = 50
    teacher = network(8, 7)
    return kd.teachers.Cache.build(teacher, rows(seconds), path, batch_size=10)


def forked(work) -> int:
    """Runs `work` in a new process; its exit status is 0 if nothing was raised."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def finished(pid: int) -> None:
    assert os.waitpid(pid, 0)[1] == 0


def count(path: Path) -> int:
    return len(list(path.glob("shard-*.bin")))


def kills(directory: Path) -> None:
    """Kills a build ten times, at random moments between its beginning and its end."""
    generator = random.Random(0)
    path = directory / "cache"
    for kill in range(10):
        before = count(path)
        pid = forked(lambda: build(path, 0.0005))
        while count(path) < before + 1 + kill % 3:
            time.sleep(0.001)
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "finished too early"
        time.sleep(generator.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert count(path) < ROWS // 50
    finished(forked(lambda: build(path)))
    finished(forked(lambda: build(directory / "reference")))
    names = {file.name for file in path.iterdir()}
    assert names == {file.name for file in (directory / "reference").iterdir()}
    for name in names:
        assert (path / name).read_bytes() == (
            directory / "reference" / name
        ).read_bytes(), name


def together(directory: Path) -> None:
    """Three processes want one cache: one of them runs the teacher."""

    def work() -> None:
        calls = []
        original = kd.teachers.Model.__call__

        def noted(self, *args):
            calls.append(1)
            return original(self, *args)

        kd.teachers.Model.__call__ = noted
        cache = build(directory / "cache", 0.0005)
        assert len(cache) == ROWS
        (directory / f"calls-{os.getpid()}").write_text(str(len(calls)))

    for pid in [forked(work) for _ in range(3)]:
        finished(pid)
    calls = sorted(int(f.read_text()) for f in directory.glob("calls-*"))
    assert calls[:2] == [0, 0]
    assert calls[2] > 0


def replicas(directory: Path) -> None:
    """Two replicas read what one device reads; views follow the epoch there too."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)

    def augment(x, seed):
        return x + tf.random.stateless_normal((6,), seed)

    teacher = network(8, 7)
    data = rows().take(48)
    cache = kd.teachers.Cache.build(
        teacher, data, directory / "views", views=2, augment=augment, dtype="float32"
    )
    attached = cache.attach(data).batch(16)

    def fit():
        student = network(4, 3)
        distiller = kd.Distiller(student, cache)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        distiller.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
        history = distiller.fit(attached, epochs=3, verbose=0).history
        return history, [w.numpy() for w in student.weights]

    one = fit()
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        two = fit()
    for name, values in one[0].items():
        np.testing.assert_allclose(values, two[0][name], rtol=1e-5, err_msg=name)
    for a, b in zip(one[1], two[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def checked(check, directory: Path) -> None:
    directory.mkdir()
    result = "done"
    try:
        check(directory)
    except BaseException:
        result = traceback.format_exc()
    (directory / "result.txt").write_text(result)


if __name__ == "__main__":
    running = [
        forked(lambda check=check: checked(check, Path(sys.argv[1]) / check.__name__))
        for check in (kills, together, replicas)
    ]
    for pid in running:
        finished(pid)
