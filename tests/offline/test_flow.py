"""FlowDistiller: the policy of its gradients."""

from __future__ import annotations

import tiny
from offline import nets

import keras_distill as kd


def test_singular_values_are_clipped_to_the_main_gradient(teacher, digits):
    x, y = digits[0][:64], digits[1][:64]
    moved = []
    for options in ({}, {"gradient_policy": None}):
        tiny.keras.utils.set_random_seed(2)
        distiller = kd.FlowDistiller(
            nets.net(6), teacher, nets.STAGES, method="svd", weight=1e4
        )
        before = tiny.values(distiller.student.trainable_variables)
        tiny.compiled(distiller, nets.SPARSE, **options)
        tiny.history(distiller, x, y, batch_size=64)
        after = tiny.values(distiller.student.trainable_variables)
        moved.append(
            sum(((a - b) ** 2).sum() for a, b in zip(after, before, strict=True)) ** 0.5
        )
    clipped, free = moved
    assert distiller._options["gradient_policy"] is None
    assert clipped < free / 10


def test_the_policy_is_compiles_default_for_singular_values_alone(teacher):
    for method, policy in (("svd", kd.ClipToMain()), ("fsp", None)):
        distiller = kd.FlowDistiller(nets.net(6), teacher, nets.STAGES, method=method)
        assert distiller.compile("sgd", nets.SPARSE) is distiller
        assert distiller._options["gradient_policy"] == policy
