"""Losses: what it means for a student's knowledge to agree with a teacher's."""

from keras_distill.losses.adapted import FactorTransfer, VariationalInformation
from keras_distill.losses.base import DistillationLoss
from keras_distill.losses.boundary import ActivationBoundary, MarginReLU
from keras_distill.losses.classes import DIST, MultiLevelLogit
from keras_distill.losses.feature import (
    AttentionTransfer,
    HierarchicalContext,
    Hint,
    NeuronSelectivity,
)
from keras_distill.losses.flow import FlowOfProcedure, SingularValue
from keras_distill.losses.regularization import ConfidencePenalty, VirtualTeacher
from keras_distill.losses.relation import (
    CorrelationCongruence,
    ProbabilisticTransfer,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
)
from keras_distill.losses.response import DecoupledKD, LogitMSE, SoftTarget

__all__ = [
    "ActivationBoundary",
    "AttentionTransfer",
    "ConfidencePenalty",
    "CorrelationCongruence",
    "DIST",
    "DecoupledKD",
    "DistillationLoss",
    "FactorTransfer",
    "FlowOfProcedure",
    "HierarchicalContext",
    "Hint",
    "LogitMSE",
    "MarginReLU",
    "MultiLevelLogit",
    "NeuronSelectivity",
    "ProbabilisticTransfer",
    "RelationalAngle",
    "RelationalDistance",
    "SimilarityPreserving",
    "SingularValue",
    "SoftTarget",
    "VariationalInformation",
    "VirtualTeacher",
]
