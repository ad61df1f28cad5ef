"""keras_distill: knowledge distillation for Keras."""

import importlib
from typing import Any

import keras

from keras_distill import losses

__version__ = "0.1.0"
__all__ = ["losses"]

if keras.backend.backend() == "tensorflow":
    from keras_distill import (
        adapters,
        callbacks,
        data,
        datasets,
        generations,
        monitoring,
        report,
        schedules,
        teachers,
    )
    from keras_distill.base import BaseDistiller
    from keras_distill.distiller import Distiller
    from keras_distill.explain import explain
    from keras_distill.links import Link
    from keras_distill.losses.tempered import LearnedTemperature
    from keras_distill.offline import (
        ActivationBoundaryDistiller,
        AttentionDistiller,
        ContrastiveDistiller,
        FlowDistiller,
        HintDistiller,
        InheritExplore,
        RelationalDistiller,
        ReusedTeacherClassifier,
    )
    from keras_distill.online.mutual import MutualLearning
    from keras_distill.online.one import OneEnsemble
    from keras_distill.policies import ClipToMain
    from keras_distill.selfdistill.exits import BeYourOwnTeacher
    from keras_distill.selfdistill.teacher_free import TeacherFree
    from keras_distill.suggest import suggest_links

    def __getattr__(name: str) -> Any:
        if name == "tuning":  # it imports keras-tuner
            return importlib.import_module("keras_distill.tuning")
        raise AttributeError(f"module 'keras_distill' has no attribute {name!r}")

    __all__ += ["BaseDistiller", "Distiller", "Link", "explain"]
    __all__ += ["ClipToMain", "LearnedTemperature", "suggest_links"]
    __all__ += [
        "ActivationBoundaryDistiller",
        "AttentionDistiller",
        "ContrastiveDistiller",
        "FlowDistiller",
        "HintDistiller",
        "InheritExplore",
        "RelationalDistiller",
        "ReusedTeacherClassifier",
    ]
    __all__ += ["BeYourOwnTeacher", "MutualLearning", "OneEnsemble", "TeacherFree"]
    __all__ += [
        "adapters",
        "callbacks",
        "data",
        "datasets",
        "generations",
        "monitoring",
        "report",
        "schedules",
        "teachers",
        "tuning",
    ]
else:

    def __getattr__(name: str) -> Any:
        raise AttributeError(
            f"keras_distill.{name} needs the TensorFlow backend; the current one is "
            f"{keras.backend.backend()!r}. Only keras_distill.losses runs on all."
        )
