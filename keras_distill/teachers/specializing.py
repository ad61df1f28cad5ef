"""Specialists, made from a generalist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_distill.heads import Head
from keras_distill.inputs import rows_of
from keras_distill.taps import call_model
from keras_distill.teachers.bias import add_to_bias, last_bias
from keras_distill.teachers.specialists import Specialists

SHUFFLED = 10_000  # rows that are mixed with each other


def train_specialists(
    generalist: keras.Model,
    build: Callable[[int], keras.Model],
    data: Any,
    num_specialists: int,
    *,
    epochs: int = 1,
    batch_size: int = 128,
    optimizer: Any = "adam",
    top: int = 1,
    seed: int = 0,
    **fit: Any,
) -> Specialists:
    r"""Divides the classes by what the generalist confuses, and trains specialists.

    1. The columns of the covariance of the generalist's predictions are grouped by
       k-means (of scikit-learn): classes that it often takes for each other come
       together. Each group is a specialist's.
    2. A specialist has one output for each of its classes and one for all others, the
       dustbin. It begins with the generalist's weights; its dustbin with the mean of
       those of the other classes.
    3. It is trained by cross-entropy on batches of which one half shows its classes
       and the other half any others. An epoch shows each row of its classes once.
    4. To its dustbin's bias comes `log((1 - s) / s)`, with s the share of its classes
       in the data: by this factor its own classes were over-sampled against the rest.
       (The paper says: by which its classes are over-sampled. The rest is over-sampled
       too, and the quotient is what makes up for it exactly.)

    Args:
        generalist: A trained model with one output over C classes.
        build: Function of the number of classes that returns a new model, the same as
            the generalist but for the units of its last layer, which has a bias.
        data: `(x, y)`, arrays, or a `tf.data.Dataset` of such single rows, not
            batches; y integer labels.
        num_specialists: Number of groups, 2 to C.
        epochs: Of each specialist.
        batch_size: Even; of the training, and of the generalist's predictions.
        optimizer: As in `compile`; each specialist gets a copy of its own.
        top: As in `kd.teachers.Specialists`.
        seed: Of the grouping and of the order of the rows.
        **fit: Further arguments of `fit`, such as `verbose` or `callbacks`.

    Returns:
        The generalist with its specialists, ready as a teacher.

    Raises:
        TypeError: If the generalist is not a Keras model, or labels are no integers.
        ValueError: If a number is out of range, `build` makes another architecture, a
            group has no rows, or the generalist tells too few classes apart.

    Example:

    ```python
    teacher = kd.teachers.train_specialists(generalist, build, (x, y), 3, epochs=2)
    distiller = kd.Distiller(student, teacher)
    ```

    References:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015,
        section 5 (arXiv 1503.02531).
    """
    head, _ = last_bias("generalist", generalist)
    count = head.classes
    if not isinstance(num_specialists, int) or not 2 <= num_specialists <= count:
        raise ValueError(
            f"`num_specialists` must be an integer from 2 to {count}, the number of "
            f"classes. Received: {num_specialists!r}"
        )
    if not isinstance(batch_size, int) or batch_size < 2 or batch_size % 2:
        raise ValueError(
            f"`batch_size` must be an even integer above 0. Received: {batch_size!r}"
        )
    parts = _parts_of_head(generalist, build, count)
    rows = _rows(data)
    covariance, frequency = _statistics(generalist, head, rows.batch(batch_size))
    specialists = []
    groups = _groups(covariance, num_specialists, seed)
    for ids in groups:
        special = int(frequency[ids].sum())
        rest = int(frequency.sum()) - special
        if not special or not rest:
            raise ValueError(
                f"`data` must have rows of the classes {ids.tolist()} and of others. "
                f"Received: {special} and {rest}"
            )
        model = build(len(ids) + 1)
        _begin_as(model, generalist, parts, ids)
        specialist_head, bias = last_bias("build", model)
        model.compile(
            _copy_of(optimizer),
            keras.losses.SparseCategoricalCrossentropy(
                from_logits=specialist_head.kind == "logits"
            ),
        )
        model.fit(
            _half_and_half(rows, ids, count, batch_size, seed),
            steps_per_epoch=-(-special // (batch_size // 2)),
            epochs=epochs,
            **{"shuffle": False, **fit},  # the rows are shuffled already
        )
        add_to_bias(bias, np.array([len(ids)]), np.log([rest / special]))
        specialists.append(model)
    return Specialists(generalist, specialists, [g.tolist() for g in groups], top=top)


def _rows(data: Any) -> tf.data.Dataset:
    """Single rows `(x, y)`, y a scalar."""
    if not isinstance(data, tf.data.Dataset):
        if not isinstance(data, tuple) or len(data) != 2:
            raise ValueError(
                "`data` must be a tuple (x, y) or a tf.data.Dataset of such rows. "
                f"Received: {type(data).__name__}"
            )
        data = rows_of(data)
    spec = data.element_spec
    if not isinstance(spec, tuple) or len(spec) != 2:
        raise ValueError(f"`data` must have rows (x, y). Received: {spec}")
    if not spec[1].dtype.is_integer or spec[1].shape.num_elements() != 1:
        raise TypeError(
            "`data`: y must be one integer label per row (single rows, not batches). "
            f"Received: {spec[1]}"
        )
    return data.map(lambda x, y: (x, tf.cast(tf.reshape(y, ()), "int64")))


def _statistics(
    generalist: keras.Model, head: Head, batches: tf.data.Dataset
) -> tuple[np.ndarray, np.ndarray]:
    """Covariance of the predictions, and how often each class is in the labels."""

    @tf.function
    def probabilities(x: Any) -> Any:
        return ops.softmax(head.logits(call_model(generalist, x, False)))

    count = head.classes
    mean, product = np.zeros(count), np.zeros((count, count))
    frequency = np.zeros(count, "int64")
    for x, y in batches:
        labels = y.numpy()
        if labels.min() < 0 or labels.max() >= count:
            raise ValueError(
                f"`data`: labels must be from 0 to {count - 1}. Received: "
                f"{labels.min()} to {labels.max()}"
            )
        p = probabilities(x).numpy().astype("float64")
        mean += p.sum(0)
        product += p.T @ p
        frequency += np.bincount(labels, minlength=count)
    total = frequency.sum()
    if not total:
        raise ValueError("`data` has no rows.")
    mean /= total
    return product / total - np.outer(mean, mean), frequency


def _groups(covariance: np.ndarray, number: int, seed: int) -> list[np.ndarray]:
    from sklearn.cluster import KMeans

    different = len(np.unique(covariance.round(12), axis=1).T)
    if different < number:
        raise ValueError(
            f"`num_specialists`: the generalist tells only {different} groups of "
            f"classes apart. Received: {number}"
        )
    means = KMeans(number, n_init=10, random_state=seed)
    group = means.fit_predict(covariance.T)
    return [np.flatnonzero(group == m) for m in range(number)]


def _parts_of_head(
    generalist: keras.Model, build: Callable[[int], keras.Model], count: int
) -> list[int | None]:
    """For each variable the axis along which it has one entry per class, or None."""
    other = build(count + 1)
    shapes = [tuple(v.shape) for v in generalist.variables]
    wider = [tuple(v.shape) for v in other.variables]
    axes: list[int | None] = []
    for one, two in zip(shapes, wider, strict=False):
        differ = [i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
        axes.append(differ[0] if differ else None)
        fits = not differ or (one[differ[0]], two[differ[0]]) == (count, count + 1)
        if len(one) != len(two) or len(differ) > 1 or not fits:
            break
    else:
        if len(shapes) == len(wider) and any(axis is not None for axis in axes):
            return axes
    raise ValueError(
        "`build(classes)` must return the generalist's architecture with that number "
        f"of classes. The generalist's variables have shapes {shapes}; those of "
        f"build({count + 1}) have {wider}"
    )


def _begin_as(
    model: keras.Model,
    generalist: keras.Model,
    parts: list[int | None],
    ids: np.ndarray,
) -> None:
    """Copies the weights; the dustbin gets the mean of the classes that it is for."""
    rest = [c for c in range(_classes(generalist, parts)) if c not in ids]
    for target, source, axis in zip(
        model.variables, generalist.variables, parts, strict=True
    ):
        value = ops.convert_to_numpy(source)
        if axis is not None:
            dustbin = value.take(rest, axis).mean(axis, keepdims=True)
            if value.ndim == 1:  # so many classes are likelier than one
                dustbin = dustbin + np.log(len(rest)).astype(value.dtype)
            value = np.concatenate([value.take(ids, axis), dustbin], axis)
        target.assign(value)


def _classes(generalist: keras.Model, parts: list[int | None]) -> int:
    pairs = zip(generalist.variables, parts, strict=True)
    return next(v.shape[axis] for v, axis in pairs if axis is not None)


def _half_and_half(
    rows: tf.data.Dataset, ids: np.ndarray, count: int, batch_size: int, seed: int
) -> tf.data.Dataset:
    """Batches without end: a half of the classes `ids`, a half of the dustbin."""
    label = np.full(count, len(ids))
    label[ids] = np.arange(len(ids))
    table = tf.constant(label)
    relabelled = rows.map(lambda x, y: (x, tf.gather(table, y)))

    def half(part: tf.data.Dataset) -> tf.data.Dataset:
        return part.shuffle(SHUFFLED, seed=seed).repeat().batch(batch_size // 2)

    special = half(relabelled.filter(lambda x, y: y < len(ids)))
    rest = half(relabelled.filter(lambda x, y: tf.equal(y, len(ids))))

    def joined(one: Any, other: Any) -> Any:
        return tf.nest.map_structure(lambda *p: tf.concat(p, 0), one, other)

    return tf.data.Dataset.zip(special, rest).map(joined).prefetch(2)


def _copy_of(optimizer: Any) -> Any:
    if isinstance(optimizer, str):
        return optimizer
    config = keras.saving.serialize_keras_object(optimizer)
    return keras.saving.deserialize_keras_object(config)
