"""MutualLearning against hand-written steps, the golden values, and bad input."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import layers
from losses import golden as vectors

import keras_distill as kd

RATE = 0.1


def _copy(network: keras.Model) -> keras.Model:
    copy = keras.models.clone_model(network)
    copy.set_weights(network.get_weights())
    return copy


def _mutual(networks, **kwargs) -> kd.MutualLearning:
    options = {
        key: kwargs.pop(key)
        for key in ("optimizer", "loss", "metrics", "run_eagerly", "skip_nonfinite")
        if key in kwargs
    }
    options.setdefault("run_eagerly", True)
    optimizer = options.pop("optimizer", None) or keras.optimizers.SGD(RATE)
    loss = options.pop("loss", tiny.SPARSE)
    return kd.MutualLearning(networks, **kwargs).compile(optimizer, loss, **options)


def _kl(peer, own, temperature):
    p = tf.nn.softmax(peer / temperature)
    ratio = tf.nn.log_softmax(peer / temperature) - tf.nn.log_softmax(own / temperature)
    return temperature**2 * tf.reduce_mean(tf.reduce_sum(p * ratio, -1))


def _hand_written_step(networks, x, y, in_turn, temperature=1.0):
    """One SGD step of the paper's algorithm; returns each network's loss."""
    known = [network(x) for network in networks]
    losses = []
    for i, network in enumerate(networks):
        peers = [n(x) for n in networks] if in_turn else known
        with tf.GradientTape() as tape:
            own = network(x)
            ce = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=own)
            others = peers[:i] + peers[i + 1 :]
            kl = [_kl(tf.stop_gradient(p), own, temperature) for p in others]
            loss = tf.reduce_mean(ce) + sum(kl) / len(kl)
        variables = [v.value for v in network.trainable_variables]
        gradients = tape.gradient(loss, variables)
        losses.append(float(loss))
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.assign_sub(RATE * gradient)
    return losses


@pytest.mark.parametrize("updates", ["in_turn", "together"])
@pytest.mark.parametrize("widths", [(8, 5), (8, 5, 3)])
def test_steps_are_the_papers(updates, widths):
    networks = [tiny.mlp(width) for width in widths]
    expected = [_copy(network) for network in networks]
    x, y = tiny.data()
    mutual = _mutual(networks, updates=updates, temperature=2.0)
    for _ in range(2):
        logs = mutual.train_on_batch(x, y, return_dict=True)
        losses = _hand_written_step(expected, x, y, updates == "in_turn", 2.0)
        mutual.reset_metrics()
        for i, loss in enumerate(losses):
            assert logs[f"net_{i}_loss"] == pytest.approx(loss, rel=1e-5)
        assert logs["loss"] == pytest.approx(sum(losses), rel=1e-5)
    for network, other in zip(networks, expected, strict=True):
        for a, b in zip(network.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_the_two_ways_of_updating_differ():
    x, y = tiny.data()
    after = []
    for updates in ("in_turn", "together"):
        networks = [
            tiny.mlp(8, kernel_initializer=keras.initializers.HeNormal(s))
            for s in (1, 2)
        ]
        for network in networks:
            network.layers[-1].kernel.assign(np.eye(8, 3) * 2)
        _mutual(networks, updates=updates).train_on_batch(x, y)
        after.append([n.get_weights()[0] for n in networks])
    np.testing.assert_array_equal(after[0][0], after[1][0])
    assert np.abs(after[0][1] - after[1][1]).max() > 1e-4


@pytest.mark.parametrize(
    "name", ["dml", "dml__edge_large_logits", "dml__edge_identical"]
)
def test_golden(name):
    golden = vectors.load(name)
    own, peer = golden.inputs["student_logits"], golden.inputs["peer_logits_1"]
    rows = np.eye(len(own), dtype="float32")
    networks = []
    for start in (own, peer):  # row i picks row i of the kernel: the file's logits
        dense = layers.Dense(own.shape[1], use_bias=False)
        networks.append(keras.Sequential([keras.Input(rows.shape[1:]), dense]))
        dense.kernel.assign(start)
    mutual = _mutual(networks, updates="together", optimizer=keras.optimizers.SGD(1.0))
    labels = golden.inputs["labels"]
    logs = mutual.train_on_batch(rows, labels, return_dict=True)
    gradient = own - networks[0].get_weights()[0]
    reference = golden.gradients["student_logits"]
    assert logs["net_0_loss"] == pytest.approx(golden.loss, rel=2e-4)
    # Read off as a difference of weights, which are up to 80: rounded to 1e-5.
    error = np.linalg.norm(gradient - reference)
    assert error < 2e-3 * np.linalg.norm(reference) + 1e-5


def _noisy_cnn() -> keras.Model:
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, 2)(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.Dropout(0.5, seed=1)(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(tiny.CLASSES)(x))


def test_a_peer_that_is_listened_to_keeps_its_statistics():
    """Statistics and random state move once per step, by the network's own pass."""
    networks = [_noisy_cnn(), _noisy_cnn()]
    alone = [_copy(network) for network in networks]
    x, y = tiny.images()
    _mutual(networks, updates="in_turn").train_on_batch(x, y)
    for network, other in zip(networks, alone, strict=True):
        other(x, training=True)
        for a, b in zip(
            network.non_trainable_variables, other.non_trainable_variables, strict=True
        ):
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-6)


def test_logs_of_fit_and_what_predict_gives():
    networks = [tiny.mlp(8), tiny.mlp(5)]
    x, y = tiny.data()
    mutual = _mutual(networks, metrics=["accuracy"], run_eagerly=False)
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1))
    logs = tiny.history(
        mutual, x, y, epochs=2, validation_data=(x, y), callbacks=[rates]
    )
    names = {"loss", "hard_loss", "accuracy", "net_0_loss", "net_1_loss"}
    names |= {"net_0_accuracy", "net_1_accuracy"}
    expected = names | {f"val_{name}" for name in names} | {"learning_rate"}
    assert set(logs) == expected
    rates = [float(optimizer.learning_rate.numpy()) for optimizer in mutual.optimizers]
    assert rates == pytest.approx([0.05, 0.05])
    probabilities = [tf.nn.softmax(network(x)).numpy() for network in networks]
    np.testing.assert_allclose(
        mutual.predict(x, verbose=0), np.log(np.mean(probabilities, 0)), rtol=1e-4
    )
    for i, network in enumerate(networks):
        right = np.mean(np.argmax(network(x), -1) == y)
        assert logs[f"val_net_{i}_accuracy"][-1] == pytest.approx(right)
    losses = [logs[f"val_net_{i}_loss"][-1] for i in range(2)]
    assert logs["val_loss"][-1] == pytest.approx(sum(losses), rel=1e-5)


def test_networks_with_softmax_average_their_probabilities():
    def net(width):
        return keras.Sequential(
            [
                keras.Input((tiny.FEATURES,)),
                layers.Dense(width, "relu"),
                layers.Dense(tiny.CLASSES, "softmax"),
            ]
        )

    networks = [net(8), net(5)]
    x, y = tiny.data()
    mutual = _mutual(networks, loss="sparse_categorical_crossentropy")
    expected = np.mean([network(x).numpy() for network in networks], 0)
    np.testing.assert_allclose(mutual(x).numpy(), expected, rtol=1e-5)
    logs = mutual.test_on_batch(x, y, return_dict=True)
    nll = -np.log(expected[np.arange(len(y)), y]).mean()
    assert logs["hard_loss"] == pytest.approx(nll, rel=1e-4)


def test_one_unit_stands_for_two_classes():
    def net():
        return keras.Sequential([keras.Input((tiny.FEATURES,)), layers.Dense(1)])

    networks = [net(), net()]
    x, y = tiny.data()
    mutual = _mutual(networks, loss=keras.losses.BinaryCrossentropy(from_logits=True))
    p = np.mean([tf.sigmoid(network(x)) for network in networks], 0)
    np.testing.assert_allclose(tf.sigmoid(mutual(x)), p, rtol=1e-5)
    logs = mutual.train_on_batch(x, (y > 0).astype("float32"), return_dict=True)
    assert np.isfinite(logs["loss"])
    assert {"net_0_accuracy", "net_1_accuracy"} <= set(logs)


def test_regularisers_belong_to_their_network():
    l2 = keras.regularizers.L2(0.5)
    networks = [tiny.mlp(8, kernel_regularizer=l2), tiny.mlp(8)]
    plain = [_copy(network) for network in networks]
    x, y = tiny.data()
    before = networks[0].layers[1].kernel.numpy()
    for network in plain:
        network.layers[1].kernel_regularizer = None
    plain = [_copy(network) for network in plain]
    _mutual(networks, updates="together").train_on_batch(x, y)
    _mutual(plain, updates="together").train_on_batch(x, y)
    difference = [
        a.layers[1].kernel.numpy() - b.layers[1].kernel.numpy()
        for a, b in zip(plain, networks, strict=True)
    ]
    np.testing.assert_allclose(difference[0], RATE * before, atol=1e-6)
    np.testing.assert_allclose(difference[1], 0, atol=1e-7)


def test_rows_without_labels_count_in_the_divergence_alone():
    x, y = tiny.data()
    hidden = np.where(np.arange(len(y)) < 12, y, -1)
    networks = [tiny.mlp(8), tiny.mlp(5)]
    logs = _mutual(networks).test_on_batch(x, hidden, return_dict=True)
    outputs = [network(x) for network in networks]
    for i, own in enumerate(outputs):
        ce = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=y[:12], logits=own[:12]
        )
        expected = float(tf.reduce_mean(ce) + _kl(outputs[1 - i], own, 1.0))
        assert logs[f"net_{i}_loss"] == pytest.approx(expected, rel=1e-5)
        right = np.mean(np.argmax(own[:12], -1) == y[:12])
        assert logs[f"net_{i}_accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("updates", ["in_turn", "together"])
def test_save_load_continue(updates, tmp_path):
    networks = [tiny.mlp(8), tiny.mlp(5)]
    x, y = tiny.data()
    optimizers = [keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1, momentum=0.9)]
    mutual = _mutual(networks, updates=updates, temperature=2.0, optimizer=optimizers)
    mutual.train_on_batch(x, y)
    mutual.save(tmp_path / "mutual.keras")
    loaded = keras.saving.load_model(tmp_path / "mutual.keras")
    assert loaded.updates == updates
    assert float(loaded.temperature.numpy()) == 2.0
    assert [type(o).__name__ for o in loaded.optimizers] == ["Adam", "SGD"]
    for one in (mutual, loaded):
        one.train_on_batch(x, y)
    assert tiny.same(mutual.get_weights(), loaded.get_weights())
    assert tiny.same(
        tiny.values(mutual.optimizer.variables), tiny.values(loaded.optimizer.variables)
    )


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_low_precision_stays_finite(policy):
    networks = [tiny.mlp(8, dtype=policy), tiny.mlp(5)]
    x, y = tiny.data()
    mutual = _mutual(networks, run_eagerly=False)
    scaled = [
        isinstance(o, keras.optimizers.LossScaleOptimizer) for o in mutual.optimizers
    ]
    assert scaled == [policy == "mixed_float16", False]
    before = [network.get_weights() for network in networks]
    logs = mutual.train_on_batch(x, y, return_dict=True)
    assert all(np.isfinite(value) for value in logs.values())
    for network, old in zip(networks, before, strict=True):
        assert all(np.isfinite(w).all() for w in network.get_weights())
        assert not tiny.same(network.get_weights(), old)


def test_a_batch_with_nan_changes_nothing():
    networks = [tiny.mlp(8), tiny.mlp(5)]
    x, y = tiny.data()
    mutual = _mutual(
        networks, skip_nonfinite=True, optimizer=keras.optimizers.Adam(0.01)
    )
    before = mutual.get_weights() + tiny.values(mutual.optimizer.variables)
    x[3, 0] = np.nan
    logs = mutual.train_on_batch(x, y, return_dict=True)
    assert logs["skipped"] == 1
    after = mutual.get_weights() + tiny.values(mutual.optimizer.variables)
    assert tiny.same(before, after)


def test_bad_input():
    one, two = tiny.mlp(8), tiny.mlp(5)
    with pytest.raises(ValueError, match="two or more models"):
        kd.MutualLearning([one])
    with pytest.raises(TypeError, match=r"keras\.Model.*Received: 'net'"):
        kd.MutualLearning([one, "net"])
    with pytest.raises(ValueError, match="0 and 1 are the same network"):
        kd.MutualLearning([one, one])
    other = keras.Sequential([keras.Input((tiny.FEATURES,)), layers.Dense(7)])
    with pytest.raises(ValueError, match=r"same outputs and classes.*3.*7"):
        kd.MutualLearning([one, other])
    soft = keras.Sequential([keras.Input((tiny.FEATURES,)), layers.Dense(3, "softmax")])
    with pytest.raises(ValueError, match="all give logits or all give probabilities"):
        kd.MutualLearning([one, soft])
    inputs = keras.Input((tiny.FEATURES,))
    several = [
        keras.Model(inputs, [layers.Dense(3)(inputs), layers.Dense(3)(inputs)])
        for _ in range(2)
    ]
    with pytest.raises(ValueError, match="networks with one output"):
        kd.MutualLearning(several)
    with pytest.raises(ValueError, match=r"`temperature`.*0"):
        kd.MutualLearning([one, two], temperature=0.0)
    with pytest.raises(ValueError, match="'in_turn' or 'together'. Received: 'both'"):
        kd.MutualLearning([one, two], updates="both")
    mutual = kd.MutualLearning([one, two])
    shared = keras.optimizers.SGD()
    with pytest.raises(ValueError, match="share one optimizer"):
        mutual.compile([shared, shared], tiny.SPARSE)
    assert len({id(o) for o in mutual.compile(["sgd", "sgd"]).optimizers}) == 2
    with pytest.raises(ValueError, match="list of 2, one per network. Received 3"):
        mutual.compile(["sgd", "sgd", "sgd"], tiny.SPARSE)
    with pytest.raises(ValueError, match="`log_gradient_share` has no effect"):
        mutual.compile("sgd", tiny.SPARSE, log_gradient_share=1)
