"""ContrastiveDistiller: the official numbers, and its two memories."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from losses import golden
from offline import nets

import keras_distill as kd
from keras_distill.offline.memory import MemoryBank


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_both_directions_are_the_official_ones(dtype):
    file = golden.load("crd")
    h, arrays = file.meta["hyperparameters"], file.arrays
    banks = {}
    for who in ("student", "teacher"):
        memory = file.inputs[f"memory_{who}"]
        bank = MemoryBank(*memory.shape, h["temperature"], h["momentum"], dtype=dtype)
        bank.memory.assign(memory)
        banks[who] = bank
    own, known = (
        tf.constant(file.inputs[f"{who}_embedding"], dtype)
        for who in ("student", "teacher")
    )
    indices = file.inputs["contrast_index"]
    with tf.GradientTape() as tape:
        tape.watch([own, known])
        one = tf.reduce_mean(banks["teacher"].contrast(own, indices))
        other = tf.reduce_mean(banks["student"].contrast(known, indices))
        total = one + other
    gradients = tape.gradient(total, [own, known])
    value = golden.TOLERANCES[dtype]["value"][0]
    gradient = golden.TOLERANCES[dtype]["gradient"][0]
    assert float(total) == pytest.approx(file.loss, rel=value)
    assert float(one) == pytest.approx(float(arrays["out_loss_student"]), rel=value)
    # What scores the student's vectors is the teacher's memory.
    scales = [float(banks[who].scale.numpy()) for who in ("teacher", "student")]
    expected = [float(arrays[f"out_Z_{who}"]) for who in ("student", "teacher")]
    assert scales == pytest.approx(expected, rel=value)
    for who, found in zip(("student", "teacher"), gradients, strict=True):
        reference = arrays[f"grad_{who}_embedding"]
        error = np.linalg.norm(found.numpy() - reference)
        assert error <= gradient * np.linalg.norm(reference)
    for who, embedding in (("student", own), ("teacher", known)):
        banks[who].update(file.inputs["index"], embedding)
        np.testing.assert_allclose(
            banks[who].memory.numpy(),
            arrays[f"out_memory_{who}_updated"],
            rtol=1e-6,
            atol=1e-7,
        )


def make(teacher, **options):
    options = {"num_samples": 256, "negatives": 8, "embedding_dim": 4} | options
    return kd.ContrastiveDistiller(
        nets.net(2), teacher, embedding=("embedding", "embedding"), **options
    )


def test_memories_follow_the_rows_of_the_batch_and_the_scale_is_set_once(
    teacher, digits
):
    distiller = make(teacher)
    distiller.compile("sgd", nets.SPARSE, run_eagerly=True)
    before = distiller.student_memory.memory.numpy()
    index = np.array([3, 7, 200, 255], "int32")
    x = {"image": digits[0][:4], "kd_index": index}
    tiny.history(distiller, x, digits[1][:4], batch_size=4)
    after = distiller.student_memory.memory.numpy()
    changed = np.flatnonzero((before != after).any(-1))
    assert changed.tolist() == index.tolist()
    np.testing.assert_allclose(np.linalg.norm(after[index], axis=-1), 1, rtol=1e-5)
    scale = distiller.student_memory.scale.numpy()
    assert scale > 0
    tiny.history(distiller, x, digits[1][:4], batch_size=4)
    assert distiller.student_memory.scale.numpy() == scale


def test_negatives_are_other_samples(teacher):
    distiller = make(teacher, num_samples=3, negatives=500)
    index = keras.ops.convert_to_tensor([0, 1, 2])
    found = np.asarray(distiller._with_negatives(index))
    assert found[:, 0].tolist() == [0, 1, 2]
    for row in range(3):
        assert set(found[row, 1:].tolist()) == {0, 1, 2} - {row}


def test_both_heads_are_trained_and_the_student_alone_is_evaluated(teacher, digits):
    distiller = make(teacher)
    distiller.compile("sgd", nets.SPARSE, metrics=["accuracy"], run_eagerly=True)
    heads = [distiller.student_head, distiller.teacher_head]
    before = [tiny.values(head.weights) for head in heads]
    x = nets.inputs_of("contrastive", digits[0])
    tiny.history(distiller, x, digits[1])
    for head, values in zip(heads, before, strict=True):
        assert not np.array_equal(values[0], head.weights[0].numpy())
    logs = [
        distiller.evaluate(data, digits[1], verbose=0, return_dict=True)
        for data in (x, digits[0])
    ]
    assert logs[0] == logs[1]
    assert set(logs[0]) == {"loss", "hard_loss", "accuracy"}


def test_data_without_index_are_refused(teacher, digits):
    distiller = make(teacher)
    distiller.compile("sgd", nets.SPARSE, run_eagerly=True)
    with pytest.raises(ValueError, match="kd_index"):
        distiller.fit(*digits, verbose=0)
