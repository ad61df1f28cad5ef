"""The chains: who teaches whom what."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_distill.base import BaseDistiller
from keras_distill.distiller import Distiller
from keras_distill.generations.chain import Chain, Generations
from keras_distill.generations.joining import joined, missing_label
from keras_distill.generations.objectives import ConfidenceWeighted, PermutedTarget
from keras_distill.losses.response import SoftTarget

Build = Callable[..., keras.Model]

METHODS = ("ban", "ban+l", "cwtm", "dkpp")


def born_again(
    build: Build,
    compile_args: Any,
    data: Any,
    *,
    generations: int = 3,
    epochs: int,
    validation_data: Any = None,
    callbacks: Any = (),
    directory: str | os.PathLike | None = None,
    method: str = "ban",
    **fit: Any,
) -> Generations:
    r"""Trains the same architecture again and again, each model taught by the last.

    The first generation learns from the labels. What the later ones minimise, with t
    the teacher's and p the student's probabilities, both at temperature 1:

    * `"ban"`: `-Σ_k t_k log p_k`, without labels;
    * `"ban+l"`: that, and the compiled loss;
    * `"cwtm"`: the cross-entropy with the labels, each row weighted by `max_k t_k`
      over the sum of these in the batch;
    * `"dkpp"`: as `"ban"`, with the classes that the teacher did not choose shuffled
      in every row.

    With a `directory` every generation is saved, and the same call continues a chain
    that was interrupted: finished generations are loaded, the one in progress goes on.
    A larger `generations` makes a finished chain longer. The data are not checked: it
    is up to you to give the same.

    Args:
        build: Function without arguments that returns a new, untrained model.
        compile_args: Arguments of `compile`, or a function that returns them. Every
            generation gets its own copy of the optimizer.
        data: What `fit` takes: a data set, or a tuple `(x, y)` or
            `(x, y, sample_weight)`.
        generations: Number of models.
        epochs: Of each generation.
        validation_data: What `fit` takes.
        callbacks: Callbacks for every generation, or a function of its index that
            returns them.
        directory: Folder that keeps the chain.
        method: `"ban"`, `"ban+l"`, `"cwtm"` or `"dkpp"`.
        **fit: Further arguments of `fit`, such as `batch_size` or `verbose`.

    Returns:
        The models, their logs, a table and the ensemble of the generations.

    Raises:
        TypeError: If `compile_args` is neither a dict nor a function.
        ValueError: If an argument is out of range, or the folder holds another chain
            or a damaged file.

    Example:

    ```python
    result = kd.generations.born_again(
        build,
        {"optimizer": "adam", "loss": loss, "metrics": ["accuracy"]},
        (x, y),
        generations=2,
        epochs=2,
        validation_data=(x, y),
    )
    print(result.table)
    ```

    References:
        Furlanello et al., Born-Again Neural Networks, ICML 2018 (arXiv 1805.04770).
    """
    if method not in METHODS:
        raise ValueError(
            f"`method` must be one of {', '.join(METHODS)}. Received: {method!r}"
        )

    def taught(teacher: keras.Model) -> BaseDistiller:
        loss: Any = SoftTarget(1.0, divergence="cross_entropy")
        if method == "cwtm":
            loss = ConfidenceWeighted()
        elif method == "dkpp":
            loss = PermutedTarget()
        alpha = 1.0 if method == "ban+l" else 0.0
        distiller = Distiller(build(), teacher, alpha=alpha, beta=1.0, soft_loss=loss)
        if method == "dkpp":
            # Keras finds random states only where they are a layer's own attributes.
            distiller.seed_generator = distiller.soft_loss.seed_generator
        return distiller

    return _same_size(build, taught, generations, data).run(
        {"chain": "born_again", "method": method},
        compile_args,
        epochs=epochs,
        validation_data=validation_data,
        callbacks=callbacks,
        directory=directory,
        **fit,
    )


def label_refinery(
    build: Build,
    compile_args: Any,
    data: Any,
    *,
    generations: int = 3,
    epochs: int,
    validation_data: Any = None,
    callbacks: Any = (),
    directory: str | os.PathLike | None = None,
    **fit: Any,
) -> Generations:
    r"""Replaces the labels by what the last model says about the very same image.

    The first generation learns from the labels. Each later one minimises
    `KL(t | p)` at temperature 1, without labels, where the teacher sees the same
    augmented crop as the student: a crop without the object loses its wrong label.
    Augmentation therefore belongs into `data`, not into the model.

    Args:
        build: As in `born_again`.
        compile_args: As in `born_again`.
        data: As in `born_again`.
        generations: Number of models.
        epochs: Of each generation.
        validation_data: What `fit` takes.
        callbacks: As in `born_again`.
        directory: As in `born_again`.
        **fit: Further arguments of `fit`.

    Returns:
        The models, their logs, a table and the ensemble of the generations.

    Raises:
        TypeError: As `born_again`.
        ValueError: As `born_again`.

    Example:

    ```python
    result = kd.generations.label_refinery(build, options, augmented, epochs=2)
    ```

    References:
        Bagherinezhad et al., Label Refinery, 2018 (arXiv 1805.02641).
    """

    def taught(teacher: keras.Model) -> BaseDistiller:
        loss = SoftTarget(1.0)
        return Distiller(build(), teacher, alpha=0.0, beta=1.0, soft_loss=loss)

    return _same_size(build, taught, generations, data).run(
        {"chain": "label_refinery"},
        compile_args,
        epochs=epochs,
        validation_data=validation_data,
        callbacks=callbacks,
        directory=directory,
        **fit,
    )


def teacher_assistant(
    build: Build,
    compile_args: Any,
    data: Any,
    *,
    sizes: Sequence[Any],
    epochs: int,
    validation_data: Any = None,
    callbacks: Any = (),
    directory: str | os.PathLike | None = None,
    temperature: float = 4.0,
    alpha: float = 0.1,
    beta: float = 0.9,
    **fit: Any,
) -> Generations:
    r"""Bridges the gap from a large teacher to a small student by models in between.

    `build(sizes[0])` learns from the labels, `build(sizes[i])` from labels and the
    model before it: `alpha * compiled loss + beta * T² KL`. The last is the student.

    Args:
        build: Function of a size that returns a new, untrained model.
        compile_args: As in `born_again`.
        data: As in `born_again`.
        sizes: What `build` is called with: teacher, assistants, student.
        epochs: Of each model.
        validation_data: What `fit` takes.
        callbacks: As in `born_again`.
        directory: As in `born_again`; it remembers the sizes by their `repr`.
        temperature: T, above 0.
        alpha: Weight of the compiled loss.
        beta: Weight of the soft targets.
        **fit: Further arguments of `fit`.

    Returns:
        The models in the order of `sizes`, their logs, a table and their ensemble.

    Raises:
        TypeError: As `born_again`.
        ValueError: As `born_again`; if there are fewer than two sizes.

    Example:

    ```python
    result = kd.generations.teacher_assistant(
        build, options, (x, y), sizes=[64, 16, 4], epochs=2
    )
    student = result.models[-1]
    ```

    References:
        Mirzadeh et al., Improved Knowledge Distillation via Teacher Assistant,
        AAAI 2020 (arXiv 1902.03393).
    """
    if len(sizes) < 2:
        raise ValueError(
            "`sizes` must hold at least two sizes, the teacher's and the student's. "
            f"Received: {sizes!r}"
        )

    def first(size: Any) -> Any:
        return lambda teacher: BaseDistiller(build(size))

    def taught(size: Any) -> Any:
        return lambda teacher: Distiller(
            build(size), teacher, temperature=temperature, alpha=alpha, beta=beta
        )

    steps = [first(sizes[0]), *(taught(size) for size in sizes[1:])]
    settings = {
        "chain": "teacher_assistant",
        "sizes": [repr(size) for size in sizes],
        "weights": [temperature, alpha, beta],
    }
    return Chain(steps, [data] * len(steps)).run(
        settings,
        compile_args,
        epochs=epochs,
        validation_data=validation_data,
        callbacks=callbacks,
        directory=directory,
        **fit,
    )


def noisy_student(
    build: Build,
    compile_args: Any,
    data: Any,
    *,
    unlabelled: Any,
    generations: int = 3,
    epochs: int,
    validation_data: Any = None,
    callbacks: Any = (),
    directory: str | os.PathLike | None = None,
    **fit: Any,
) -> Generations:
    r"""Self-training: students that are noised learn from a teacher that is not.

    The first generation learns from the labelled data. Each later one minimises the
    compiled loss on the labelled rows plus `-Σ_k t_k log p_k` (temperature 1) on all
    rows. The noise is the model's own: its dropout, stochastic depth and augmentation
    layers act on the student and not on the teacher, which runs in inference mode.
    (The paper takes the teacher's word for unlabelled rows alone; here labelled rows
    have it, too.)

    From the second generation on, arrays are joined, and an epoch is one pass over
    both. Data sets are joined batch by batch, and an epoch is one pass over the
    unlabelled one, the other being repeated.

    Args:
        build: As in `born_again`; for students that grow, let it count its calls.
        compile_args: As in `born_again`.
        data: Labelled data: a batched data set, or a tuple `(x, y)` of arrays.
        unlabelled: Inputs alone: a batched data set of `x`, or arrays.
        generations: Number of models.
        epochs: Of each generation.
        validation_data: What `fit` takes.
        callbacks: As in `born_again`.
        directory: As in `born_again`.
        **fit: Further arguments of `fit`.

    Returns:
        The models, their logs, a table and the ensemble of the generations.

    Raises:
        TypeError: As `born_again`.
        ValueError: As `born_again`; if one of the two data is arrays and the other is
            not, `data` are not pairs of inputs and labels of one output, or the
            compiled loss knows no rows without a label.

    Example:

    ```python
    result = kd.generations.noisy_student(
        build, options, (x, y), unlabelled=more, generations=2, epochs=2
    )
    ```

    References:
        Xie et al., Self-training with Noisy Student improves ImageNet classification,
        CVPR 2020 (arXiv 1911.04252).
    """

    def taught(teacher: keras.Model) -> BaseDistiller:
        loss = SoftTarget(1.0, divergence="cross_entropy")
        return Distiller(build(), teacher, alpha=1.0, beta=1.0, soft_loss=loss)

    none = missing_label(compile_args, data)
    chain = _same_size(build, taught, generations, joined(data, unlabelled, none))
    return Chain(chain.steps, [data, *chain.data[1:]]).run(
        {"chain": "noisy_student"},
        compile_args,
        epochs=epochs,
        validation_data=validation_data,
        callbacks=callbacks,
        directory=directory,
        **fit,
    )


def _same_size(build: Build, taught: Any, generations: int, data: Any) -> Chain:
    if not isinstance(generations, int) or generations < 1:
        raise ValueError(
            f"`generations` must be an integer above 0. Received: {generations!r}"
        )
    steps = [lambda teacher: BaseDistiller(build()), *[taught] * (generations - 1)]
    return Chain(steps, [data] * generations)
