"""Be your own teacher: a network with early exits that its last one teaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distill.base import BaseDistiller
from keras_distill.copies import Origin, clone
from keras_distill.graphs import Graph
from keras_distill.losses.base import PACKAGE, check_positive, check_weight, number
from keras_distill.losses.response import SoftTarget
from keras_distill.selfdistill.multi_exit import (
    ExitNetwork,
    Predictors,
    bottleneck,
    classifier,
)
from keras_distill.terms import Counted
from keras_distill.weighting import for_masked, note_losses


@keras.saving.register_keras_serializable(package=PACKAGE)
class BeYourOwnTeacher(BaseDistiller):
    r"""BYOT: the deepest exit of a network teaches the shallower ones.

    Every exit has a bottleneck (convolutions 1x1, k x k with stride k, 1x1, each with
    BatchNormalization and ReLU, down to the grid of the network's end; synchronized
    over replicas where the network's own BatchNormalization is) that makes features as
    wide as the network's own, `f_i`, and a classifier, `z_i`. With the network's own
    features and output `f_n`, `z_n`

    $$\mathrm{CE}(z_n) + \sum_{i<n} \left[ (1 - \alpha)\, \mathrm{CE}(z_i)
    + \alpha\, T^2\, \mathrm{KL}(\sigma(z_n / T) \,\|\, \sigma(z_i / T))
    + \lambda\, \lVert f_i - f_n \rVert^2 \right]$$

    as means over the rows. CE is the compiled loss; the deepest exit is constant where
    it teaches. The paper leaves the factor T² and the mean over rows open.

    Calling it and `evaluate` give the deepest exit, and so does `predict` unless it is
    asked for another. Logs, also of the validation: `exit_<i>_loss` (the compiled loss)
    and `exit_<i>_accuracy`, from shallow to deep, the network's own last. Terms with
    weights: `output`, `exits` (1 - alpha), `soft` (alpha) and `feature`.

    Most users call `from_model`. The constructor takes the parts themselves.

    Args:
        network: The parts, a `kd.selfdistill.multi_exit.ExitNetwork`.
        temperature: T, above 0.
        alpha: How much an exit listens to the deepest one instead of the labels, from
            0 to 1.
        feature_weight: λ, at least 0. The default is the number of the implementation
            that is best known, which sums over the batch as well: what that does with
            B rows is `1e-6 * B` here.
        name: Name of the model.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    ```python
    distiller = kd.BeYourOwnTeacher.from_model(model, exits=["stage1", "stage2"])
    distiller.compile("adam", "sparse_categorical_crossentropy")
    distiller.fit(x, y, epochs=30)
    distiller.predict(x, threshold=0.9)
    distiller.deploy(0).save("small.keras")
    ```

    References:
        Zhang, Song, Gao, Chen, Bao, Ma, Be Your Own Teacher, ICCV 2019
        (arXiv 1905.08094).
    """

    def __init__(
        self,
        network: ExitNetwork,
        *,
        temperature: float = 3.0,
        alpha: float = 0.1,
        feature_weight: float = 1e-6,
        name: str | None = None,
    ) -> None:
        check_positive("temperature", temperature)
        if not 0 <= number(alpha) <= 1:
            raise ValueError(f"`alpha` must be from 0 to 1. Received: {alpha!r}")
        check_weight("feature_weight", feature_weight)
        super().__init__(network, alpha=None, name=name)
        self._alpha = number(alpha)
        self._temperature = self._scalar("temperature", number(temperature))
        self._divergence = SoftTarget(self._temperature)
        self.add_term("output", 1.0)
        self.add_term("exits", 1.0 - number(alpha))
        self.add_term("soft", alpha)
        self.add_term("feature", feature_weight)
        for index in range(network.exits):
            self.add_log(f"exit_{index}_loss")
            self.add_log(f"exit_{index}_accuracy")
        self._origin: Origin | None = None
        self._predictors = Predictors(network)

    @classmethod
    def from_model(
        cls, model: keras.Model, exits: Sequence[Any], **kwargs: Any
    ) -> BeYourOwnTeacher:
        """Gives a model exits.

        Args:
            model: A functional or sequential classifier with one output. It is not
                changed; the network starts with its weights.
            exits: Layers behind which there is an exit, from shallow to deep: names, or
                paths into nested models. The network's own output is the last exit and
                is not named.
            **kwargs: `temperature`, `alpha`, `feature_weight`, `name`.

        Raises:
            TypeError: If `model` is subclassed, so that its graph is not known.
            ValueError: If there is no exit, they are out of order or at the output,
                there is no such layer, or tensors bypass it.
        """
        if isinstance(exits, str) or not list(exits):
            raise ValueError(
                "`exits` must be a list of at least one layer before the output. "
                f"Received: {exits!r}"
            )
        graph = Graph(model)
        cuts = [graph.tensor_of(layer, "exits") for layer in exits]
        feature = _last_features(graph)
        parts = graph.split([*cuts, feature], "exits")
        built = [part.build(f"part_{i}") for i, part in enumerate(parts)]
        origin = Origin.of(model, [names for _, names in built])
        for index, (part, _) in enumerate(built):
            origin.scatter(model, part, index)
        *trunk, top = [part for part, _ in built]
        grid = _last_grid(graph, feature)
        width = graph.shape(feature)[-1]
        if width is None:
            raise ValueError("`model`: the width of its last features is not known.")
        together = any(
            layer.synchronized
            for layer in model._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization)
        )
        heads = [
            (
                bottleneck(graph.shape(cut), grid, width, f"bottleneck_{i}", together),
                classifier(model, width, f"classifier_{i}"),
            )
            for i, cut in enumerate(cuts)
        ]
        network = ExitNetwork(
            trunk, [head for head, _ in heads], [head for _, head in heads] + [top]
        )
        distiller = cls(network, **kwargs)
        distiller._origin = origin
        return distiller

    # -- the terms ------------------------------------------------------------------

    def compute_terms(
        self, x: Any, y: Any, sample_weight: Any, training: bool
    ) -> tuple[Any, dict[str, Any]]:
        outputs, features = self.student.everything(x, training)
        note_losses(self.student)
        logits = [self.student.logits(output) for output in outputs]
        for index, exit_logits in enumerate(logits):
            self.log_accuracy(f"exit_{index}_accuracy", y, exit_logits)
        *shallow, deepest = [
            self.label_loss(y, output, sample_weight, f"exit_{index}_loss")
            for index, output in enumerate(outputs)
        ]
        terms: dict[str, Any] = {}
        if deepest is not None:
            found = [loss.value for loss in shallow if loss is not None]
            terms["output"] = deepest
            terms["exits"] = Counted(ops.sum(ops.stack(found)), deepest.rows)
        if training:
            terms["soft"] = self._soft(logits, sample_weight)
            terms["feature"] = self._feature(features, sample_weight)
        return outputs[-1], terms

    def _soft(self, logits: list[Any], sample_weight: Any) -> Any:
        *shallow, deepest = logits
        teacher = ops.stop_gradient(deepest)
        values = []
        for own in shallow:
            weight = for_masked(sample_weight, getattr(own, "_keras_mask", None))
            values.append(self._divergence(teacher, own, weight))
        return ops.sum(ops.stack(values))

    def _feature(self, features: list[Any], sample_weight: Any) -> Any:
        *shallow, deepest = [ops.cast(f, "float32") for f in features]
        teacher = ops.stop_gradient(deepest)
        squares = [ops.sum(ops.square(own - teacher), -1) for own in shallow]
        return self.mean(ops.sum(ops.stack(squares), 0), sample_weight)

    # -- prediction -----------------------------------------------------------------

    def predict(
        self,
        x: Any,
        *args: Any,
        exit: int | None = None,
        threshold: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Predicts, as `keras.Model.predict`, perhaps at an earlier exit.

        Args:
            x: As in Keras.
            *args: As in Keras.
            exit: The exit to read, from 0; by default the network's own output. What
                lies behind it is not computed.
            threshold: A probability: each row leaves at the first exit that gives a
                class at least this one, or at the last. Rows that left are not
                computed further.
            **kwargs: As in Keras; with `threshold` `batch_size` and `verbose`.

        Returns:
            The outputs, as `keras.Model.predict`.

        Raises:
            ValueError: If there is no such exit, both are given, or the threshold is
                not from 0 to 1.
        """
        if threshold is not None:
            if exit is not None:
                raise ValueError("Give `exit` or `threshold`, not both.")
            if not 0 <= threshold <= 1:
                raise ValueError(
                    f"`threshold` must be from 0 to 1. Received: {threshold!r}"
                )
            return self._predictors.leave_early(x, threshold, *args, **kwargs)
        if exit is None:
            return super().predict(x, *args, **kwargs)
        return self._predictors.until(self._check_exit(exit)).predict(
            x, *args, **kwargs
        )

    # -- what is deployed -----------------------------------------------------------

    def deploy(self, exit: int) -> keras.Model:
        """A plain Keras model, a copy that needs this package nowhere.

        Args:
            exit: The index of an exit, from 0. The last one is the model that
                `from_model` was given, with its configuration and layers.

        Raises:
            ValueError: If there is no such exit.
        """
        exit = self._check_exit(exit)
        network = self.student
        if self._origin is not None and exit == network.exits - 1:
            return self._origin.assemble([*network.trunk, network.classifiers[-1]])
        return clone(network.until(exit), f"exit_{exit}")

    def _check_exit(self, exit: Any) -> int:
        last = self.student.exits - 1
        if not isinstance(exit, (int, np.integer)) or not 0 <= exit <= last:
            raise ValueError(
                f"`exit` must be the index of an exit, 0 to {last}. Received: {exit!r}"
            )
        return int(exit)

    # -- saving ---------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        return {
            "network": keras.saving.serialize_keras_object(self.student),
            "temperature": number(self.temperature),
            "alpha": self._alpha,  # weights that were changed are in the file
            "feature_weight": number(self.term_weights["feature"]),
            "name": self.name,
            "origin": None if self._origin is None else self._origin.to_json(),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> BeYourOwnTeacher:
        config = dict(config)
        origin = config.pop("origin")
        distiller = cls(**keras.saving.deserialize_keras_object(config, custom_objects))
        distiller._origin = None if origin is None else Origin.from_json(origin)
        return distiller


def _last_features(graph: Graph) -> int:
    """The tensor that the last layer with weights turns into class scores."""
    tensor = graph.output
    step = graph.maker(tensor)
    while step is not None and not getattr(step.layer, "weights", None):
        if len(step.inputs) != 1:
            break
        step = graph.maker(step.inputs[0])
    if step is None or len(step.inputs) != 1:
        raise ValueError(
            f"`model`: {graph.model.name!r} does not end in a classifier, a layer with "
            "weights on one tensor of features."
        )
    tensor = step.inputs[0]
    step = graph.maker(tensor)
    while step is not None and isinstance(step.layer, keras.layers.Dropout):
        tensor = step.inputs[0]  # a teacher without noise
        step = graph.maker(tensor)
    return tensor


def _last_grid(graph: Graph, feature: int) -> tuple[int | None, ...]:
    """Shape of the last tensor on the way to the features that has a grid."""
    for index in sorted(graph.ancestors(feature), reverse=True):
        shape = graph.shape(graph.steps[index].outputs[0])
        if len(shape) > 2:
            return shape
    return graph.shape(feature)
