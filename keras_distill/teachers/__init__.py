"""Teachers: models, ensembles and whatever else knows something."""

from keras_distill.teachers.base import Teacher
from keras_distill.teachers.bias import correct_bias
from keras_distill.teachers.cache import Cache
from keras_distill.teachers.ensemble import Ensemble
from keras_distill.teachers.model import Model
from keras_distill.teachers.selection import select_transfer_set
from keras_distill.teachers.specialists import Specialists
from keras_distill.teachers.specializing import train_specialists
from keras_distill.teachers.temperature import suggest_temperature
from keras_distill.teachers.transfer import Selection

__all__ = [
    "Cache",
    "Ensemble",
    "Model",
    "Selection",
    "Specialists",
    "Teacher",
    "correct_bias",
    "select_transfer_set",
    "suggest_temperature",
    "train_specialists",
]
