"""Two replicas of one process do what one device does."""

from __future__ import annotations

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from distribution.worker import Ids
from keras import layers

import keras_distill as kd
from keras_distill import losses

BATCH = 16


def rows(count, shape=(tiny.FEATURES,), missing=(), weights=False):
    """Batches of 16 rows, which two replicas share as 8 and 8."""
    generator = np.random.default_rng(1)
    x = generator.normal(size=(count, *shape)).astype("float32")
    y = generator.integers(0, tiny.CLASSES, count)
    y[list(missing)] = -1
    parts = (x, y, generator.random(count).astype("float32")) if weights else (x, y)
    return tf.data.Dataset.from_tensor_slices(parts).batch(BATCH)


def images(count):
    return rows(count, (8, 8, 3))


def cnn(width=4, norm=False):
    """Grids `block1` and `block2` of 4 x 4, vectors `pool`."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(width, 3, 2, "same", activation="relu", name="block1")(inputs)
    if norm:
        x = layers.BatchNormalization(synchronized=True, name="norm")(x)
    x = layers.Conv2D(width, 3, padding="same", name="block2")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(tiny.CLASSES, name="logits")(x))


def distiller(student=None, **kwargs):
    return kd.Distiller(student or tiny.mlp(), tiny.teacher(), **kwargs)


class CountedRows(keras.metrics.Sum):
    """A metric that reads weights, but no masks."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(keras.ops.ones(keras.ops.shape(y_true)), sample_weight)


def accuracy():
    return ["accuracy"]


def run(make, data, eager, clip=None, validate=False, make_metrics=accuracy, **kwargs):
    keras.utils.set_random_seed(0)
    made = make()
    sgd = keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=clip)
    options = {"loss": tiny.SPARSE, "metrics": make_metrics(), "run_eagerly": eager}
    made.compile(sgd, **options | kwargs)
    validation = data.skip(len(data) - 2) if validate else None
    return made, made.fit(data, verbose=0, validation_data=validation).history


def state(made):
    """Everything that training changes, but the states of random generators."""
    return [v for v in made.variables if "seed" not in v.path]


def check_equal(strategy, make, data, across=False, **kwargs):
    """An epoch on one device (eagerly, which is quicker) and on two replicas."""
    one, expected = run(make, data, True, **kwargs)
    with strategy.scope():
        if across:
            kwargs["across_replicas"] = True
        two, found = run(make, data, False, **kwargs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name], value, rtol=1e-5, atol=1e-6, err_msg=name
        )
    for variable, wanted in zip(state(two), state(one), strict=True):
        value, wanted = variable.numpy(), wanted.numpy()
        error = np.linalg.norm(value - wanted)
        assert error <= 1e-5 * max(np.linalg.norm(wanted), 0.1), variable.path
    return two, found


# -- the distiller ----------------------------------------------------------------


def test_weights_missing_labels_and_clipping(strategy):
    """In batch 2 one replica has no labels; the last batch has 5 rows."""

    def make():
        model = tiny.mlp()
        outputs = layers.Softmax(name="probabilities")(model.output)
        return distiller(keras.Model(model.input, outputs))

    data = rows(3 * BATCH + 5, missing=range(24, 32), weights=True)
    check_equal(
        strategy,
        make,
        data,
        loss="sparse_categorical_crossentropy",
        clip=0.1,
        weighted_metrics=["accuracy"],
        validate=True,
    )


def test_a_replica_without_rows(strategy):
    """The last batch has one row; a convolution as adapter sees the padding too."""

    def make():
        link = kd.Link("block1", "block1", "mse", adapter="auto")
        return kd.Distiller(cnn(4), cnn(6), links=[link])

    data = images(2 * BATCH + 1)
    check_equal(strategy, make, data, make_metrics=lambda: ["accuracy", CountedRows()])


def test_losses_of_every_kind(strategy):
    """Response, feature, flow, and relations over the global batch."""

    def make():
        pair = ["block1", "block2"]
        links = [
            kd.Link("block1", "block1", losses.AttentionTransfer(), name="at"),
            kd.Link(pair, pair, losses.FlowOfProcedure(), name="fsp"),
            kd.Link("pool", "pool", losses.RelationalDistance(), name="rkd"),
            kd.Link("pool", "pool", losses.ProbabilisticTransfer(), name="pkt"),
            kd.Link("pool", "pool", losses.SimilarityPreserving(), name="sp"),
        ]
        return kd.Distiller(cnn(), cnn(), soft_loss=losses.DIST(), links=links)

    check_equal(strategy, make, images(2 * BATCH + 5), across=True)


def test_relations_stay_on_a_replica_unless_asked(strategy):
    def make():
        link = kd.Link("hidden", "hidden", losses.RelationalDistance(), name="rkd")
        known = tiny.teacher(8)
        return kd.Distiller(tiny.mlp(), known, soft_loss=None, links=[link])

    data = rows(BATCH)
    one = run(make, data, True)[1]["rkd_loss"][0]
    with strategy.scope():
        two = run(make, data, True)[1]["rkd_loss"][0]
    assert abs(one - two) > 1e-4 * abs(one)


def test_an_embedding(strategy):
    """Its gradient holds rows of the table only."""

    def network(width):
        inputs = keras.Input((4,))
        x = layers.Embedding(20, width)(inputs)
        x = layers.GlobalAveragePooling1D()(x)
        return keras.Model(inputs, layers.Dense(tiny.CLASSES)(x))

    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 20, (37, 4)), generator.integers(0, 3, 37)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    check_equal(strategy, lambda: kd.Distiller(network(5), network(8)), data, clip=0.1)


def contents(model):
    """What hangs on the layers of a model, by layer and name."""
    return {
        layer.path: {name: type(value) for name, value in vars(layer).items()}
        for layer in model._flatten_layers()
    }


def test_synchronized_batch_normalization(strategy):
    """Taps read their own replica's features, and nothing stays on the layers."""
    before = {}

    def make():
        link = kd.Link("norm", "block1", "mse", adapter="auto")
        student = cnn(norm=True)
        made = kd.Distiller(student, cnn(), links=[link])
        before.clear()
        before.update(contents(student))
        return made

    two, _ = check_equal(strategy, make, images(2 * BATCH + 5))
    assert contents(two.student) == before


def test_a_batch_that_synchronized_statistics_cannot_take_is_dropped(strategy):
    def make():
        return kd.Distiller(cnn(norm=True), cnn())

    whole = images(BATCH + 1)
    one, _ = run(make, whole.take(1), True)
    with (
        strategy.scope(),
        pytest.warns(UserWarning, match="1 rows of epoch 0 were dropped"),
    ):
        two, _ = run(make, whole, False, validate=True)
    for variable, wanted in zip(
        two.student.variables, one.student.variables, strict=True
    ):
        np.testing.assert_allclose(variable.numpy(), wanted.numpy(), atol=1e-6)


def test_nan_on_the_last_replica_alone(strategy):
    """The batch changes nothing anywhere, not even the slots of the optimizer."""
    x = np.random.default_rng(0).normal(size=(3 * BATCH, 8, 8, 3)).astype("float32")
    x[2 * BATCH - 1, 0, 0, 0] = np.nan
    y = np.arange(len(x)) % tiny.CLASSES
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)

    def make():
        return kd.Distiller(cnn(norm=True), cnn())

    def fit(eager):
        keras.utils.set_random_seed(0)
        made = make()
        sgd = keras.optimizers.SGD(0.1, momentum=0.9)
        made.compile(sgd, tiny.SPARSE, skip_nonfinite=True, run_eagerly=eager)
        history = made.fit(data, verbose=0).history
        return made, history

    one, expected = fit(True)
    with strategy.scope():
        two, found = fit(False)
    assert found["skipped"] == pytest.approx([1 / 3])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert int(two.optimizer.iterations.numpy()) == 2
    pairs = zip(two.optimizer.variables, one.optimizer.variables, strict=True)
    pairs = [*pairs, *zip(state(two), state(one), strict=True)]
    for variable, wanted in pairs:
        np.testing.assert_allclose(variable.numpy(), wanted.numpy(), atol=1e-6)


def test_several_steps_at_once_are_the_same(strategy):
    """Five batches, two at a time."""
    found = []
    for steps in (1, 2):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            made = distiller()
            made.compile("sgd", tiny.SPARSE, steps_per_execution=steps)
        logs = made.fit(rows(4 * BATCH + 3), verbose=0).history
        found.append((logs, tiny.values(made.trainable_variables)))
    assert found[0][0] == found[1][0]
    assert tiny.same(found[0][1], found[1][1])


class Stop(keras.callbacks.Callback):
    """Stops a run after some batches."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_backup_holds_what_each_replica_has_of_its_own(strategy, tmp_path):
    """Statistics that are not synchronized differ, and evaluation uses them."""

    def fit(*callbacks):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            norm, noise = layers.BatchNormalization(), layers.Dropout(0.2, seed=1)
            made = distiller(tiny.mlp(layers=[norm, noise]))
            tiny.compiled(made, metrics=["accuracy"])
        data = rows(3 * BATCH)
        logs = tiny.history(
            made, data, epochs=2, validation_data=data, callbacks=list(callbacks)
        )
        return made, {name: values[-1] for name, values in logs.items()}

    whole, expected = fit()
    with pytest.raises(KeyboardInterrupt):
        fit(kd.callbacks.Backup(tmp_path / "backup", 2), Stop(5))
    made, found = fit(kd.callbacks.Backup(tmp_path / "backup", 2))
    assert found == expected
    parts = strategy.experimental_local_results
    for variable, wanted in zip(made.variables, whole.variables, strict=True):
        values = [value.numpy() for value in parts(variable.value)]
        others = [value.numpy() for value in parts(wanted.value)]
        assert tiny.same(values, others), variable.path


# -- the other distillers ---------------------------------------------------------


def one_ensemble():
    return kd.OneEnsemble.from_model(cnn(norm=True), "block1", num_branches=2)


def byot():
    """Its bottlenecks normalize as the network does."""
    return kd.BeYourOwnTeacher.from_model(cnn(norm=True), ["block1"])


def mutual(updates):
    return lambda: kd.MutualLearning([tiny.mlp(), tiny.mlp(6)], updates=updates)


def vectors(count):
    return rows(count, missing=(20, count - 1), weights=True)


@pytest.mark.parametrize(
    ("make", "data", "count"),
    [
        (one_ensemble, images, 2 * BATCH + 5),
        (byot, images, 2 * BATCH + 5),
        (mutual("in_turn"), vectors, 2 * BATCH + 1),
        (mutual("together"), vectors, 2 * BATCH + 1),
    ],
    ids=["one", "byot", "in_turn", "together"],
)
def test_distillers_without_a_teacher(strategy, make, data, count):
    check_equal(strategy, make, data(count))


# -- rows -------------------------------------------------------------------------


def test_every_row_is_seen_once_in_every_epoch(strategy):
    """Ids from 1: the padding row of a replica without rows has 0."""
    count = 2 * BATCH + 1
    x = np.zeros((count, tiny.FEATURES), "float32")
    x[:, 0] = np.arange(1, count + 1)
    y = np.arange(count) % tiny.CLASSES
    with strategy.scope():
        ids = Ids()
        inputs = keras.Input((tiny.FEATURES,))
        student = keras.Model(inputs, layers.Dense(tiny.CLASSES)(ids(inputs)))
        made = kd.Distiller(student, tiny.teacher())
        made.compile(keras.optimizers.SGD(1e-3), tiny.SPARSE)

    def make(seed):
        data = tf.data.Dataset.from_tensor_slices((x, y))
        return data.shuffle(count, seed=seed[0] + seed[1]).batch(BATCH)

    expected = dict.fromkeys(range(1, count + 1), 2)
    for data in (
        {"x": x, "y": y, "batch_size": BATCH},
        {"x": kd.data.per_epoch(make)},
    ):
        ids.seen.clear()
        made.fit(**data, epochs=2, verbose=0)
        assert collections.Counter(i for i in ids.seen if i) == expected


# -- what is refused --------------------------------------------------------------


def test_a_student_from_outside_of_the_scope(strategy):
    student = tiny.mlp()
    with strategy.scope(), pytest.raises(ValueError, match=r"with strategy.scope\(\):"):
        distiller(student)
    with strategy.scope():
        student = tiny.mlp()
    with pytest.raises(ValueError, match="the same strategy scope"):
        distiller(student)


def test_an_unsupported_strategy():
    other = tf.distribute.experimental.CentralStorageStrategy()
    with (
        other.scope(),
        pytest.raises(ValueError, match=r"CentralStorageStrategy is not.*Mirrored"),
    ):
        distiller()


def test_options_that_do_not_go_with_replicas(strategy):
    with strategy.scope():
        made = distiller()
        accumulating = keras.optimizers.SGD(gradient_accumulation_steps=2)
        with pytest.raises(ValueError, match="gradient_accumulation_steps"):
            made.compile(accumulating, tiny.SPARSE)
        if not tf.config.list_physical_devices("GPU"):
            with pytest.raises(ValueError, match="jit_compile=True.*strategy on CPU"):
                made.compile("sgd", tiny.SPARSE, jit_compile=True)
        made.compile("sgd", tiny.SPARSE)
    x, y = tiny.data()
    for method in (made.fit, made.evaluate):
        with pytest.raises(ValueError, match="`batch_size`.*each of the 2.*: 1"):
            method(x, y, batch_size=1)
    with pytest.raises(ValueError, match="`batch_size`"):
        made.predict(x, batch_size=1)
    rows = tf.data.Dataset.from_tensor_slices((x, y)).batch(16).unbatch()
    for data in (rows.batch(1), rows.batch(1).map(lambda *row: row).prefetch(1)):
        with pytest.raises(ValueError, match=r"`Dataset.batch`.*each of the 2.*: 1"):
            made.fit(data)


def test_activity_regularizers_with_synchronized_statistics(strategy):
    def network():
        model = cnn(norm=True)
        x = layers.ActivityRegularization(l2=0.1)(model.output)
        return keras.Model(model.input, x)

    kd.Distiller(network(), cnn()).compile("sgd", tiny.SPARSE)
    with strategy.scope():
        made = kd.Distiller(network(), cnn())
        with pytest.raises(ValueError, match="Activity regularizers"):
            made.compile("sgd", tiny.SPARSE)


def test_across_replicas_needs_several():
    link = kd.Link("hidden", "hidden", losses.RelationalDistance(), adapter="auto")
    with pytest.raises(ValueError, match="no effect on one replica"):
        distiller(links=[link]).compile("sgd", tiny.SPARSE, across_replicas=True)


def test_what_layers_add_is_that_of_their_own_replica(strategy):
    """Replicas take turns at collectives: behind one, layers hold another's losses."""

    def make():
        model = cnn()
        x = layers.ActivityRegularization(l2=0.1)(model.output)
        return kd.BaseDistiller(keras.Model(model.input, x))

    check_equal(strategy, make, images(2 * BATCH))  # even: each takes its own mean


def test_masked_students_and_two_outputs_with_a_link(strategy):
    def tagger(width):
        inputs = keras.Input((6,), dtype="int32")
        x = layers.Embedding(20, width, mask_zero=True, name="words")(inputs)
        x = layers.LSTM(width, name="lstm")(x)
        outputs = [layers.Dense(tiny.CLASSES, name=n)(x) for n in "ab"]
        return keras.Model(inputs, outputs)

    def make():
        link = kd.Link("lstm", "lstm", "mse", adapter="auto")
        return kd.Distiller(tagger(4), tagger(6), links=[link])

    generator = np.random.default_rng(1)
    x = generator.integers(0, 20, (2 * BATCH, 6)).astype("int32")
    y = generator.integers(0, tiny.CLASSES, 2 * BATCH)
    data = tf.data.Dataset.from_tensor_slices((x, (y, y))).batch(BATCH)
    check_equal(strategy, make, data, make_metrics=lambda: None)


def test_a_loss_with_one_value_per_row(strategy):
    """Weighted rows of several steps; of the last batch one replica has one row."""

    def make():
        inputs = keras.Input((6, 3))
        letters = layers.Dense(tiny.CLASSES, name="letters")
        model = keras.Model(inputs, letters(inputs))
        return kd.Distiller(model, keras.models.clone_model(model))

    generator = np.random.default_rng(1)
    count = BATCH + 3
    x = generator.normal(size=(count, 6, 3)).astype("float32")
    y = generator.integers(1, tiny.CLASSES, (count, 2))
    weights = generator.random(count).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(BATCH)
    check_equal(strategy, make, data, loss="ctc", make_metrics=lambda: None)


def test_reductions_that_are_no_means_are_refused(strategy):
    summed = keras.losses.SparseCategoricalCrossentropy(True, reduction="sum")
    kd.Distiller(tiny.mlp(), tiny.mlp()).compile("sgd", summed)
    with strategy.scope():
        with pytest.raises(ValueError, match="reduction='sum' is not supported"):
            kd.Distiller(tiny.mlp(), tiny.mlp()).compile("sgd", summed)
        soft = kd.losses.SoftTarget(reduction="sum")
        with pytest.raises(ValueError, match="reduction='sum' is not supported"):
            kd.Distiller(tiny.mlp(), tiny.mlp(), soft_loss=soft).compile("sgd")


def test_a_batch_that_is_dropped_changes_nothing_in_16_bits(strategy):
    with strategy.scope():
        inputs = keras.Input((tiny.FEATURES,))
        x = layers.Dense(4, dtype="mixed_float16")(inputs)
        x = layers.BatchNormalization(synchronized=True)(x)
        made = kd.BaseDistiller(keras.Model(inputs, layers.Dense(tiny.CLASSES)(x)))
        sgd = keras.optimizers.SGD(0.1)
        made.compile(keras.optimizers.LossScaleOptimizer(sgd, 2.0), tiny.SPARSE)
    before = tiny.values(made.student.weights)
    with pytest.warns(UserWarning, match="1 rows of epoch 0 were dropped"):
        made.fit(rows(1), verbose=0)
    assert tiny.same(before, tiny.values(made.student.weights))
