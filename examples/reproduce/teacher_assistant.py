"""A teacher that is too large for its student, and an assistant in between.

Plain networks on CIFAR-10: `size` convolutions of 3 x 3 with batch normalization, with
pooling after every second one (both of the smallest). Teacher, assistant and student
have the sizes 6, 4 and 2. The student learns from labels alone, from the teacher, or
from an assistant that the teacher has taught: `kd.generations.teacher_assistant`.

The paper (Mirzadeh et al., AAAI 2020, arXiv:1902.03393) has a teacher of 10 layers, all
images, 150 epochs, and 120 trials for temperature and weight. To fit into minutes there
are 20,000 images here, averaged to 16 x 16 and mirrored at random, a teacher of 6
layers and a dense one, 12 epochs, and T = 5 with 0.7 of the loss on soft targets,
without a search. SGD with Nesterov momentum 0.9, rate 0.05 falling to 0 as a cosine,
weight decay 5e-4, batches of 128; accuracy is that of the last epoch on the 10,000 test
images.

    TFDS_DATA_DIR=... python examples/reproduce/teacher_assistant.py [--smoke]
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from experiment import Experiment, means, parser, plot_gains
from keras import layers
from methods import BATCH, Arrays, batches, images, options

import keras_distill as kd

ACCURACY, ALONE = "accuracy %", "student (2), labels alone"
PLANS = {
    6: (16, 16, 0, 32, 32, 0, 64, 64, 0),
    4: (16, 16, 0, 32, 32, 0),
    2: (16, 0, 16, 0),
}
SOFT = {"temperature": 5.0, "alpha": 0.3, "beta": 0.7}


def plain(size: int, shape: tuple[int, ...]) -> keras.Model:
    """A plain network of the paper; 0 in its plan is pooling."""
    x = inputs = keras.Input(shape)
    for channels in PLANS[size]:
        if channels:
            x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
        else:
            x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    if size == 6:
        x = layers.Dense(64, "relu")(x)
    return keras.Model(inputs, layers.Dense(10)(x), name=f"plain_{size}")


def run(seed: int, train: Arrays, test: Arrays, epochs: int) -> dict[str, float]:
    """Test accuracies of one seed."""
    data = batches(train, seed)
    steps = epochs * -(-len(train[1]) // BATCH)

    def build(size: int) -> keras.Model:
        keras.utils.set_random_seed(seed)  # all students start alike
        return plain(size, train[0].shape[1:])

    chain = kd.generations.teacher_assistant(
        build,
        lambda: options(steps),
        data,
        sizes=list(PLANS),
        epochs=epochs,
        verbose=0,
        **SOFT,
    )
    alone = kd.BaseDistiller(build(2))
    taught = kd.Distiller(build(2), chain.models[0], **SOFT)
    for distiller in (alone, taught):
        distiller.compile(**options(steps)).fit(data, epochs=epochs, verbose=0)
    teacher, assistant, student = chain.models
    models = {
        "teacher (6)": teacher,
        "assistant (4), from the teacher": assistant,
        ALONE: alone.student,
        "student (2), from the teacher": taught.student,
        "student (2), from the assistant": student,
    }
    x, y = test
    return {
        name: 100
        * float(np.mean(model.predict(x, batch_size=500, verbose=0).argmax(-1) == y))
        for name, model in models.items()
    }


def main() -> None:
    """Runs the seeds that are missing in the result file."""
    read = parser(__doc__.splitlines()[0], "teacher_assistant", seeds=3).parse_args()
    epochs, seeds = 12, read.seeds
    if read.smoke:
        epochs, seeds = 1, 1
        tf.config.run_functions_eagerly(True)  # one step is not worth a graph
        random = np.random.default_rng(0)
        train, test = (
            (random.random((32, 8, 8, 3), "float32"), random.integers(0, 10, 32))
            for _ in range(2)
        )
    else:
        data = images(read.runs / "images.npz")
        train, test = data["teacher"], data["test"]
    experiment = Experiment(
        read,
        "teacher_assistant",
        "A large teacher, a small student, and an assistant",
        {
            "images": f"{len(train[1])} of CIFAR-10, averaged to 16 x 16 x 3",
            "epochs": epochs,
            **SOFT,
            "command": "python examples/reproduce/teacher_assistant.py",
        },
        lambda rows: means(rows, ACCURACY, ALONE),
    )
    for seed in range(seeds):
        if not experiment.has(ALONE, seed):
            for name, value in run(seed, train, test, epochs).items():
                experiment.add(name, seed, [{ACCURACY: value}])
    plot_gains(
        [row for row in experiment.rows if row["run"].startswith("student")],
        ACCURACY,
        ALONE,
        experiment.path.with_suffix(".png"),
        "test accuracy, points above labels alone (same seed)",
    )


if __name__ == "__main__":
    main()
