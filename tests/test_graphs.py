"""Functional graphs are cut at a layer, and put together again."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from keras_distill.copies import Origin, clone
from keras_distill.graphs import Graph


def _x(shape=(8, 8, 3), rows=3):
    return np.random.default_rng(0).normal(size=(rows, *shape)).astype("float32")


def _cut(model, *at):
    graph = Graph(model)
    parts = graph.split([graph.tensor_of(layer, "at") for layer in at], "at")
    built = [part.build(f"part_{i}") for i, part in enumerate(parts)]
    origin = Origin.of(model, [names for _, names in built])
    for index, (part, _) in enumerate(built):
        origin.scatter(model, part, index)
    return [part for part, _ in built], origin


def _run(parts, x):
    for part in parts:
        x = part(x, training=False)
    return np.asarray(x)


def _residual():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", name="first")(inputs)
    y = layers.BatchNormalization(name="norm")(x)
    y = layers.Conv2D(4, 3, padding="same", name="second")(y)
    x = layers.Add(name="sum")([x, y])
    x = keras.ops.relu(x) + 0.5
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(3, name="logits")(x), name="residual")


def _nested():
    inputs = keras.Input((8, 8, 3))
    x = _residual_backbone()(inputs)
    head = keras.Sequential([layers.Dense(5), layers.Dense(3)], name="head")
    return keras.Model(inputs, head(x), name="nested")


def _residual_backbone():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    block = keras.Sequential(
        [layers.ReLU(), layers.Conv2D(4, 3, name="conv")], name="b"
    )
    return keras.Model(inputs, layers.Flatten()(block(x)), name="backbone")


def _sequential():
    return keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(4, name="d"),
         layers.Dense(3)]
    )  # fmt: skip


def _randomize(model):
    generator = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(generator.uniform(0.2, 0.8, weight.shape))
    return model


@pytest.mark.parametrize(
    ("make", "cuts"),
    [
        (_residual, ["sum"]),
        (_residual, ["first", "pool"]),
        (_nested, ["backbone"]),
        (_nested, ["backbone/conv", "backbone/b/conv", "head/dense"]),
        (_sequential, ["d"]),
    ],
)
def test_the_parts_compute_what_the_model_computes(make, cuts):
    keras.backend.clear_session()
    model = _randomize(make())
    parts, origin = _cut(model, *cuts)
    expected = np.asarray(model(_x()))
    np.testing.assert_allclose(_run(parts, _x()), expected, rtol=1e-6)
    again = origin.assemble(parts)
    assert again.get_config() == model.get_config()
    assert [w.shape for w in again.weights] == [w.shape for w in model.weights]
    np.testing.assert_array_equal(np.asarray(again(_x())), expected)
    loaded = Origin.from_json(origin.to_json()).assemble(parts)
    np.testing.assert_array_equal(np.asarray(loaded(_x())), expected)


def test_layers_keep_their_names_unless_two_nested_models_use_one():
    model = _nested()
    (stem, _), origin = _cut(model, "backbone")
    names = origin.names[0]
    assert names["backbone/conv"] == "conv"
    assert names["backbone/b/conv"] == "backbone-b-conv"
    assert {layer.name for layer in stem.layers} >= {"conv", "backbone-b-conv"}


def test_the_parts_share_nothing_with_the_model():
    model = _residual()
    before = model.get_weights()
    config = model.get_config()
    parts, _ = _cut(model, "sum")
    for part in parts:
        _randomize(part)
    assert all(
        np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)
    )
    assert model.get_config() == config


def test_new_seeds_make_new_weights_and_the_old_ones_the_same():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4, name="d"),
            layers.Dropout(0.5, seed=3),
            layers.Dense(3, kernel_initializer=keras.initializers.HeNormal(seed=5)),
        ]
    )
    graph = Graph(model)
    part = graph.split([graph.tensor_of("d", "at")], "at")[1]
    kernels = [
        np.asarray(part.build("b", n)[0].layers[-1].kernel) for n in (0, 0, 1, 2)
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    np.testing.assert_array_equal(kernels[0], model.layers[-1].kernel)
    assert np.abs(kernels[2] - kernels[0]).max() > 0.1
    assert np.abs(kernels[2] - kernels[3]).max() > 0.1
    assert part.build("b", 1)[0].layers[1].seed not in (3, None)


def test_inputs_of_a_dict_and_a_model_used_twice():
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((4,), name="b")}
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3)], name="twin")
    x = layers.Subtract(name="gap")([inner(inputs["a"]), inner(inputs["b"])])
    model = keras.Model(inputs, layers.Dense(2)(x))
    parts, origin = _cut(model, "gap")
    x = {"a": _x((4,)), "b": -_x((4,))}
    np.testing.assert_allclose(_run(parts, x), np.asarray(model(x)), rtol=1e-6)
    assert parts[0].count_params() == inner.count_params()
    with pytest.raises(ValueError, match="'twin/dense.*' is used 2 times"):
        _cut(model, f"twin/{inner.layers[-1].name}")


@pytest.mark.filterwarnings("ignore:Layer 'part_1'")  # Keras's, for nested models
def test_a_mask_goes_through_the_cut():
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 4, mask_zero=True, name="embed")(inputs)
    x = layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    tokens = np.array([[1, 2, 0, 0, 0], [3, 0, 0, 0, 0]])
    parts, _ = _cut(model, "embed")
    np.testing.assert_allclose(
        _run(parts, tokens), np.asarray(model(tokens)), rtol=1e-6
    )


def _skip():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(3, 3, padding="same", name="conv")(inputs)
    y = layers.Conv2D(3, 3, padding="same", name="deep")(x)
    return keras.Model(inputs, layers.Add(name="add")([x, y]))


def _shared():
    dense = layers.Dense(4, name="twice")
    inputs = keras.Input((4,))
    x = layers.ReLU(name="middle")(dense(inputs))
    return keras.Model(inputs, dense(x))


def _two_outputs():
    inputs = keras.Input((4, 3))
    x, state = layers.GRU(3, return_state=True, name="gru")(inputs)
    return keras.Model(inputs, layers.Add()([x, state]))


@pytest.mark.parametrize(
    ("make", "cuts", "message"),
    [
        (_residual, ["secnd"], r"`at`: there is no layer 'secnd'.*\['second'"),
        (_skip, ["deep"], "output of 'conv' bypasses it and is used by 'add'"),
        (_shared, ["middle"], "'twice' is used on both sides"),
        (_shared, ["twice"], "'twice' is used 2 times"),
        (_two_outputs, ["gru"], "'gru' makes 2 tensors"),
        (_residual, ["pool", "first"], "'pool' does not come before 'first'"),
        (_residual, ["logits"], "'logits' does not come before 'logits'"),
        (_residual, ["input"], "cannot be cut at 'input.*': it is an input"),
    ],
)
def test_a_cut_that_does_not_cut_is_refused(make, cuts, message):
    model = make()
    cuts = [model.layers[0].name if cut == "input" else cut for cut in cuts]
    with pytest.raises(ValueError, match=message):
        _cut(model, *cuts)


@keras.saving.register_keras_serializable(package="tests")
class _Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3, name="inner")

    def call(self, x):
        return self.dense(x)


def test_a_model_whose_graph_is_not_known_is_refused():
    model = _Subclassed(name="mine")
    with pytest.raises(ValueError, match="never built"):
        Graph(model)
    model(_x((4,)))
    with pytest.raises(TypeError, match="subclassed model 'mine' is not known"):
        Graph(model)
    with pytest.raises(TypeError, match="`model` must be a keras.Model"):
        Graph("mine")


def test_a_subclassed_model_inside_is_one_layer():
    inputs = keras.Input((4,))
    x = _Subclassed(name="mine")(layers.Dense(4, name="d")(inputs))
    model = keras.Model(inputs, x)
    parts, _ = _cut(model, "d")
    np.testing.assert_allclose(
        _run(parts, _x((4,))), np.asarray(model(_x((4,)))), rtol=1e-6
    )
    with pytest.raises(ValueError, match="inside a layer that is not functional"):
        _cut(model, "mine/inner")


def test_several_outputs_are_refused():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [layers.Dense(2)(inputs), layers.Dense(2)(inputs)])
    with pytest.raises(ValueError, match="must have one output.* has 2"):
        Graph(model)


def test_clone_copies_weights_by_name():
    model = _randomize(_nested())
    copy = clone(model, "other")
    assert copy.name == "other"
    np.testing.assert_array_equal(np.asarray(copy(_x())), np.asarray(model(_x())))
    _randomize(copy).layers[-1].weights[0].assign_add(
        np.ones(copy.layers[-1].weights[0].shape)
    )
    assert np.abs(np.asarray(copy(_x())) - np.asarray(model(_x()))).max() > 0
