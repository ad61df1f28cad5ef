"""Teachers: models, ensembles and whatever else knows something."""

from keras_distill.teachers.base import Model, Teacher
from keras_distill.teachers.cache import Cache
from keras_distill.teachers.ensemble import Ensemble

__all__ = ["Cache", "Ensemble", "Model", "Teacher"]
