"""A teacher that is worse than its student: does it help all the same?

Two ways of having a bad teacher for a large student, both with the plain distiller:

* Re-KD: the teacher is much smaller than the student;
* De-KD: the teacher has the student's size, but was hardly trained.

Soft targets regularise the student even then (Yuan et al., Revisiting Knowledge
Distillation via Label Smoothing Regularization, arXiv 1909.11723), if the temperature
is high enough to hide the teacher's mistakes. Run from the root of the project:

    python examples/poor_teacher.py [--dataset digits|mnist|cifar10] [--smoke]
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from small import Task, options

import keras_distill as kd


def main() -> None:
    """Trains and prints."""
    task = Task(options(__doc__.splitlines()[0]))
    start = task.network().get_weights()
    teachers = {
        "small teacher (Re-KD)": task.trained_alone(task.network(0.25)),
        "unfinished teacher (De-KD)": task.trained_alone(
            task.network(), epochs=max(1, task.epochs // 10)
        ),
    }
    alone = task.network()
    alone.set_weights(start)
    task.show("student, alone", task.trained_alone(alone))
    for name, teacher in teachers.items():
        task.show(name, teacher)
        student = task.network()
        student.set_weights(start)
        distiller = kd.Distiller(
            student, teacher, temperature=20.0, alpha=0.9, beta=0.1
        )
        distiller.compile(**task.compile_options())
        distiller.fit(*task.train, epochs=task.epochs, **task.fit)
        task.show(f"student of the {name}", student)


if __name__ == "__main__":
    main()
