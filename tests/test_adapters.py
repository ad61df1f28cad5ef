"""Adapters: the shapes they map, their parameters, saving, and bad shapes."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_distill import adapters, losses, teachers
from keras_distill.specs import symbolic_run
from tests.losses.golden import load


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


GRIDS = ((None, 6, 6, 3), (None, 4, 4, 5))
MADE = [
    (adapters.Regressor(), *GRIDS),
    (adapters.Regressor(), (None, 3, 5, 4), (None, 6, 2, 4)),
    (adapters.Regressor(use_bias=True, activation="relu"), (None, 7), (None, 4)),
    (adapters.Regressor(), (None, 6, 3), (None, 4, 5)),
    (adapters.Regressor(), (None, 4, 4, 3), (None, 5)),
    (adapters.Regressor(), (None, None, None, 3), (None, None, None, 5)),
    (
        adapters.Regressor(
            grid="convolution",
            use_bias=True,
            batch_normalization=True,
            activation="relu",
        ),
        *GRIDS,
    ),
    (adapters.VariationalHead(hidden=7), *GRIDS),
    (adapters.VariationalHead(), (None, 6), (None, 4)),
    (adapters.Connector(), *GRIDS),
    (adapters.Connector(), (None, 6, 3), (None, 6, 5)),
    (adapters.Projector(), *GRIDS),
    (adapters.Translator(), *GRIDS),
    (adapters.Translator(batch_normalization=True), *GRIDS),
    (adapters.MaskedGeneration(seed=1), *GRIDS),
    (adapters.MaskedGeneration(mask="pixel", rate=0.5, seed=1), *GRIDS),
    (
        adapters.Fusion(width=6),
        [(None, 8, 8, 3), (None, 4, 4, 4), (None, 5)],
        [(None, 8, 8, 2), (None, 2, 2, 7), (None, 6)],
    ),
]


def shapes(tree):
    one = tree and not isinstance(tree[0], tuple)
    return [tree] if one else list(tree)


@pytest.mark.parametrize(
    ("adapter", "student", "teacher"),
    MADE,
    ids=[f"{i}-{type(a).__name__}" for i, (a, *_) in enumerate(MADE)],
)
def test_maps_shapes_and_saves(adapter, student, teacher, tmp_path):
    """Told both shapes it gives the teacher's; saved inside a model it stays itself."""
    adapter = type(adapter).from_config(adapter.get_config())  # the table is shared
    adapter.match(student, teacher)
    adapter.match(student, teacher)  # twice is no contradiction
    inputs = [keras.Input(shape[1:]) for shape in shapes(student)]
    outputs = keras.tree.flatten(
        adapter(inputs if isinstance(student, list) else inputs[0], training=False)
    )
    for output, shape in zip(outputs, shapes(teacher), strict=False):
        assert tuple(output.shape) == shape
    model = keras.Model(inputs, outputs)
    data = [random(2, *(n or 3 for n in s[1:])) for s in shapes(student)]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(model(data), again(data), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()
    # Every weight takes part.
    with tf.GradientTape() as tape:
        found = keras.tree.flatten(model(data, training=True))
        value = sum(tf.reduce_sum(x * random(*x.shape, seed=3)) for x in found)
    gradients = tape.gradient(value, model.trainable_variables)
    assert all(g is not None and np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_dtype_policies_reach_the_layers_inside(policy):
    wanted = keras.DTypePolicy(policy).compute_dtype
    for kind in (adapters.Regressor, adapters.Connector, adapters.MaskedGeneration):
        adapter = kind(target_shape=(4, 4, 5), dtype=policy)
        output = adapter(random(2, 6, 6, 3), training=True)
        assert keras.backend.standardize_dtype(output.dtype) == wanted
        assert np.isfinite(ops.convert_to_numpy(ops.cast(output, "float32"))).all()
    mean, rho = adapters.VariationalHead(target_shape=(4, 4, 5), dtype=policy)(
        random(2, 6, 6, 3)
    )
    assert keras.backend.standardize_dtype(mean.dtype) == wanted
    assert keras.backend.standardize_dtype(rho.dtype) != "float16"


def parameters(adapter):
    return [tuple(weight.shape) for weight in adapter.trainable_weights]


def test_regressor_is_the_smallest_layer():
    for student, teacher, wanted in (
        ((None, 4, 4, 3), (None, 4, 4, 3), []),
        ((None, 8, 8, 3), (None, 4, 4, 3), []),
        ((None, 4, 4, 3), (None, 8, 8, 5), [(1, 1, 3, 5)]),
        ((None, 3), (None, 5), [(3, 5)]),
        ((None, 4, 4, 3), (None, 5), [(3, 5)]),
    ):
        regressor = adapters.Regressor()
        regressor.match(student, teacher)
        regressor.build(student)
        assert parameters(regressor) == wanted


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [(8, 4, (3, 3, 2, 5)), (7, 4, (4, 4, 2, 5)), (4, 8, (4, 4, 5, 2))]
    + [(6, 4, (3, 3, 2, 5)), (4, 4, (1, 1, 2, 5))],
)
def test_regressor_by_convolution(student, teacher, kernel):
    regressor = adapters.Regressor(
        target_shape=(teacher, teacher, 5), grid="convolution", use_bias=True
    )
    output = regressor(random(2, student, student, 2))
    assert tuple(output.shape) == (2, teacher, teacher, 5)
    assert parameters(regressor) == [kernel, (5,)]


def test_strided_regressor_pads_both_sides():
    """As PyTorch does with padding=1; "same" would pad an even grid behind only."""
    regressor = adapters.Regressor(target_shape=(4, 4, 3), grid="convolution")
    x = random(1, 8, 8, 2)
    output = np.array(regressor(x))
    kernel = regressor.trainable_weights[0]
    both = [[0, 0], [1, 1], [1, 1], [0, 0]]
    expected = tf.nn.conv2d(x, kernel.value, 2, both)
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_resampling_pools_and_interpolates():
    ramp = np.arange(8, dtype="float32").reshape(1, 8, 1)
    pooled = adapters.Regressor(target_shape=(4, 1))(ramp)
    np.testing.assert_allclose(np.ravel(pooled), [0.5, 2.5, 4.5, 6.5])
    overlapping = adapters.Regressor(target_shape=(3, 1))(ramp)
    np.testing.assert_allclose(np.ravel(overlapping), [1.0, 3.5, 6.0])
    larger = adapters.Regressor(target_shape=(16, 1))(ramp)
    wanted = np.interp((np.arange(16) + 0.5) / 2 - 0.5, np.arange(8), np.arange(8))
    np.testing.assert_allclose(np.ravel(larger), wanted, rtol=1e-6)


def test_variance_starts_at_five():
    head = adapters.VariationalHead(target_shape=(4, 4, 5))
    mean, rho = head(random(2, 4, 4, 3))
    np.testing.assert_allclose(np.log1p(np.exp(rho)) + 1e-5, 5.0, rtol=1e-6)
    value = losses.VariationalInformation()(mean, [mean, rho])
    assert float(value) == pytest.approx(math.log(5.0) / 2, rel=1e-5)


def test_symbolic_run_sees_both_outputs_of_the_head():
    head = adapters.VariationalHead(target_shape=(4, 4, 5))
    mean, rho = symbolic_run(head, keras.KerasTensor((None, 4, 4, 3)))
    assert (mean.shape, rho.shape) == ((None, 4, 4, 5), (5,))


def test_margins():
    golden = load("ofd").arrays
    for i in range(2):
        layer = keras.layers.BatchNormalization(dtype="float64")
        layer.build((None, len(golden[f"out_margin_{i}"])))
        layer.gamma.assign(golden[f"teacher_bn_gamma_{i}"])
        layer.beta.assign(golden[f"teacher_bn_beta_{i}"])
        found = adapters.margins(layer)
        np.testing.assert_allclose(found, golden[f"out_margin_{i}"], rtol=1e-9)


def test_margins_at_the_limits():
    layer = keras.layers.BatchNormalization()
    layer.build((None, 4))
    layer.gamma.assign([0.0, 0.0, -1.0, 1.0])
    layer.beta.assign([-2.0, 3.0, 10.0, 0.0])
    wanted = [-2.0, 0.0, -3.0, -math.sqrt(2 / math.pi)]
    np.testing.assert_allclose(adapters.margins(layer), wanted, atol=1e-7)
    plain = keras.layers.BatchNormalization(scale=False, center=False)
    plain.build((None, 2))
    np.testing.assert_allclose(adapters.margins(plain), wanted[3:] * 2)
    with pytest.raises(TypeError, match="BatchNormalization"):
        adapters.margins(keras.layers.Dense(2))
    with pytest.raises(ValueError, match="never built"):
        adapters.margins(keras.layers.BatchNormalization())


def test_masks_hide_channels_or_pixels_in_training_only():
    x = np.ones((64, 3, 3, 4), "float32")
    for kind, axes in (("channel", (1, 2)), ("pixel", (3,))):
        generation = adapters.MaskedGeneration((3, 3, 4), mask=kind, rate=0.4, seed=2)
        generation.build(x.shape)
        # The generator is made to hand its input through.
        for layer in (generation.first, generation.second):
            kernel = np.zeros((3, 3, 4, 4), "float32")
            kernel[1, 1] = np.eye(4)
            layer.kernel.assign(kernel)
        np.testing.assert_array_equal(generation(x), x)
        hidden = np.array(generation(x, training=True))
        assert set(np.unique(hidden)) == {0.0, 1.0}
        assert np.all(hidden.std(axes) == 0)
        assert abs(hidden.mean() - 0.6) < 0.08
        assert np.any(hidden != np.array(generation(x, training=True)))


def test_fusion_lets_deep_stages_reach_shallow_ones():
    fusion = adapters.Fusion(target_shapes=[(4, 4, 3), (6,)])
    taps = [random(2, 4, 4, 2), random(2, 5, seed=1)]
    shallow, deep = fusion(taps)
    other_shallow, other_deep = fusion([taps[0], taps[1] + 1])
    assert np.any(np.array(shallow) != np.array(other_shallow))
    unchanged, _ = fusion(taps)
    np.testing.assert_array_equal(shallow, unchanged)
    _, same_deep = fusion([taps[0] + 1, taps[1]])
    np.testing.assert_array_equal(deep, same_deep)
    value = losses.HierarchicalContext()([shallow, deep], [other_shallow, other_deep])
    assert float(value) > 0


def teacher_model():
    inputs = keras.Input((4, 4, 2))
    x = keras.layers.Conv2D(6, 3, padding="same", activation="relu", name="t")(inputs)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))


def test_paraphraser_learns_the_teachers_features_and_is_frozen():
    keras.utils.set_random_seed(0)
    teacher = teacher_model()
    before = teacher.get_weights()
    x = random(32, 4, 4, 2)
    paraphraser = adapters.Paraphraser()
    history = paraphraser.pretrain(
        teacher, "t", x, epochs=80, optimizer=keras.optimizers.Adam(0.01), verbose=0
    )
    losses_ = history.history["loss"]
    assert losses_[-1] < 0.7 * losses_[0]
    assert not paraphraser.trainable_weights
    assert teacher.trainable_weights
    for a, b in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    factor = paraphraser(random(2, 4, 4, 6), training=True)
    translator = adapters.Translator()
    translator.match((None, 4, 4, 5), (None, *factor.shape[1:]))
    value = losses.FactorTransfer()(factor, translator(random(2, 4, 4, 5)))
    assert 0 < float(value) < 1


def test_paraphraser_takes_data_sets_with_labels():
    data = tf.data.Dataset.from_tensor_slices(
        (random(8, 4, 4, 2), np.zeros(8, "int32"))
    )
    teacher = teacher_model()
    paraphraser = adapters.Paraphraser()
    layer = teacher.get_layer("t")
    for known in (teacher, teachers.Model(teacher)):
        paraphraser.pretrain(known, layer, data.batch(4), epochs=1)
    again = adapters.Paraphraser.from_config(paraphraser.get_config())
    assert not again.trainable
    with pytest.raises(ValueError, match="no layer 'u'"):
        paraphraser.pretrain(teacher, "u", data.batch(4), epochs=1)


@pytest.mark.parametrize(
    ("adapter", "student", "teacher"),
    [
        (adapters.Regressor(), (None, 3), (None, 4, 4, 3)),
        (adapters.Regressor(), (None, 4, 4, None), (None, 4, 4, 3)),
        (adapters.Regressor(), (None, None, 4, 3), (None, 4, 4, 3)),
        (adapters.Regressor(), [(None, 3), (None, 3)], (None, 3)),
        (adapters.Regressor(grid="convolution"), (None, 3, 3, 2), (None, 5, 5, 2)),
        (adapters.Regressor(grid="convolution"), (None, 3), (None, 5)),
        (adapters.VariationalHead(), (None, 4, 4, 3), (None, 3)),
        (adapters.Connector(), (None, 4, 4, 3), (None, 3)),
        (adapters.Projector(), (None, 2, 2, 3), (None, 4, 4, 3)),
        (adapters.Projector(), (None, 3), (None, 3)),
        (adapters.Translator(), (None, 3), (None, 3)),
        (adapters.MaskedGeneration(), (None, 3), (None, 3)),
        (adapters.Fusion(), (None, 4, 4, 3), (None, 4, 4, 3)),
        (adapters.Fusion(), [(None, 3)], [(None, 3), (None, 3)]),
        (adapters.Fusion(), [(None, 4, 3)], [(None, 4, 3)]),
        (adapters.Connector(target_shape=(5,)), (None, 3), (None, 4)),
        (adapters.Fusion(target_shapes=[(5,)]), [(None, 3)], [(None, 4)]),
    ],
)
def test_bad_shapes(adapter, student, teacher):
    with pytest.raises(ValueError, match=f"{type(adapter).__name__}.*[Rr]eceived"):
        adapter.match(student, teacher)


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapters.Regressor(grid="pool"),
        lambda: adapters.Projector(factor=0),
        lambda: adapters.VariationalHead(variance=0.0),
        lambda: adapters.MaskedGeneration(mask="patch"),
        lambda: adapters.MaskedGeneration(rate=1.0),
        lambda: adapters.Paraphraser(rate=0.0),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="Received"):
        make()


@pytest.mark.parametrize("make", [adapters.Regressor, adapters.Fusion])
def test_an_adapter_without_a_target_says_so(make):
    x = random(2, 3)
    with pytest.raises(ValueError, match="does not know"):
        make()([x] if make is adapters.Fusion else x)


def test_paraphraser_needs_a_grid():
    with pytest.raises(ValueError, match="Paraphraser.*Received"):
        adapters.Paraphraser()(random(2, 3))
