"""Small networks for digits, and one of each distiller."""

from __future__ import annotations

import keras
import numpy as np

import keras_distill as kd

SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
ALPHA = 0.1  # of the relational distiller, whose terms are small here
STAGES = {"relu1": "relu1", "relu2": "relu2", "relu3": "relu3"}
NORMS = {"norm1": "norm1", "norm2": "norm2", "norm3": "norm3"}


def net(width: int, name: str | None = None) -> keras.Model:
    """Three stages on grids of 8, 4 and 2, an embedding, and logits."""
    x = inputs = keras.Input((8, 8, 1))
    for stage in (1, 2, 3):
        stride = 1 if stage == 1 else 2
        x = keras.layers.Conv2D(
            width * stage, 3, stride, padding="same", name=f"conv{stage}"
        )(x)
        x = keras.layers.BatchNormalization(name=f"norm{stage}", momentum=0.9)(x)
        x = keras.layers.ReLU(name=f"relu{stage}")(x)
    x = keras.layers.GlobalAveragePooling2D(name="embedding")(x)
    x = keras.layers.Dropout(0.1, name="dropout")(x)
    outputs = keras.layers.Dense(10, name="logits", dtype="float32")(x)
    return keras.Model(inputs, outputs, name=name)


# Name: how it is made, its own terms, the width of its student.
KINDS = {
    "hint": (
        lambda s, t: kd.HintDistiller(s, t, hints={"relu2": "relu2"}, joint=True),
        ["relu2"],
        3,
    ),
    "attention": (
        lambda s, t: kd.AttentionDistiller(s, t, STAGES),
        ["relu1", "relu2", "relu3"],
        3,
    ),
    "svd": (
        lambda s, t: kd.FlowDistiller(s, t, STAGES, method="svd", weight=300.0),
        ["relu1-relu2", "relu2-relu3"],
        6,
    ),
    "relational": (
        lambda s, t: kd.RelationalDistiller(
            s,
            t,
            embedding=("embedding", "embedding"),
            similarity_weight=30.0,
            probabilistic_weight=300.0,
            congruence_weight=1.0,
            alpha=ALPHA,
        ),
        ["distance", "angle", "similarity", "probabilistic", "congruence"],
        3,
    ),
    "contrastive": (
        lambda s, t: kd.ContrastiveDistiller(
            s,
            t,
            embedding=("embedding", "embedding"),
            num_samples=256,
            negatives=32,
            embedding_dim=16,
        ),
        ["contrastive"],
        3,
    ),
    "reused": (
        lambda s, t: kd.ReusedTeacherClassifier(s, t, features=("relu3", "relu3")),
        ["projection"],
        3,
    ),
    "inherit_explore": (
        lambda s, t: kd.InheritExplore(s, t, features=("relu3", "relu3")),
        ["inherit", "explore"],
        3,
    ),
}

# Those with `fit_hints`: how they are made, their hints, the width of their student.
STAGED = {
    "hint": (
        lambda s, t, **kw: kd.HintDistiller(s, t, hints={"relu2": "relu2"}, **kw),
        ["relu2"],
        3,
    ),
    "boundary": (
        lambda s, t, **kw: kd.ActivationBoundaryDistiller(
            s, t, {"norm1": "norm1", "norm2": "norm2"}, **kw
        ),
        ["norm1", "norm2"],
        3,
    ),
    "fsp": (
        lambda s, t, **kw: kd.FlowDistiller(
            s, t, {"relu1": "relu1", "relu2": "relu2"}, **kw
        ),
        ["relu1-relu2"],
        6,
    ),
}


def make(kind: str, teacher: keras.Model):
    """A distiller with a new student, not compiled."""
    build, _, width = KINDS[kind]
    return build(net(width), teacher)


def inputs_of(kind: str, x: np.ndarray):
    """`x` as this distiller wants it."""
    if kind == "contrastive":
        return {"image": x, "kd_index": np.arange(len(x), dtype="int32")}
    return x


def own_config(distiller) -> dict:
    """Its configuration without that of the models in it."""
    config = distiller.get_config()
    parts = ("student", "classifier", "paraphraser")
    return {key: value for key, value in config.items() if key not in parts}


def terms(distiller, batch) -> dict[str, float]:
    """The value of each term on a batch."""
    return {row.term: row.value for row in kd.explain(distiller, batch, verbose=False)}
