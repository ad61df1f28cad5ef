"""Networks that teach themselves and each other while they are trained."""

from keras_distill.online.one import OneEnsemble

__all__ = ["OneEnsemble"]
