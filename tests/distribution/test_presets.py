"""The presets learn on two replicas what one device learns."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers
from offline import nets

import keras_distill as kd

KINDS = {  # the hint has a first stage, and is among those below
    name: kind for name, kind in nets.KINDS.items() if name != "hint"
}


def net(width):
    """As `nets.net`, with statistics over the global batch and without dropout."""
    x = inputs = keras.Input((8, 8, 1))
    for stage in (1, 2, 3):
        stride = 1 if stage == 1 else 2
        x = layers.Conv2D(width * stage, 3, stride, "same", name=f"conv{stage}")(x)
        x = layers.BatchNormalization(synchronized=True, name=f"norm{stage}")(x)
        x = layers.ReLU(name=f"relu{stage}")(x)
    x = layers.GlobalAveragePooling2D(name="embedding")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x))


@pytest.fixture(scope="module")
def teacher():
    keras.utils.set_random_seed(1)
    return net(6)


def run(build, teacher, width, across=False, hints=False, indexed=False):
    """Two batches, of 16 and 10 rows. Eagerly, which needs no graphs."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(26, 8, 8, 1)).astype("float32")
    y = np.arange(26) % 10
    data = {"input": x, "kd_index": np.arange(26)} if indexed else x
    y[18:21] = -1  # on the first replica more than on the second
    keras.utils.set_random_seed(0)
    made = build(net(width), teacher)
    for layer in made._flatten_layers():  # what adapters have of it
        if isinstance(layer, layers.BatchNormalization):
            layer.synchronized = True
    made.compile(
        keras.optimizers.SGD(1e-3, momentum=0.9),
        nets.SPARSE,
        metrics=["accuracy"],
        run_eagerly=True,
        across_replicas=across and made.compares_rows,
    )
    data = {"x": data, "y": y, "batch_size": 16, "shuffle": False, "verbose": 0}
    logs = made.fit_hints(**data).history if hints else {}
    return made, logs | made.fit(**data).history


def check_equal(strategy, *args, **kwargs):
    one, expected = run(*args, **kwargs)
    with strategy.scope():
        two, found = run(*args, **kwargs, across=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for variable, wanted in zip(two.variables, one.variables, strict=True):
        if variable.dtype != "float32":
            continue
        error = np.linalg.norm(variable.numpy() - wanted.numpy())
        assert error <= 1e-5 * max(np.linalg.norm(wanted.numpy()), 0.1), variable.path


@pytest.mark.parametrize("kind", KINDS)
def test_presets(strategy, teacher, kind):
    build, _, width = KINDS[kind]
    check_equal(strategy, build, teacher, width, indexed=kind == "contrastive")


@pytest.mark.parametrize("kind", nets.STAGED)
def test_presets_with_a_first_stage(strategy, teacher, kind):
    build, _, width = nets.STAGED[kind]
    check_equal(strategy, build, teacher, width, hints=True)


def test_an_ensemble(strategy, teacher):
    def build(student, teacher):
        link = kd.Link("relu3", "1/relu3", "mse", adapter="auto")
        return kd.Distiller(student, [net(4), teacher], links=[link])

    check_equal(strategy, build, teacher, 3)


def test_teacher_free(strategy):
    check_equal(strategy, lambda student, _: kd.TeacherFree(student), None, 3)
