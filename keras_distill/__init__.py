"""keras_distill: knowledge distillation for Keras."""

import keras

from keras_distill import losses

__version__ = "0.1.0"
__all__ = ["losses"]

if keras.backend.backend() == "tensorflow":
    from keras_distill import adapters, teachers
    from keras_distill.base import BaseDistiller
    from keras_distill.distiller import Distiller
    from keras_distill.links import Link

    __all__ += ["BaseDistiller", "Distiller", "Link", "adapters", "teachers"]
else:

    def __getattr__(name: str):
        raise AttributeError(
            f"keras_distill.{name} needs the TensorFlow backend; the current one is "
            f"{keras.backend.backend()!r}. Only keras_distill.losses runs on all."
        )
