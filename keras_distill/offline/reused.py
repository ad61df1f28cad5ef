"""SimKD: the student uses the teacher's classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_distill.adapters import Projector
from keras_distill.copies import Origin, clone, copy_weights
from keras_distill.graphs import Graph, Part
from keras_distill.heads import output_names
from keras_distill.links import Link
from keras_distill.losses.base import PACKAGE
from keras_distill.losses.feature import Hint
from keras_distill.offline.preset import Preset, tap_shapes, two_layers
from keras_distill.specs import symbolic_run
from keras_distill.taps import call_model
from keras_distill.teachers.base import Teacher
from keras_distill.teachers.ensemble import as_teacher
from keras_distill.teachers.model import Model

PROJECTED = "/projected"  # no layer has such a path


@keras.saving.register_keras_serializable(package=PACKAGE)
class ReusedTeacherClassifier(Preset):
    """SimKD: the student learns the teacher's last features, and reuses its classifier.

    A projector (three convolutions) maps the student's last features to the teacher's;
    their mean squared difference is the only term (`projection`) that trains. Outputs,
    also of `evaluate` and `predict`, are those of a frozen copy of the teacher's
    classifier on the projected features. `deploy` puts the three together.

    Args:
        student: A built Keras model, whose layers behind the feature are not used.
        teacher: A built Keras model.
        features: (student layer, teacher layer), the last grids of both. The larger
            grid is pooled to the other one.
        alpha: Weight of the compiled loss of the outputs, 0 as in the paper.
        weight: Weight of the projection.
        classifier: What follows the teacher's layer; None cuts it out of a functional
            teacher.
        **options: Further arguments of `Distiller`, but not those of a soft term.

    Raises:
        TypeError: If the classifier cannot be cut out and is not given.
        ValueError: If `features` is not a pair, or its layers do not give grids.

    Example:

    ```python
    distiller = kd.ReusedTeacherClassifier(
        student, teacher, features=("features", "features")
    )
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    distiller.fit(x, y, epochs=2)
    distiller.deploy().save("student.keras")
    ```

    References:
        Chen et al., Knowledge Distillation with the Reused Teacher Classifier,
        CVPR 2022 (arXiv 2203.14001).
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: Any,
        *,
        features: Sequence[Any],
        alpha: float = 0.0,
        weight: float = 1.0,
        classifier: keras.Model | None = None,
        soft_loss: Any = None,
        **options: Any,
    ) -> None:
        if soft_loss is not None:
            raise ValueError(
                "`soft_loss` must be None: the outputs come from the teacher's own "
                f"classifier. Received: {soft_loss!r}"
            )
        own, other = two_layers("features", features)
        teacher = as_teacher(teacher)
        mine, known = tap_shapes(student, teacher, own, other, "features")
        grid = _smaller_grid(mine, known)
        link = Link(
            own,
            other,
            Hint(),
            weight=weight,
            adapter=Projector((*grid, known[-1])),
            teacher_adapter=_pooling(known, grid),
            name="projection",
        )
        super().__init__(
            student, teacher, own=[link], alpha=alpha, soft_loss=None, **options
        )
        self.projection_weight = weight
        self.projector = self.own_links[0].adapter
        shape = (None, *grid, known[-1])
        self.classifier = (
            _cut_classifier(teacher, other, shape)
            if classifier is None
            else clone(classifier)
        )
        self.classifier.trainable = False
        # Run on the projected grid, which a given classifier may not fit.
        self._symbolic_outputs = symbolic_run(
            lambda x: call_model(self.classifier, x, False), keras.KerasTensor(shape)
        )
        self._names = output_names(self.classifier, self._symbolic_outputs)

    @property
    def output_names(self) -> list[str]:
        return list(self._names)

    def run_student(self, x: Any, training: bool, taps: Any = None) -> Any:
        path = self.own_links[0].student_layer
        _, features = super().run_student(x, training, taps or [path])
        projected = call_model(self.projector, features[path], training)
        outputs = call_model(self.classifier, projected, training)
        return (outputs, features | {PROJECTED: projected}) if taps else outputs

    def _student_side(self, link: Link, features: dict[str, Any]) -> Any:
        if link.name == "projection":
            return features[PROJECTED]
        return super()._student_side(link, features)

    def deploy(self) -> keras.Model:
        """The trained whole as one plain model, a copy.

        Raises:
            TypeError: If the student is not functional or sequential.
        """
        path = self.own_links[0].student_layer
        graph = Graph(self.student, "student")
        end = graph.tensor_of(path, "features")
        steps = [graph.steps[i] for i in sorted(graph.ancestors(end))]
        body, names = Part(graph, steps, graph.inputs, end).build(self.student.name)
        Origin.of(self.student, [names]).scatter(self.student, body, 0)
        x = body.output
        pooling = _pooling(tuple(x.shape), self.projector.target_shape[:-1])
        x = x if pooling is None else pooling(x)
        for convolution, normalization in zip(
            self.projector.convolutions, self.projector.normalizations, strict=True
        ):
            for layer in (convolution, normalization):
                copy = clone(layer)
                x = copy(x)
                copy_weights(layer, copy)
            x = keras.layers.ReLU(dtype=convolution.dtype_policy)(x)
        return keras.Model(body.input, clone(self.classifier)(x), name="deployed")

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["soft_loss"]
        link = self.own_links[0]
        return config | {
            "features": [link.student_layer, link.teacher_layer],
            "weight": self.projection_weight,
            "classifier": keras.saving.serialize_keras_object(self.classifier),
        }


def _smaller_grid(one: tuple, other: tuple) -> tuple:
    if len(one) != 4 or len(other) != 4 or None in (*one[1:], *other[1:]):
        raise ValueError(
            "`features` must name layers that give grids (B, H, W, C) of known size. "
            f"Received: student {one}, teacher {other}"
        )
    return tuple(min(m, n) for m, n in zip(one[1:3], other[1:3], strict=True))


def _pooling(shape: tuple, grid: tuple) -> keras.Layer | None:
    """A plain layer that averages a grid to a smaller one; None if it is that."""
    if shape[1:3] == grid:
        return None
    if all(m % n == 0 for m, n in zip(shape[1:3], grid, strict=True)):
        window = tuple(m // n for m, n in zip(shape[1:3], grid, strict=True))
        return keras.layers.AveragePooling2D(window, data_format="channels_last")
    return keras.layers.AdaptiveAveragePooling2D(grid, data_format="channels_last")


def _cut_classifier(teacher: Teacher, layer: Any, shape: tuple) -> keras.Model:
    """A copy of what follows a layer of the teacher, on features of a shape."""
    if not isinstance(teacher, Model):
        raise TypeError(
            "The classifier can be cut out of a teacher that is one Keras model. Give "
            f"`classifier=`. Received: {teacher!r}"
        )
    graph = Graph(teacher.model, "teacher")
    cut = graph.tensor_of(layer, "features")
    part = graph.split([cut], "features")[1]
    model, names = part.build("classifier")
    Origin.of(teacher.model, [names]).scatter(teacher.model, model, 0)
    if tuple(model.input_shape) != shape:
        pooled = keras.Input(shape[1:])
        copy = keras.models.clone_model(model, input_tensors=pooled)
        copy.set_weights(model.get_weights())
        return copy
    return model
