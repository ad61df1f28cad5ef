"""The cache as a stage of an Apache Beam pipeline."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tensorflow as tf
import tiny

from keras_distill.teachers import Cache
from keras_distill.teachers.beam import build_cache

X, Y = tiny.data(23)


def rows():
    return tf.data.Dataset.from_tensor_slices((X, Y))


def test_it_builds_what_one_machine_builds(tmp_path):
    beam = pytest.importorskip("apache_beam")
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.testing.util import assert_that, equal_to

    path = tmp_path / "cache"
    options = {"dtype": "float32", "taps": ["hidden"], "batch_size": 4}
    for _ in range(2):  # again, as a pipeline that was begun anew
        with beam.Pipeline(runner=FnApiRunner()) as pipeline:
            stage = build_cache(tiny.teacher, rows, path, 3, **options)
            assert_that(pipeline | stage, equal_to([str(path)]))
    cache = Cache.open(path)
    alone = Cache.build(tiny.teacher(), rows(), tmp_path / "alone", **options)
    found, expected = (
        known(next(iter(known.attach(rows()).batch(100)))[0], ["hidden"], 1.0)
        for known in (cache, alone)
    )
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(found[1]["hidden"], expected[1]["hidden"], atol=1e-6)
    assert len(list((tmp_path / "cache.parts").iterdir())) == 3
    assert cache.verify(tiny.teacher(), rows())["rows"] == len(X)


def test_without_beam(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ImportError, match=r"extra `beam`"):
        build_cache(tiny.teacher, rows, "cache", 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"parts": 0}, ValueError, "`parts` must be an integer from 1"),
        ({"dataset": rows()}, TypeError, "`dataset` must be a function"),
        ({"teacher": tiny.teacher()}, TypeError, "`teacher` must be a function"),
        ({"shard": (0, 2)}, TypeError, r"does not take: \['shard'\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, error, message):
    pytest.importorskip("apache_beam")
    given = {"teacher": tiny.teacher, "dataset": rows, "path": "cache", "parts": 2}
    with pytest.raises(error, match=message):
        build_cache(**given | arguments)
