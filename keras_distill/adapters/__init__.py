"""Adapters: trainable layers between a student's features and a teacher's."""

from keras_distill.adapters.factor import Paraphraser, Translator
from keras_distill.adapters.fusion import Fusion
from keras_distill.adapters.margins import margins
from keras_distill.adapters.masked import MaskedGeneration
from keras_distill.adapters.regression import Connector, Projector, Regressor
from keras_distill.adapters.variational import VariationalHead

__all__ = [
    "Connector",
    "Fusion",
    "MaskedGeneration",
    "Paraphraser",
    "Projector",
    "Regressor",
    "Translator",
    "VariationalHead",
    "margins",
]
