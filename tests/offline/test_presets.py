"""What holds for every preset: it learns, is saved, and stays finite."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tiny
from offline import nets

import keras_distill as kd


def compiled(distiller, rate=0.01, **kwargs):
    kwargs = {"run_eagerly": True} | kwargs
    return distiller.compile(keras.optimizers.Adam(rate), nets.SPARSE, **kwargs)


@pytest.mark.parametrize("kind", nets.KINDS)
def test_one_epoch_lowers_its_own_terms(kind, teacher, digits):
    x, y = nets.inputs_of(kind, digits[0][:128]), digits[1][:128]
    before = tiny.values(teacher.variables)
    distiller = compiled(nets.make(kind, teacher))
    first = nets.terms(distiller, (x, y))
    logs = tiny.history(distiller, x, y, batch_size=32)
    after = nets.terms(distiller, (x, y))
    names = nets.KINDS[kind][1]
    weights = {n: float(distiller.term_weights[n].numpy()) for n in names}
    assert sum(w * after[n] for n, w in weights.items()) < sum(
        w * first[n] for n, w in weights.items()
    )
    assert all(np.isfinite(logs[f"{name}_loss"][0]) for name in names)
    assert tiny.same(before, tiny.values(teacher.variables))


@pytest.mark.parametrize("kind", nets.KINDS)
def test_the_run_goes_on_after_saving(kind, teacher, digits, tmp_path):
    x, y = nets.inputs_of(kind, digits[0][:128]), digits[1][:128]
    distiller = compiled(nets.make(kind, teacher))
    tiny.history(distiller, x, y, batch_size=64)
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    assert type(loaded) is type(distiller)
    plain = digits[0][:8]
    np.testing.assert_array_equal(
        distiller.predict(plain, verbose=0), loaded.predict(plain, verbose=0)
    )
    rows = digits[0][:128], y
    assert distiller.evaluate(*rows, verbose=0, return_dict=True) == (
        loaded.evaluate(*rows, verbose=0, return_dict=True)
    )
    loaded.teacher = teacher
    loaded.run_eagerly = True
    first = tiny.history(distiller, x, y, batch_size=64)
    second = tiny.history(loaded, x, y, batch_size=64)
    assert first == second
    assert tiny.same(tiny.values(distiller.weights), tiny.values(loaded.weights))
    assert nets.own_config(loaded) == nets.own_config(distiller)


@pytest.mark.parametrize("kind", nets.KINDS)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_lower_precision_stays_finite(kind, policy, teacher, digits):
    keras.config.set_dtype_policy(policy)
    try:
        distiller = compiled(nets.make(kind, teacher), check_finite=True)
    finally:
        keras.config.set_dtype_policy("float32")
    x = nets.inputs_of(kind, digits[0][:64])
    logs = tiny.history(distiller, x, digits[1][:64], batch_size=32)
    assert all(np.isfinite(value[0]) for value in logs.values())
    assert all(np.isfinite(v).all() for v in tiny.values(distiller.student.weights))


@pytest.mark.parametrize("kind", nets.KINDS)
def test_compiled_by_xla_it_is_the_same(kind, teacher, digits):
    x, y = nets.inputs_of(kind, digits[0][:64]), digits[1][:64]
    logs, steps = [], []
    for options in ({"run_eagerly": True}, {"jit_compile": True}):
        keras.utils.set_random_seed(3)
        distiller = nets.make(kind, teacher)
        for layer in distiller._flatten_layers():
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0  # XLA would leave out others
        weights = distiller.student.trainable_variables
        before = tiny.values(weights)
        # Adam would be more to compile than the rest.
        distiller.compile("sgd", nets.SPARSE, **options)
        logs.append(tiny.history(distiller, x, y, batch_size=64))
        moved = [a - b for a, b in zip(tiny.values(weights), before, strict=True)]
        steps.append(np.concatenate([part.ravel() for part in moved]))
    eager, xla = logs
    assert eager.keys() == xla.keys()
    assert np.isfinite(steps[1]).all()
    assert all(np.isfinite(xla[f"{name}_loss"][0]) for name in nets.KINDS[kind][1])
    if kind == "contrastive":  # its negatives are random
        return
    for name, value in eager.items():
        np.testing.assert_allclose(xla[name], value, 1e-3, 1e-6, err_msg=name)
    apart = np.linalg.norm(steps[1] - steps[0])
    assert apart <= 1e-3 * np.linalg.norm(steps[0])


@pytest.mark.parametrize(
    "build",
    [
        lambda s, t: kd.AttentionDistiller(s, t, ["relu1"]),
        lambda s, t: kd.HintDistiller(s, t, hints="relu1"),
    ],
)
def test_pairs_that_are_no_dict_are_refused(build, teacher):
    with pytest.raises(TypeError, match=r"\{student layer: teacher layer\}"):
        build(nets.net(2), teacher)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s, t: kd.HintDistiller(s, t, hints={}), "`hints`.*at least 1"),
        (
            lambda s, t: kd.HintDistiller(s, t, hints={"relu9": "relu1"}),
            "no layer 'relu9'.*relu",
        ),
        (
            lambda s, t: kd.AttentionDistiller(s, t, {"embedding": "embedding"}),
            "AttentionTransfer needs teacher features of shape",
        ),
        (
            lambda s, t: kd.AttentionDistiller(s, t, nets.STAGES, p=0),
            "`p` must be at least 1",
        ),
        (
            lambda s, t: kd.FlowDistiller(s, t, {"relu1": "relu1"}),
            "at least 2 pair",
        ),
        (
            lambda s, t: kd.FlowDistiller(s, t, nets.STAGES),
            "same channels in teacher and student",
        ),
        (
            lambda s, t: kd.FlowDistiller(s, t, nets.STAGES, method="gram"),
            "`method` must be 'fsp' or 'svd'",
        ),
        (
            lambda s, t: kd.FlowDistiller(s, t, nets.STAGES, rank=2),
            "`rank` has no effect",
        ),
        (
            lambda s, t: kd.FlowDistiller(
                nets.net(6), t, nets.STAGES, method="svd", rank=7
            ),
            "`rank` must be at most",
        ),
        (
            lambda s, t: kd.RelationalDistiller(s, t, embedding="embedding"),
            "`embedding` must be \\(student layer, teacher layer\\)",
        ),
        (
            lambda s, t: kd.RelationalDistiller(
                s,
                t,
                embedding=("embedding", "embedding"),
                distance_weight=0,
                angle_weight=0,
            ),
            "All weights of the relations are 0",
        ),
        (
            lambda s, t: kd.RelationalDistiller(s, t, embedding=("relu3", "embedding")),
            "RelationalDistance",
        ),
        (
            lambda s, t: kd.ContrastiveDistiller(
                s, t, embedding=("relu3", "embedding"), num_samples=4
            ),
            "give vectors",
        ),
        (
            lambda s, t: kd.ContrastiveDistiller(
                s, t, embedding=("embedding", "embedding"), num_samples=1
            ),
            "`num_samples` must be an integer of at least 2",
        ),
        (
            lambda s, t: kd.ContrastiveDistiller(
                s, t, embedding=("embedding",) * 2, num_samples=4, negatives=0
            ),
            "`negatives` must be an integer",
        ),
        (
            lambda s, t: kd.ContrastiveDistiller(
                s, t, embedding=("embedding",) * 2, num_samples=4, momentum=1
            ),
            "`momentum` must be at least 0, below 1",
        ),
        (
            lambda s, t: kd.ReusedTeacherClassifier(
                s, t, features=("embedding", "relu3")
            ),
            "`features` must name layers that give grids",
        ),
        (
            lambda s, t: kd.ReusedTeacherClassifier(
                s, t, features=("relu3", "relu3"), soft_loss="auto"
            ),
            "`soft_loss` must be None",
        ),
        (
            lambda s, t: kd.InheritExplore(nets.net(1), t, features=("relu1", "relu1")),
            "cannot be split in two",
        ),
        (
            lambda s, t: kd.InheritExplore(s, t, features=("embedding", "relu1")),
            "PartTranslator needs",
        ),
    ],
)
def test_bad_input_is_refused(build, message, teacher):
    with pytest.raises(ValueError, match=message):
        build(nets.net(3), teacher)


def test_further_links_and_options_pass_through(teacher):
    distiller = kd.AttentionDistiller(
        nets.net(3),
        teacher,
        {"relu1": "relu1"},
        links=[kd.Link("relu3", "relu3", "mse", adapter="auto")],
        beta=0.5,
        temperature=2.0,
        alpha=0.25,
        name="both",
    )
    assert distiller.name == "both"
    weights = {name: float(v.numpy()) for name, v in distiller.term_weights.items()}
    assert weights == {"hard": 0.25, "soft": 0.5, "relu1": 1000.0, "relu3": 1.0}
    assert float(distiller.temperature.numpy()) == 2.0
    config = distiller.get_config()
    assert [link["name"] for link in config["links"]] == ["relu3"]


@pytest.mark.parametrize("kind", [k for k in nets.KINDS if k not in ("hint",)])
def test_without_being_asked_there_is_no_soft_term(kind, teacher):
    distiller = nets.make(kind, teacher)
    assert distiller.soft_loss is None
    alphas = {"reused": 0.0, "relational": nets.ALPHA}
    assert float(distiller.alpha.numpy()) == pytest.approx(alphas.get(kind, 1.0))
