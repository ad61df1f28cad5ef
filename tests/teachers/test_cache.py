"""The cache: a teacher's knowledge on disk."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

import keras_distill as kd
from keras_distill.teachers import Cache
from keras_distill.teachers.store import shards
from keras_distill.teachers.store.building import Progress
from keras_distill.teachers.store.rows import content_keys

ROWS = 24
X, Y = tiny.data(ROWS)


def data(*parts):
    return tf.data.Dataset.from_tensor_slices(parts or (X, Y))


@pytest.fixture(autouse=True)
def _first_epoch():
    yield
    kd.data.set_epoch(0)


@pytest.fixture(scope="module")
def teacher():
    return tiny.teacher()


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    """Exact, with the hidden layer."""
    path = tmp_path_factory.mktemp("cache") / "exact"
    return Cache.build(teacher, data(), path, dtype="float32", taps=["hidden"])


@pytest.fixture
def copy(cache, tmp_path):
    """The same cache, to be spoiled."""
    return Path(shutil.copytree(cache.path, tmp_path / "copy"))


def told(cache, dataset=None, taps=()):
    """What the cache says of all rows, in their order."""
    batches = cache.attach(data() if dataset is None else dataset).batch(1000)
    element = next(iter(batches))
    return cache(element[0], taps, 4.0)


def train(known, dataset, **options):
    """Logs and weights of two epochs from the same start."""
    keras.utils.set_random_seed(0)
    fit = {k: options.pop(k) for k in ("class_weight",) if k in options}
    distiller = tiny.compiled(kd.Distiller(tiny.mlp(), known, **options))
    logs = tiny.history(distiller, dataset.batch(8), epochs=2, **fit)
    return logs, tiny.values(distiller.student.weights)


def assert_same_training(first, second, tolerance):
    assert first[0].keys() == second[0].keys()
    for name, values in first[0].items():
        np.testing.assert_allclose(
            values, second[0][name], rtol=tolerance, atol=tolerance, err_msg=name
        )
    for a, b in zip(first[1], second[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# -- it teaches like the teacher ------------------------------------------------------


def test_it_says_what_the_teacher_says(cache, teacher):
    outputs, features = told(cache, taps=["hidden"])
    np.testing.assert_allclose(outputs, teacher(X), rtol=1e-6, atol=1e-6)
    hidden = keras.Model(teacher.input, teacher.get_layer("hidden").output)
    np.testing.assert_allclose(features["hidden"], hidden(X), rtol=1e-6, atol=1e-6)
    assert len(cache) == ROWS
    assert cache.fingerprint() == kd.teachers.Model(teacher).fingerprint()
    assert repr(cache) == f"teachers.Cache({cache.path!r}, {ROWS} rows)"


@pytest.mark.parametrize("links", [False, True])
def test_training_from_exact_values_equals_live_teaching(cache, teacher, links):
    def options():
        link = kd.Link("hidden", "hidden", "mse", adapter="auto", weight=0.1)
        return {"links": [link] if links else []}

    live = train(teacher, data(), **options())
    cached = train(cache, cache.attach(data()), **options())
    assert_same_training(cached, live, 1e-6)


def test_training_from_float16_equals_it_within_rounding(teacher, tmp_path):
    cache = Cache.build(teacher, data(), tmp_path)
    outputs, _ = told(cache)
    expected = np.asarray(teacher(X))
    assert np.array_equal(outputs, expected.astype("float16").astype("float32"))
    live = train(teacher, data())
    assert_same_training(train(cache, cache.attach(data())), live, 5e-3)


def test_a_relative_path_is_that_of_the_folder_it_was_opened_in(
    cache, copy, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    opened = Cache.open(copy.name)
    monkeypatch.chdir(tmp_path.parent)
    np.testing.assert_array_equal(told(opened)[0], told(cache)[0])


def test_rows_may_come_in_any_order_and_number(cache):
    rows = data().shuffle(100, seed=1).skip(5).shard(2, 1).repeat(3)
    for x, y in cache.attach(rows).batch(7):
        outputs, _ = cache(x, [], 4.0)
        places = [int(np.argmax(np.all(row == X, -1))) for row in x["inputs"]]
        assert np.array_equal(outputs, told(cache)[0].numpy()[places])
        assert np.array_equal(y, Y[places])


def test_the_size_of_the_data_is_known(cache):
    assert cache.attach(data()).cardinality() == ROWS
    endless = cache.attach(data().repeat())
    assert endless.cardinality() == tf.data.INFINITE_CARDINALITY
    some = data().filter(lambda x, y: y > 0)
    assert cache.attach(some).cardinality() == tf.data.UNKNOWN_CARDINALITY
    assert sum(1 for _ in cache.attach(some)) == np.sum(Y > 0)


WEIGHTS = np.linspace(0, 2, ROWS).astype("float32")
SOME = np.where(np.arange(ROWS) % 3, Y, -1).astype("int32")


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        ((X, Y, WEIGHTS), {}),
        ((X, Y), {"class_weight": {0: 0.5, 1: 2.0, 2: 1.0}}),
        ((X, SOME), {"class_weight": {0: 0.5, 1: 2.0, 2: 1.0}}),
        ((X,), {}),
    ],
    ids=["sample_weight", "class_weight", "some labels", "no labels"],
)
def test_labels_and_weights_pass_through(cache, teacher, parts, options):
    live = train(teacher, data(*parts), **options)
    cached = train(cache, cache.attach(data(*parts)), **options)
    assert_same_training(cached, live, 1e-6)
    assert ("hard_loss" in live[0]) == (len(parts) > 1)


def test_data_without_labels_in_all_forms(cache):
    plain = tf.data.Dataset.from_tensor_slices(X)
    for rows in (plain, plain.map(lambda x: (x,)), plain.map(lambda x: (x, None))):
        outputs, _ = told(cache, rows)
        assert np.array_equal(outputs, told(cache)[0])


def test_no_leaf_is_a_string(cache):
    specs = tf.nest.flatten(cache.attach(data()).element_spec)
    assert all(spec.dtype != tf.string for spec in specs)


def test_evaluate_and_predict_take_plain_rows_and_attached_ones(cache):
    distiller = tiny.compiled(tiny.distiller(known=cache))
    attached = cache.attach(data()).batch(8)
    plain, stored = (
        distiller.evaluate(d, verbose=0, return_dict=True)
        for d in (data().batch(8), attached)
    )
    assert plain == stored
    alone = distiller.predict(X, verbose=0)
    np.testing.assert_allclose(distiller.predict(attached, verbose=0), alone, atol=1e-6)


def test_fit_on_plain_rows_is_an_error_that_names_attach(cache):
    distiller = tiny.compiled(tiny.distiller(known=cache))
    with pytest.raises(ValueError, match=r"cache\.attach\(dataset\)"):
        distiller.fit(data().batch(8), verbose=0)


def heads():
    """Networks whose outputs are not one tensor of logits."""
    inputs = keras.Input((tiny.FEATURES,))
    dense = keras.layers.Dense

    def model(outputs):
        return keras.Model(inputs, outputs)

    bare = keras.layers.Lambda(lambda z: keras.ops.softmax(z) * 1.0)
    return {
        "softmax": model(dense(3, "softmax", name="a")(inputs)),
        "sigmoid": model(dense(1, "sigmoid", name="a")(inputs)),
        "one unit": model(dense(1, name="a")(inputs)),
        "bare probabilities": model(bare(dense(3)(inputs))),
        "dict": model(
            {
                "a": dense(3, name="a")(inputs),
                "b": dense(2, "softmax", name="b")(inputs),
            }
        ),
        "list": model([dense(3, name="a")(inputs), dense(2, name="b")(inputs)]),
    }


@pytest.mark.filterwarnings("ignore:.*gives probabilities without their logits")
@pytest.mark.parametrize("name", heads())
def test_outputs_come_back_as_they_were(name, tmp_path):
    model = heads()[name]
    live = kd.teachers.Model(model)
    cache = Cache.build(live, data(), tmp_path, dtype="float32")
    outputs, _ = told(cache)
    expected = model(X)
    keras.tree.assert_same_structure(outputs, expected)
    pairs = zip(keras.tree.flatten(outputs), keras.tree.flatten(expected), strict=True)
    for (a, b), head, same in zip(pairs, cache.heads(), live.heads(), strict=True):
        assert head == same
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(head.logits(a), head.logits(b), rtol=1e-4, atol=1e-5)
    assert cache.names == live.names


def test_several_sigmoids_are_kept_as_they_are(tmp_path):
    inputs = keras.Input((tiny.FEATURES,))
    model = keras.Model(inputs, keras.layers.Dense(3, "sigmoid")(inputs))
    cache = Cache.build(model, data(), tmp_path, dtype="float32")
    np.testing.assert_allclose(told(cache)[0], model(X), atol=1e-6)
    with pytest.raises(ValueError, match="multi-label"):
        kd.Distiller(tiny.mlp(), cache)


def test_small_probabilities_survive_float16(tmp_path):
    inputs = keras.Input((tiny.FEATURES,))
    dense = keras.layers.Dense(3, "softmax", kernel_initializer="he_normal")
    model = keras.Model(inputs, dense(inputs))
    dense.kernel.assign(dense.kernel * 20)
    cache = Cache.build(model, data(), tmp_path)
    outputs, _ = told(cache)
    live = kd.teachers.Model(model)
    expected, _ = live(X, [], 1.0)
    assert np.min(expected) < 1e-10
    before, after = (
        tf.nn.log_softmax(head.logits(value))
        for head, value in ((live.heads()[0], expected), (cache.heads()[0], outputs))
    )
    np.testing.assert_allclose(after, before, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("key", ["content", "position"])
def test_inputs_of_several_leaves(tmp_path, key):
    parts = {
        "image": keras.Input((4, 4, 1), dtype="uint8", name="image"),
        "size": keras.Input((), name="size"),
    }
    z = keras.layers.Flatten()(keras.ops.cast(parts["image"], "float32") / 255)
    z = keras.layers.Concatenate()([z, keras.ops.expand_dims(parts["size"], -1)])
    model = keras.Model(parts, keras.layers.Dense(3)(z))
    generator = np.random.default_rng(0)
    image = generator.integers(0, 255, (10, 4, 4, 1)).astype("uint8")
    # Two rows differ in one leaf alone.
    image[1] = image[0]
    x = {"image": image, "size": generator.normal(size=10).astype("float32")}
    rows = data(x, Y[:10])
    cache = Cache.build(model, rows, tmp_path, dtype="float32", key=key)
    np.testing.assert_allclose(told(cache, rows)[0], model(x), atol=1e-6)


def test_elements_of_different_sizes(tmp_path):
    inputs = keras.Input((None, 2))
    z = keras.layers.GlobalAveragePooling1D()(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(z))
    rows = tf.data.Dataset.from_generator(
        lambda: (np.full((n, 2), n, "float32") for n in (3, 5, 4)),
        output_signature=tf.TensorSpec((None, 2)),
    )
    cache = Cache.build(model, rows, tmp_path, dtype="float32", batch_size=1)
    for element in cache.attach(rows):
        x = element[0]["inputs"][None]
        (leaves,) = element[0]["kd_teacher"].values()
        np.testing.assert_allclose(leaves["output0"], model(x)[0], atol=1e-6)


def test_an_ensemble_at_its_temperature(teacher, tmp_path):
    ensemble = kd.teachers.Ensemble([teacher, tiny.teacher(5)])
    with pytest.raises(ValueError, match="other outputs at each temperature"):
        Cache.build(ensemble, data(), tmp_path)
    cache = Cache.build(ensemble, data(), tmp_path, temperatures=[2.0], dtype="float32")
    expected, _ = ensemble(X, [], 2.0)
    np.testing.assert_allclose(told(cache)[0], expected, atol=1e-5)
    kd.Distiller(tiny.mlp(), cache, temperature=2.0)
    with pytest.raises(ValueError, match=r"`temperature` must be one of \[2.0\]"):
        kd.Distiller(tiny.mlp(), cache, temperature=4.0)
    with pytest.raises(ValueError, match="several temperatures"):
        kd.Distiller(tiny.mlp(), cache, soft_loss=kd.losses.MultiLevelLogit())


def test_a_saved_distiller_goes_on_with_the_cache(cache, teacher, tmp_path):
    distiller = tiny.compiled(tiny.distiller(known=teacher))
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    loaded.teacher = cache
    loaded.run_eagerly = True
    attached = cache.attach(data()).batch(8)
    again = tiny.compiled(tiny.distiller(distiller.student, teacher))
    expected = tiny.history(again, data().batch(8))
    found = tiny.history(loaded, attached)
    np.testing.assert_allclose(found["soft_loss"], expected["soft_loss"], rtol=1e-5)


# -- views ----------------------------------------------------------------------------


def augment(x, seed):
    noise = tf.random.stateless_normal((tiny.FEATURES,), seed)
    return tf.sin(x * 1.7) / 3 + noise * 0.1


VIEWS = 3


@pytest.fixture(scope="module")
def views(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("views") / "views"
    return Cache.build(
        teacher, data(), path, views=VIEWS, augment=augment, dtype="float32"
    )


def shown(cache, epoch, dataset=None):
    kd.data.set_epoch(epoch)
    rows = data() if dataset is None else dataset
    return next(iter(cache.attach(rows).batch(1000)))[0]


def test_each_view_is_shown_once_in_as_many_epochs(views, teacher):
    seen = [shown(views, epoch)["inputs"].numpy() for epoch in range(VIEWS)]
    assert all(
        len({row.tobytes() for row in rows}) == VIEWS
        for rows in zip(*seen, strict=True)
    )
    assert np.array_equal(shown(views, VIEWS)["inputs"], seen[0])
    # Rows are not all at the same view.
    places = [int(key) % VIEWS for key in views._lookup.shards.keys(0)]
    assert len(set(places)) == VIEWS


def test_knowledge_and_view_belong_together(views, teacher):
    for epoch in range(2):
        x = shown(views, epoch)
        outputs, _ = views(x, [], 4.0)
        np.testing.assert_allclose(outputs, teacher(x["inputs"]), atol=1e-5)


def test_a_replayed_view_is_equal_to_the_last_bit(views):
    stored = views._lookup.shards._mapped(0)[1]["view"]
    stored = {int(v) for v in stored}
    replayed = set()
    for epoch in range(VIEWS):
        replayed |= {int(k) for k in content_keys(shown(views, epoch)["inputs"])}
    assert replayed == stored
    assert len(stored) == VIEWS * ROWS


def test_views_are_the_images_that_the_teacher_saw(tmp_path):
    """To the last bit, with the functions of `tf.image`."""
    images, _ = tiny.images(4)
    seen = []

    class Watched(kd.teachers.Model):
        def __call__(self, x, *args):
            tf.py_function(lambda x: seen.extend(x.numpy()), [x], [])
            return super().__call__(x, *args)

    def crop(image, seed):
        image = tf.image.stateless_random_flip_left_right(image, seed)
        image = tf.image.stateless_random_brightness(image, 0.3, seed)
        wide = tf.image.resize(image, (11, 11), "bicubic")
        return tf.image.stateless_random_crop(wide, image.shape, seed)

    inputs = keras.Input(images.shape[1:])
    outputs = keras.layers.Dense(3)(keras.layers.Flatten()(inputs))
    teacher = Watched(keras.Model(inputs, outputs))
    rows = data(images)
    cache = Cache.build(teacher, rows, tmp_path, views=5, augment=crop)
    told = {view.tobytes() for view in seen}
    shown_views = [shown(cache, epoch, rows)["inputs"].numpy() for epoch in range(5)]
    replayed = {view.tobytes() for views in shown_views for view in views}
    assert len(replayed) == 20
    assert replayed == told


def test_a_view_is_a_function_of_row_and_epoch(views):
    order = np.random.default_rng(0).permutation(ROWS)
    straight, mixed = shown(views, 4), shown(views, 4, data(X[order], Y[order]))
    assert np.array_equal(mixed["inputs"], straight["inputs"].numpy()[order])


def test_fit_shows_other_views_in_each_epoch(views, teacher):
    seen = []

    def note(x):
        seen.append(x)
        return x

    def watched(x, y):
        inputs = tf.numpy_function(note, [x["inputs"]], tf.float32)
        return x | {"inputs": tf.ensure_shape(inputs, (None, tiny.FEATURES))}, y

    distiller = tiny.compiled(tiny.distiller(known=views))
    attached = views.attach(data()).batch(ROWS).map(watched).prefetch(1)
    logs = tiny.history(distiller, attached, epochs=3)
    expected = [shown(views, epoch)["inputs"].numpy() for epoch in range(3)]
    assert tiny.same(seen, expected)
    assert logs["soft_loss"][0] != logs["soft_loss"][1]


def test_steps_per_epoch_would_mix_the_epochs(views):
    distiller = tiny.compiled(tiny.distiller(known=views))
    attached = views.attach(data()).repeat().batch(8).prefetch(1)
    with pytest.raises(ValueError, match="steps_per_epoch"):
        distiller.fit(attached, steps_per_epoch=2, verbose=0)


def test_another_augmentation_is_refused(views):
    path = views.path
    with pytest.raises(ValueError, match="`augment` must be the function"):
        Cache.open(path)
    other = Cache.open(path, augment=lambda x, seed: augment(x, seed + 1))
    with pytest.raises(ValueError, match="does not replay"):
        other.attach(data())
    again = Cache.open(path, augment=augment)
    assert np.array_equal(shown(again, 1)["inputs"], shown(views, 1)["inputs"])


def test_views_are_verified(views, teacher):
    assert views.verify(teacher, data(), rows=8) == {
        "rows": 8,
        "max_difference": pytest.approx(0, abs=1e-5),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"views": 2}, "needs `augment`"),
        ({"views": 0}, "`views` must be an integer from 1"),
        ({"dtype": "int8"}, "`dtype` must be 'float16' or 'float32'"),
        ({"key": "name"}, "`key` must be 'content' or 'position'"),
        ({"shard": (2, 2)}, r"`shard` must be \(i, n\)"),
        ({"batch_size": 0}, "`batch_size` must be an integer from 1"),
        ({"taps": ["hiden"]}, "hidden"),
    ],
)
def test_bad_arguments(teacher, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        Cache.build(teacher, data(), tmp_path, **arguments)


# -- what is refused ------------------------------------------------------------------


def test_another_teacher(cache, teacher):
    other = tiny.teacher()
    other.layers[-1].bias.assign_add([0.0, 0.0, 0.1])
    options = {"dtype": "float32", "taps": ["hidden"]}
    with pytest.raises(ValueError, match="of another teacher"):
        Cache.build(other, data(), cache.path, **options)
    with pytest.raises(ValueError, match="of another teacher"):
        cache.verify(other, data())
    assert len(Cache.build(teacher, data(), cache.path, **options)) == ROWS


def test_other_arguments(cache, teacher):
    with pytest.raises(ValueError, match="built with dtype=float32. Received: float16"):
        Cache.build(teacher, data(), cache.path, taps=["hidden"])
    with pytest.raises(ValueError, match=r"taps=\['hidden'\]. Received: \[\]"):
        Cache.build(teacher, data(), cache.path, dtype="float32")


def test_other_data(cache, teacher):
    options = {"dtype": "float32", "taps": ["hidden"]}
    with pytest.raises(ValueError, match="not in the cache"):
        Cache.build(teacher, data(X + 1, Y), cache.path, **options)
    with pytest.raises(ValueError, match="Received rows with"):
        Cache.build(teacher, data(X.astype("float64"), Y), cache.path, **options)
    changed = X.copy()
    changed[3, 0] += 1e-6
    with pytest.raises(tf.errors.OpError, match="1 of 24 rows are not in the cache"):
        told(cache, data(changed, Y))
    for rows in (data().batch(4), data(X.astype("float64"), Y), data({"x": X}, Y)):
        with pytest.raises(ValueError, match="`dataset` must hold single rows"):
            cache.attach(rows)
    with pytest.raises(ValueError, match="already"):
        cache.attach(cache.attach(data()))
    with pytest.raises(TypeError, match="from_tensor_slices"):
        cache.attach(X)


def test_batched_data(teacher, tmp_path):
    with pytest.raises(ValueError, match="single rows, not batches"):
        Cache.build(teacher, data().batch(4), tmp_path)


def test_empty_data(teacher, tmp_path):
    with pytest.raises(ValueError, match="`dataset` is empty"):
        Cache.build(teacher, data().take(0), tmp_path)
    assert len(Cache.build(teacher, data(), tmp_path)) == ROWS


def test_another_number_of_classes(cache):
    inputs = keras.Input((tiny.FEATURES,))
    student = keras.Model(inputs, keras.layers.Dense(5)(inputs))
    with pytest.raises(ValueError, match="5 classes in the student and 3"):
        kd.Distiller(student, cache)


def test_a_tap_that_is_not_there(cache):
    with pytest.raises(ValueError, match=r"does not hold 'logits'.*taps=\['hidden'\]"):
        kd.Distiller(
            tiny.mlp(),
            cache,
            links=[kd.Link("hidden", "logits", "mse", adapter="auto")],
        )


def test_rows_attached_by_another_cache(cache, teacher, tmp_path):
    other = Cache.build(teacher, data(), tmp_path)
    distiller = tiny.compiled(tiny.distiller(known=cache))
    with pytest.raises(ValueError, match="attached by another cache"):
        distiller.fit(other.attach(data()).batch(8), verbose=0)


def test_values_that_float16_cannot_hold(tmp_path):
    model = tiny.mlp()
    model.layers[-1].bias.assign([1e6, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"not finite in float16.*dtype='float32'"):
        Cache.build(model, data(), tmp_path / "half")
    cache = Cache.build(model, data(), tmp_path / "single", dtype="float32")
    np.testing.assert_allclose(told(cache)[0], model(X), rtol=1e-6)
    model.layers[-1].bias.assign([np.nan, 0.0, 0.0])
    with pytest.raises(ValueError, match="not finite in float32"):
        Cache.build(model, data(), tmp_path / "nan", dtype="float32")


def test_a_directory_with_other_files(teacher, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not a cache, and holds \['notes.txt'\]"):
        Cache.build(teacher, data(), tmp_path)
    with pytest.raises(ValueError, match="There is no cache"):
        Cache.open(tmp_path)


@pytest.mark.parametrize("file", ["shard-000000.bin", "index-keys.bin"])
def test_damaged_files(copy, file):
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[:-3])
    with pytest.raises(ValueError, match=rf"damaged: {file} has {len(content) - 3}"):
        Cache.open(copy)
    (copy / file).write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    with pytest.raises(ValueError, match=f"the checksum of {file}"):
        Cache.open(copy)
    (copy / file).unlink()
    with pytest.raises(ValueError, match=f"{file} has 0 bytes"):
        Cache.open(copy)


def test_an_unfinished_cache(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(ValueError, match="unfinished"):
        Cache.open(copy)


def test_augment_without_views(cache):
    with pytest.raises(ValueError, match="`augment` has no effect"):
        Cache.open(cache.path, augment=augment)


def test_verify(cache, teacher, copy):
    assert cache.verify(teacher, data(), rows=6)["rows"] == 6
    assert cache.verify(teacher, data())["max_difference"] < 1e-6
    # Values that were changed together with their checksums.
    manifest = json.loads((copy / "manifest.json").read_text())
    shard = copy / "shard-000000.bin"
    content = bytearray(shard.read_bytes())
    values = np.frombuffer(content, "<f4", offset=8 * ROWS, count=ROWS * 15)
    values[3] += 1
    shard.write_bytes(content)
    manifest["shards"][0]["crc32"] = zlib.crc32(content)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="differ from the cache"):
        Cache.open(copy).verify(teacher, data())


# -- by position ----------------------------------------------------------------------


def test_by_position(teacher, tmp_path):
    cache = Cache.build(teacher, data(), tmp_path, key="position", dtype="float32")
    assert not list(tmp_path.glob("index*"))
    np.testing.assert_allclose(told(cache)[0], teacher(X), atol=1e-6)
    np.testing.assert_allclose(
        told(cache, data().take(5))[0], teacher(X[:5]), atol=1e-6
    )
    with pytest.raises(tf.errors.OpError, match="not the one at that place"):
        told(cache, data(X[::-1], Y))
    with pytest.raises(tf.errors.OpError, match="Row 47 is not in the cache"):
        told(cache, data().concatenate(data()))
    assert cache.verify(teacher, data(), rows=5)["rows"] == 5


# -- in parts -------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["content", "position"])
def test_parts_are_joined(teacher, tmp_path, key):
    options = {"key": key, "dtype": "float32"}
    paths = [tmp_path / f"part{i}" for i in range(3)]
    rows = data(X[:-1], Y[:-1])
    parts = [
        Cache.build(teacher, rows, path, shard=(i, 3), **options)
        for i, path in enumerate(paths)
    ]
    assert [len(part) for part in parts] == [8, 8, 7]
    np.testing.assert_allclose(
        told(parts[1], rows.shard(3, 1))[0], teacher(X[1:-1:3]), atol=1e-6
    )
    whole = Cache.join([paths[2], paths[0], paths[1]], tmp_path / "whole")
    for path in paths:
        shutil.rmtree(path)
    assert len(whole) == ROWS - 1
    np.testing.assert_allclose(told(whole, rows)[0], teacher(X[:-1]), atol=1e-6)
    assert len(Cache.open(whole.path)) == ROWS - 1


def test_parts_with_views(teacher, tmp_path):
    paths = [tmp_path / "0", tmp_path / "1"]
    for i, path in enumerate(paths):
        options = {"views": 2, "augment": augment, "shard": (i, 2)}
        Cache.build(teacher, data(), path, **options)
    whole = Cache.join(paths, tmp_path / "whole")
    for use in (whole.attach, lambda rows: whole.verify(teacher, rows)):
        with pytest.raises(ValueError, match=r"Cache.open\(path, augment=...\)"):
            use(data())
    opened = Cache.open(whole.path, augment=augment)
    assert opened.verify(teacher, data())["rows"] == ROWS


def test_parts_that_do_not_fit(cache, teacher, tmp_path):
    paths = [tmp_path / f"part{i}" for i in range(2)]
    for i, path in enumerate(paths):
        Cache.build(teacher, data(), path, shard=(i, 2))
    with pytest.raises(ValueError, match="all 2 parts, each once"):
        Cache.join(paths[:1], tmp_path / "a")
    with pytest.raises(ValueError, match="all 2 parts, each once"):
        Cache.join([paths[0], paths[0]], tmp_path / "a")
    other = tmp_path / "other"
    Cache.build(tiny.teacher(5), data(), other, shard=(1, 2))
    with pytest.raises(ValueError, match="differ in fingerprint"):
        Cache.join([paths[0], other], tmp_path / "a")
    with pytest.raises(ValueError, match="not a part"):
        Cache.join([paths[0], cache.path], tmp_path / "a")
    with pytest.raises(ValueError, match="There is no cache"):
        Cache.join([paths[0], tmp_path / "none"], tmp_path / "a")
    with pytest.raises(ValueError, match="`paths`"):
        Cache.join([], tmp_path / "a")
    assert not (tmp_path / "a").exists()
    whole = tmp_path / "whole"
    Cache.join(paths, whole)
    fewer = tmp_path / "fewer"
    Cache.build(teacher, data(X[:8], Y[:8]), fewer, shard=(0, 1))
    with pytest.raises(ValueError, match="of other rows than the parts"):
        Cache.join([fewer], whole)
    assert len(Cache.join(paths, whole)) == ROWS


# -- building that is interrupted -----------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Many shards, and an index that is sorted in several ranges."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    monkeypatch.setattr(shards, "BLOCK", 5)


@pytest.mark.usefixtures("small")
def test_many_shards(teacher, tmp_path):
    cache = Cache.build(teacher, data(), tmp_path, batch_size=2, dtype="float32")
    assert len(list(tmp_path.glob("shard-*.bin"))) == ROWS // 4
    np.testing.assert_allclose(told(cache)[0], teacher(X), atol=1e-6)
    keys = np.fromfile(tmp_path / "index-keys.bin", "<u8")
    assert np.all(np.diff(keys.astype(object)) > 0)


def stopping(after):
    """Data that fail after some rows."""

    def rows():
        yield from zip(X[:after], Y, strict=False)
        raise RuntimeError("stopped")

    signature = tf.TensorSpec((tiny.FEATURES,)), tf.TensorSpec((), tf.int32)
    return tf.data.Dataset.from_generator(rows, output_signature=signature)


@pytest.mark.usefixtures("small")
def test_what_was_done_is_not_done_again(teacher, tmp_path, monkeypatch):
    with pytest.raises(tf.errors.OpError, match="stopped"):
        Cache.build(teacher, stopping(13), tmp_path, batch_size=2)
    assert len(list(tmp_path.glob("shard-*.bin"))) == 3
    with pytest.raises(ValueError, match="unfinished"):
        Cache.open(tmp_path)
    (tmp_path / ".tmp-shard-000003.bin").write_bytes(b"half")
    taught = []
    call = kd.teachers.Model.__call__

    def counted(self, x, *args):
        tf.py_function(lambda n: taught.append(int(n)), [tf.shape(x)[0]], [])
        return call(self, x, *args)

    monkeypatch.setattr(kd.teachers.Model, "__call__", counted)
    cache = Cache.build(teacher, data(), tmp_path, batch_size=2)
    assert sum(taught) == ROWS - 12
    assert len(cache) == ROWS
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.usefixtures("small")
def test_other_data_do_not_go_on_with_it(teacher, tmp_path):
    with pytest.raises(tf.errors.OpError, match="stopped"):
        Cache.build(teacher, stopping(13), tmp_path, batch_size=2)
    for other in (data(X[::-1], Y), data().take(10)):
        with pytest.raises(
            ValueError, match="not in the order, with which it was begun"
        ):
            Cache.build(teacher, other, tmp_path, batch_size=2)
    with pytest.raises(ValueError, match="of another teacher"):
        Cache.build(tiny.teacher(5), data(), tmp_path, batch_size=2)
    # A shard that was damaged meanwhile is made again.
    shard = tmp_path / "shard-000001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    cache = Cache.build(teacher, data(), tmp_path, batch_size=2)
    assert shard.read_bytes() == content
    np.testing.assert_allclose(told(cache)[0], teacher(X), atol=2e-3)


@pytest.mark.usefixtures("small")
def test_views_go_on_with_the_same_augmentation(views, teacher, tmp_path):
    options = {"views": VIEWS, "batch_size": 6, "dtype": "float32"}
    with pytest.raises(tf.errors.OpError, match="stopped"):
        Cache.build(teacher, stopping(13), tmp_path, augment=augment, **options)

    def other(x, seed):
        return augment(x, seed) + 1

    with pytest.raises(ValueError, match="does not replay"):
        Cache.build(teacher, data(), tmp_path, augment=other, **options)
    cache = Cache.build(teacher, data(), tmp_path, augment=augment, **options)
    first, second = (shown(known, 2) for known in (cache, views))
    assert np.array_equal(first["inputs"], second["inputs"])
    outputs, expected = cache(first, [], 4.0)[0], views(second, [], 4.0)[0]
    np.testing.assert_allclose(outputs, expected, atol=1e-6)


@pytest.mark.usefixtures("small")
def test_a_full_disk(teacher, tmp_path):
    reference = Cache.build(teacher, data(), tmp_path / "reference", batch_size=2)
    path = tmp_path / "cache"
    index = (tmp_path / "reference" / "index-keys.bin").stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow above this, as if the disk were full: there is no room for the
    # manifest, then none for the index.
    for allowed in (8, index - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, limit[1]))
        try:
            with pytest.raises(OSError, match="could not be written"):
                Cache.build(teacher, data(), path, batch_size=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert not list(path.glob(".tmp-*"))
        with pytest.raises(ValueError, match="There is no cache|unfinished"):
            Cache.open(path)
    cache = Cache.build(teacher, data(), path, batch_size=2)
    assert np.array_equal(told(cache)[0], told(reference)[0])


@pytest.mark.usefixtures("small")
def test_a_disk_that_is_full_in_the_middle_of_a_shard(teacher, tmp_path, monkeypatch):
    write = shards.write_whole

    def limited(path, parts):
        if path.name != "shard-000002.bin":
            return write(path, parts)

        def until_full():
            yield next(iter(parts))
            raise OSError(errno.ENOSPC, "No space left on device")

        return write(path, until_full())

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_whole", limited)
        with pytest.raises(OSError, match="could not be written .No space left"):
            Cache.build(teacher, data(), tmp_path, batch_size=2)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"lock", "manifest.json", "shard-000000.bin", "shard-000001.bin"}
    cache = Cache.build(teacher, data(), tmp_path, batch_size=2)
    np.testing.assert_allclose(told(cache)[0], teacher(X), atol=2e-3)


def test_the_bar_shows_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    bar = Progress(10**6)
    bar.update(1)
    time.sleep(0.06)
    bar.update(100)
    # At 0.06 seconds for 100 rows there are minutes left.
    assert re.search(r"100/1000000.*\d+:\d\d", capsys.readouterr().out)
    bar.close(100)
    assert "100/100" in capsys.readouterr().out


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The directory in which other processes have noted what went wrong."""
    path = tmp_path_factory.mktemp("processes")
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("processes.py"), path],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return path


@pytest.mark.parametrize("what", ["kills", "together", "replicas"])
def test_processes(what, processes):
    assert (processes / what / "result.txt").read_text() == "done"
