"""suggest_links: pairs that a Distiller can train on, for every kind of loss."""

from __future__ import annotations

import keras
import pytest
from offline import nets

import keras_distill as kd


def paths(links):
    return [(link.student_layer, link.teacher_layer) for link in links]


def residual(width: int, stages: int = 3) -> keras.Model:
    """Residual stages: convolutions, batch normalization, addition, ReLU."""
    x = inputs = keras.Input((8, 8, 1))
    for stage in range(stages):
        stride = 2 if stage else 1
        options = {"padding": "same", "use_bias": False}
        short = keras.layers.Conv2D(width, 1, stride, **options)(x)
        x = keras.layers.Conv2D(width, 3, stride, **options)(x)
        x = keras.layers.BatchNormalization(name=f"norm{stage}")(x)
        x = keras.layers.Add(name=f"add{stage}")([x, short])
        x = keras.layers.ReLU(name=f"block{stage}")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(x))


def test_stages_on_the_same_grid_are_paired_and_printed(capsys):
    links = kd.suggest_links(residual(3), nets.net(6), kd.losses.Hint(), weight=5.0)
    assert paths(links) == [
        ("block0", "relu1"),
        ("block1", "relu2"),
        ("block2", "relu3"),
    ]
    assert all(link.weight == 5.0 and link.adapter == "auto" for link in links)
    table = capsys.readouterr().out
    assert "block0" in table
    assert "(8, 8, 3)" in table
    assert len(table.splitlines()) == 5


def test_the_links_train_a_distiller(capsys):
    student, teacher = residual(3), nets.net(6)
    links = kd.suggest_links(student, teacher, "mse")
    distiller = kd.Distiller(student, teacher, links=links)
    assert list(distiller.link_names) == ["block0", "block1", "block2"]
    assert all(link.shapes[0][-1] == 3 for link in distiller.links)


def test_a_grid_that_only_one_network_has_is_left_out(capsys):
    links = kd.suggest_links(residual(3, stages=2), residual(4, stages=3), "mse")
    assert paths(links) == [("block0", "block0"), ("block1", "block1")]


def test_nested_models_give_paths(capsys):
    inputs = keras.Input((8, 8, 1))
    backbone = residual(4)
    features = keras.Model(backbone.input, backbone.get_layer("block2").output)
    features.name = "backbone"
    x = keras.layers.GlobalAveragePooling2D()(features(inputs))
    teacher = keras.Model(inputs, keras.layers.Dense(10)(x))
    links = kd.suggest_links(residual(3), teacher, "mse")
    assert paths(links)[:2] == [
        ("block0", "backbone/block0"),
        ("block1", "backbone/block1"),
    ]
    kd.Distiller(residual(3), teacher, links=links)


@pytest.mark.parametrize(
    "loss", [kd.losses.ActivationBoundary(), kd.losses.MarginReLU(-1.0)]
)
def test_boundaries_are_read_before_the_activation(loss, capsys):
    student, teacher = residual(3), nets.net(6)
    links = kd.suggest_links(student, teacher, loss)
    assert paths(links) == [("add0", "norm1"), ("add1", "norm2"), ("add2", "norm3")]
    assert all(isinstance(link.adapter, kd.adapters.Connector) for link in links)
    kd.Distiller(student, teacher, links=links)


def test_the_overhaul_gets_margins_from_the_teacher(capsys):
    links = kd.suggest_links(residual(3), nets.net(6), kd.losses.MarginReLU)
    assert [len(link.loss.margin) for link in links] == [6, 12, 18]
    assert paths(links)[0] == ("add0", "norm1")
    with pytest.raises(ValueError, match=r"found 0 pair\(s\)"):
        # Its activations come after additions: there are no margins to take.
        kd.suggest_links(nets.net(3), residual(3), kd.losses.MarginReLU)


def test_an_adapter_is_put_only_where_the_loss_needs_one(capsys):
    student, teacher = nets.net(3), nets.net(6)
    for loss in (kd.losses.AttentionTransfer(), kd.losses.SimilarityPreserving()):
        links = kd.suggest_links(student, teacher, loss)
        assert [link.adapter for link in links] == [None] * 3
    same = kd.suggest_links(student, nets.net(3), "mse")
    assert [link.adapter for link in same] == [None] * 3
    none = kd.suggest_links(student, teacher, "mse", adapter=None)
    assert [link.adapter for link in none] == [None] * 3


@pytest.mark.parametrize("loss", [kd.losses.FlowOfProcedure, kd.losses.SingularValue])
def test_flows_get_consecutive_pairs(loss, capsys):
    student, teacher = nets.net(6), nets.net(6)
    links = kd.suggest_links(student, teacher, loss())
    assert paths(links) == [
        (["relu1", "relu2"], ["relu1", "relu2"]),
        (["relu2", "relu3"], ["relu2", "relu3"]),
    ]
    kd.Distiller(student, teacher, links=links)


def test_relations_are_read_at_embeddings(capsys):
    links = kd.suggest_links(nets.net(3), nets.net(6), kd.losses.RelationalDistance())
    assert {link.student_layer for link in links} <= {"embedding", "dropout"}
    kd.Distiller(nets.net(3), nets.net(6), links=links)


def test_networks_without_grids_are_paired_by_depth(capsys):
    def mlp(*widths):
        x = inputs = keras.Input((6,))
        for i, width in enumerate(widths):
            x = keras.layers.Dense(width, "relu", name=f"dense{i}")(x)
        return keras.Model(inputs, keras.layers.Dense(3)(x))

    links = kd.suggest_links(mlp(8, 7), mlp(20, 18, 16, 14), "mse")
    assert paths(links) == [("dense0", "dense1"), ("dense1", "dense3")]
    even = kd.suggest_links(mlp(*[8] * 6), mlp(*[9] * 12), "mse")
    assert paths(even) == [
        ("dense1", "dense3"),
        ("dense3", "dense7"),
        ("dense5", "dense11"),
    ]


def test_what_cannot_be_paired_is_refused(capsys):
    student, teacher = nets.net(2), nets.net(3)
    with pytest.raises(TypeError, match="`teacher` must be one keras.Model"):
        kd.suggest_links(student, [teacher], "mse")
    with pytest.raises(TypeError, match="`adapter` must be None or 'auto'"):
        kd.suggest_links(student, teacher, "mse", adapter=keras.layers.Dense(3))
    with pytest.raises(ValueError, match="features with features"):
        kd.suggest_links(student, teacher, kd.losses.DecoupledKD())
    with pytest.raises(ValueError, match="found 0 pair"):
        kd.suggest_links(student, teacher, kd.losses.VariationalInformation())
