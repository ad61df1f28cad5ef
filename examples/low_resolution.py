"""The teacher sees whole images, the student small ones.

Every row holds an image twice: as it is, for the teacher, and averaged over blocks of
pixels, for the student, which is to work where only small images are to be had. Each
seed trains the student three times from the same initial weights, for the same number
of updates:

* alone, on the images with a label;
* distilled on the same images;
* distilled on three times as many, of which the others have no label: whole images
  show the teacher what they are, and it passes that on.

Run from the root of the project:

    python examples/low_resolution.py [--dataset digits|mnist|cifar10] [--smoke]
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from small import Task, options, show_means

import keras_distill as kd

FACTORS = {"digits": 2, "mnist": 4, "cifar10": 4}


def averaged(images: np.ndarray, factor: int) -> np.ndarray:
    """Images with one pixel for `factor` x `factor`."""
    rows, height, width, channels = images.shape
    grid = (rows, height // factor, factor, width // factor, factor, channels)
    return images.reshape(grid).mean((2, 4))


def main() -> None:
    """Trains and prints."""
    chosen = options(__doc__.splitlines()[0])
    task = Task(chosen)
    task.epochs *= 3
    factor = FACTORS[chosen.dataset]
    count = len(task.train[1])
    x, y = (part[: 3 * count] for part in task.data.train)
    y = np.where(np.arange(len(y)) < count, y, -1)  # -1: no label
    small, test = averaged(x, factor), averaged(task.test[0], factor)
    print(
        f"The teacher sees {x.shape[1:3]} pixels, the student {test.shape[1:3]}. Small"
    )
    print(f"images are hard to learn: here {task.epochs} epochs.\n")
    names = ("teacher", "alone", "distilled, same images", "distilled, three times")
    found: dict[str, list[float]] = {name: [] for name in names}
    for seed in task.seeds:
        keras.utils.set_random_seed(seed)
        teacher = task.trained_alone(task.network(2.0))
        found["teacher"].append(task.accuracy(teacher))
        start = task.network(shape=test.shape[1:]).get_weights()
        for name in names[1:]:
            student = task.network(shape=test.shape[1:])
            student.set_weights(start)
            rows, epochs = count, task.epochs
            if name == "alone":
                trained = student
            else:
                trained = kd.Distiller(
                    student,
                    kd.teachers.Model(teacher, inputs="whole"),
                    student_inputs="small",
                    temperature=4.0,
                    alpha=0.5,
                    beta=0.5,
                )
            if name == "distilled, three times":
                rows, epochs = len(y), max(1, epochs // 3)
            inputs = {"whole": x[:rows], "small": small[:rows]}
            trained.compile(**task.compile_options())
            trained.fit(
                inputs["small"] if trained is student else inputs,
                y[:rows],
                epochs=epochs,
                **task.fit,
            )
            predicted = student.predict(test, verbose=0).argmax(-1)
            found[name].append(float(np.mean(predicted == task.test[1])))
    show_means(found)


if __name__ == "__main__":
    main()
