"""Images with and without a label, mixed in one fit.

A tenth of the images has a label. The others get the label -1, which means that there
is none: they count in the soft term, where the teacher speaks, and nowhere else. Each
seed trains the same student three times from the same initial weights, for the same
number of updates:

* alone, on the images with a label;
* distilled on these images only;
* distilled on all images, those with and those without a label in the same batches.

Run from the root of the project:

    python examples/mixed_labels.py [--dataset digits|mnist|cifar10] [--smoke]
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from small import Task, options, show_means

import keras_distill as kd


def main() -> None:
    """Trains and prints."""
    task = Task(options(__doc__.splitlines()[0]))
    x, y = task.train
    few = len(y) // 10
    print(f"{few} of the images have a label.\n")
    batch = task.setting.batch_size

    def batches(*parts: tuple[np.ndarray, np.ndarray]) -> tf.data.Dataset:
        """The parts mixed, as many rows as there are images."""
        rows = [tf.data.Dataset.from_tensor_slices(part).repeat() for part in parts]
        weights = [len(part[1]) / sum(len(p[1]) for p in parts) for part in parts]
        mixed = tf.data.Dataset.sample_from_datasets(rows, weights, seed=0)
        return mixed.take(len(y)).shuffle(len(y), seed=0).batch(batch)

    labelled = (x[:few], y[:few])
    unlabelled = (x[few:], np.full(len(y) - few, -1, y.dtype))
    names = ("teacher", "alone", "distilled, with labels", "distilled, all images")
    found: dict[str, list[float]] = {name: [] for name in names}
    for seed in task.seeds:
        keras.utils.set_random_seed(seed)
        # It was trained elsewhere, with all labels, and is too large to ship.
        teacher = task.trained_alone(task.network(2.0))
        found["teacher"].append(task.accuracy(teacher))
        start = task.network(0.5).get_weights()

        alone = task.network(0.5)
        alone.set_weights(start)
        alone.compile(**task.compile_options())
        alone.fit(batches(labelled), epochs=task.epochs, verbose=0)
        found["alone"].append(task.accuracy(alone))
        for name, parts in (
            ("distilled, with labels", [labelled]),
            ("distilled, all images", [labelled, unlabelled]),
        ):
            student = task.network(0.5)
            student.set_weights(start)
            distiller = kd.Distiller(student, teacher, temperature=4.0)
            distiller.compile(**task.compile_options())
            distiller.fit(batches(*parts), epochs=task.epochs, verbose=0)
            found[name].append(task.accuracy(student))
    show_means(found)


if __name__ == "__main__":
    main()
