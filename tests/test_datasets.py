"""The examples' data."""

from __future__ import annotations

import os

import numpy as np
import pytest

from keras_distill import datasets


def _check(data, sizes, shape):
    assert data.input_shape == shape
    assert data.num_classes == 10
    for (x, y), size in zip(
        (data.train, data.validation, data.test), sizes, strict=True
    ):
        assert x.shape == (size, *shape)
        assert y.shape == (size,)
        assert x.dtype == np.float32
        assert y.dtype == np.int32
        assert x.min() == 0
        assert x.max() == 1
        assert set(np.unique(y)) == set(range(10))


def test_digits_has_three_parts_that_share_no_row():
    data = datasets.load("digits")
    _check(data, (1000, 297, 500), (8, 8, 1))
    parts = (data.train, data.validation, data.test)
    rows = np.concatenate([x.reshape(len(x), -1) for x, _ in parts])
    assert len(np.unique(rows, axis=0)) == 1797


def test_digits_is_divided_the_same_way_each_time():
    first, second = datasets.load(), datasets.load("digits")
    np.testing.assert_array_equal(first.train[0], second.train[0])
    np.testing.assert_array_equal(first.test[1], second.test[1])


def test_digits_labels_belong_to_the_images():
    data = datasets.load("digits")
    means = np.stack(
        [data.train[0][data.train[1] == digit].mean(0) for digit in range(10)]
    )
    distance = ((data.test[0][:, None] - means[None]) ** 2).sum((2, 3, 4))
    assert (distance.argmin(1) == data.test[1]).mean() > 0.85


@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="needs prepared data")
@pytest.mark.parametrize(
    ("name", "sizes", "shape", "first"),
    [
        ("mnist", (54000, 6000, 10000), (28, 28, 1), "0"),
        ("cifar10", (45000, 5000, 10000), (32, 32, 3), "airplane"),
    ],
)
def test_tensorflow_datasets(name, sizes, shape, first):
    data = datasets.load(name, download=False)
    _check(data, sizes, shape)
    assert data.class_names[0] == first


def test_data_that_are_absent_say_where_they_were_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="TFDS_DATA_DIR") as caught:
        datasets.load("mnist", data_dir=str(tmp_path), download=False)
    assert str(tmp_path) in str(caught.value)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="digits, mnist, cifar10.*'iris'"):
        datasets.load("iris")


def test_a_folder_for_the_embedded_digits_is_refused():
    with pytest.raises(ValueError, match="no effect on 'digits'"):
        datasets.load("digits", data_dir="somewhere")
