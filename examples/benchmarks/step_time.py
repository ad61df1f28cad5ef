"""What a distillation step costs, beside what it cannot do without.

The floor is S + F: a plain step of the student, and the teacher's forward pass. The
cases are run in turn, one step each per round. Written to docs/results/step_time.json:

* our step with soft targets alone, and with three links besides;
* the same two with `keras.distillation.Distiller` (losses given as instances);
* the same with a teacher whose BatchNormalization is folded into its convolutions, and
  the teacher's forward pass folded and with a frozen graph.

    python examples/benchmarks/step_time.py [--smoke] [--rounds 40]
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from fold import fold_batch_normalization, foldable, freeze
from keras.distillation import Distiller, FeatureDistillation, LogitsDistillation
from measure import RESULTS, TRIALS, interleaved, median_ratio, parser, write
from models import wide_resnet

import keras_distill as kd

# Many models trace many functions, and TensorFlow takes that for a mistake.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

STAGES = ("stage1", "stage2", "stage3")
TEMPERATURE = 4.0


def compile_options() -> dict[str, Any]:
    """New objects for each model: an optimizer belongs to one."""
    return {
        "optimizer": keras.optimizers.SGD(0.01, momentum=0.9),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }


def ours(student: keras.Model, teacher: keras.Model, links: bool) -> keras.Model:
    """Soft targets, and a mean squared error at each of the three stages if asked."""
    distiller = kd.Distiller(
        student,
        teacher,
        temperature=TEMPERATURE,
        alpha=0.1,
        beta=0.9,
        links=[
            kd.Link(stage, stage, keras.losses.MeanSquaredError())
            for stage in STAGES
            if links
        ],
    )
    distiller.compile(**compile_options())
    return distiller


def theirs(student: keras.Model, teacher: keras.Model, links: bool) -> keras.Model:
    """The same objective with `keras.distillation`."""
    losses = [
        LogitsDistillation(loss=keras.losses.KLDivergence(), temperature=TEMPERATURE)
    ]
    losses += [
        FeatureDistillation(
            loss=keras.losses.MeanSquaredError(),
            teacher_layer_name=stage,
            student_layer_name=stage,
        )
        for stage in STAGES
        if links
    ]
    distiller = Distiller(
        teacher=teacher,
        student=student,
        distillation_losses=losses,
        distillation_loss_weights=[1.0] * len(losses),
    )
    distiller.compile(**compile_options())
    return distiller


def step(model: keras.Model, data: tf.data.Dataset) -> Callable[[], Any]:
    """One training step, with the function that `fit` made and uses."""
    model.fit(data, steps_per_epoch=1, shuffle=False, verbose=0)
    iterator = iter(data)
    return lambda: model.train_function(iterator)


def forward(function: Callable[[Any], Any], x: Any) -> Callable[[], Any]:
    """One forward pass, waited for."""
    compiled = tf.function(function, autograph=False)
    return lambda: compiled(x).numpy()


def main() -> None:
    """Measures and writes."""
    options = parser("What a distillation step costs.", "step_time").parse_args()
    depths, width, batch, rounds = (40, 16), 2, 64, options.rounds or 40
    if options.smoke:
        depths, width, batch, rounds = (10, 10), 1, 4, options.rounds or 1
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x = random.random((batch, 32, 32, 3), "float32")
    y = random.integers(0, 10, batch)
    data = tf.data.Dataset.from_tensors((x, y)).cache().repeat()

    teacher = wide_resnet(depths[0], width)
    randomize_statistics(teacher, random)
    folded = fold_batch_normalization(teacher)
    frozen = {
        "teacher frozen": freeze(teacher, x.shape),
        "teacher folded and frozen": freeze(folded, x.shape),
    }

    def student() -> keras.Model:
        return wide_resnet(depths[1], width)

    plain = student()
    plain.compile(**compile_options())
    image = tf.constant(x)
    cases = {
        "student step": step(plain, data),
        "teacher forward": forward(lambda z: teacher(z, training=False), image),
        "ours, logits": step(ours(student(), teacher, links=False), data),
        "ours, three links": step(ours(student(), teacher, links=True), data),
        "keras, logits": step(theirs(student(), teacher, links=False), data),
        "keras, three links": step(theirs(student(), teacher, links=True), data),
        "teacher folded": forward(lambda z: folded(z, training=False), image),
        **{name: forward(function, image) for name, function in frozen.items()},
        "ours, logits, teacher folded": step(
            ours(student(), folded, links=False), data
        ),
    }
    times = interleaved(cases, rounds)

    floor = {
        clock: [
            s + f
            for s, f in zip(
                times["student step"][clock],
                times["teacher forward"][clock],
                strict=True,
            )
        ]
        for clock in ("wall", "cpu")
    }
    ratios = {}
    for name, bound in {
        "ours, logits": 1.05,
        "ours, three links": 1.10,
        "keras, logits": None,
        "keras, three links": None,
        "ours, logits, teacher folded": None,
    }.items():
        ratios[f"({name}) / (S + F)"] = {
            clock: median_ratio(times[name][clock], floor[clock])
            for clock in ("wall", "cpu")
        } | {"to reach": bound}
    ratios["(ours, three links) / (keras, three links)"] = {
        clock: median_ratio(
            times["ours, three links"][clock], times["keras, three links"][clock]
        )
        for clock in ("wall", "cpu")
    } | {"to reach": 0.75}
    for name in ("teacher folded", *frozen):
        ratios[f"({name}) / (teacher forward)"] = {
            clock: median_ratio(times[name][clock], times["teacher forward"][clock])
            for clock in ("wall", "cpu")
        } | {"to reach": None}

    expected = teacher(image, training=False).numpy()
    scale = float(np.abs(expected).max())
    difference = {
        name: float(np.abs(function(image).numpy() - expected).max()) / scale
        for name, function in {"teacher folded": folded, **frozen}.items()
    }
    result = {
        "setting": {
            "teacher": teacher.name,
            "student": plain.name,
            "batch": batch,
            "image": "32 x 32 x 3",
            "rounds": rounds,
        },
        "median milliseconds": {
            name: {
                clock: 1e3 * statistics.median(values)
                for clock, values in clocks.items()
            }
            for name, clocks in times.items()
        },
        "ratios": ratios,
        "folding": {
            "BatchNormalization layers": sum(
                type(layer) is keras.layers.BatchNormalization
                for layer in teacher.layers
            ),
            "folded": len(foldable(teacher)),
            "largest output difference, relative": difference,
        },
    }
    for name, values in result["median milliseconds"].items():
        print(f"{name:<32} {values['wall']:8.1f} ms  {values['cpu']:8.1f} ms CPU")
    for name, values in ratios.items():
        bound = f"  to reach {values['to reach']}" if values["to reach"] else ""
        print(f"{name:<48} {values['wall']:6.3f}  {values['cpu']:6.3f} CPU{bound}")
    print("largest relative difference of the outputs:", difference)
    default = (TRIALS if options.smoke else RESULTS) / "step_time.json"
    write(options.out or default, "What a distillation step costs", result)


def randomize_statistics(model: keras.Model, random: np.random.Generator) -> None:
    """Moves BatchNormalization away from its start, where folding is trivial."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            gamma, beta, mean, variance = layer.get_weights()
            layer.set_weights(
                [
                    random.uniform(0.5, 1.5, gamma.shape),
                    random.normal(0, 0.1, beta.shape),
                    random.normal(0, 0.1, mean.shape),
                    random.uniform(0.5, 2, variance.shape),
                ]
            )


if __name__ == "__main__":
    main()
