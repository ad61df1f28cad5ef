"""Chains of models in which each is taught by the one before it."""

from keras_distill.generations.chain import Generations, Table
from keras_distill.generations.methods import (
    METHODS,
    born_again,
    label_refinery,
    noisy_student,
    teacher_assistant,
)
from keras_distill.generations.objectives import ConfidenceWeighted, PermutedTarget

__all__ = [
    "METHODS",
    "ConfidenceWeighted",
    "Generations",
    "PermutedTarget",
    "Table",
    "born_again",
    "label_refinery",
    "noisy_student",
    "teacher_assistant",
]
