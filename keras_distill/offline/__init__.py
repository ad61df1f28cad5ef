"""Distillers with a teacher: the papers' methods as thin presets of `Distiller`."""

from keras_distill.offline.attention import AttentionDistiller
from keras_distill.offline.boundary import ActivationBoundaryDistiller
from keras_distill.offline.contrastive import ContrastiveDistiller
from keras_distill.offline.flow import FlowDistiller
from keras_distill.offline.hint import HintDistiller
from keras_distill.offline.inherit_explore import InheritExplore
from keras_distill.offline.relational import RelationalDistiller
from keras_distill.offline.reused import ReusedTeacherClassifier

__all__ = [
    "ActivationBoundaryDistiller",
    "AttentionDistiller",
    "ContrastiveDistiller",
    "FlowDistiller",
    "HintDistiller",
    "InheritExplore",
    "RelationalDistiller",
    "ReusedTeacherClassifier",
]
