"""Tuning with keras-tuner: temperature, weights, losses and students.

```python
model = kd.tuning.DistillationHyperModel(
    build_student, teacher, optimizer="adam", loss=loss, metrics=["accuracy"]
)
tuner = keras_tuner.RandomSearch(model, "val_accuracy", max_trials=12)
tuner.search(x, y, validation_data=validation, epochs=5)
print(kd.tuning.results(tuner))
```

keras-tuner is imported when this module is used for the first time.
"""

from keras_distill.tuning.hypermodel import DistillationHyperModel
from keras_distill.tuning.objectives import objective
from keras_distill.tuning.results import best_distiller, plot, results
from keras_distill.tuning.spaces import Choice

__all__ = [
    "Choice",
    "DistillationHyperModel",
    "best_distiller",
    "objective",
    "plot",
    "results",
]
