"""On-the-fly native ensemble: branches of one network that their mixture teaches."""

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
from keras_distill.online.gated import GatedEnsemble, symbolic_inputs
from keras_distill.taps import call_model
from keras_distill.terms import Counted
from keras_distill.weighting import for_masked, note_losses

NEVER = -1.0  # the accuracy of a branch that was not validated yet


@keras.saving.register_keras_serializable(package=PACKAGE)
class OneEnsemble(BaseDistiller):
    r"""ONE: a network with several branches that learns from its own ensemble.

    The branches share a stem. A gate weighs their logits, `z_e = Σ_i g_i z_i`, and
    this ensemble teaches every branch while all are trained together:

    $$w_b \sum_i \mathrm{CE}(z_i) + w_e \mathrm{CE}(z_e)
    + w_s\, r(e) \sum_i T^2\, \mathrm{KL}(\sigma(z_e / T) \,\|\, \sigma(z_i / T))$$

    CE is the compiled loss. The teacher of the KL is constant: gate and ensemble learn
    from `CE(z_e)`, which also reaches the branches. With a ramp-up of R epochs
    `r(e) = exp(-5 (1 - min(e, R) / R)²)` in epoch e, counted from 0; else 1. The
    official code adds 1e-7 to the teacher's probabilities, the KL here is exact.

    Calling it, `predict` and `evaluate` give the ensemble; the compiled metrics are the
    ensemble's. Logs, also of the validation: `branch_<i>_loss`,
    `branch_<i>_accuracy`, `ensemble_loss`, `ensemble_accuracy`, `gate_<i>` (the mean
    weight of a branch), `soft_loss` (not part of the validation's `loss`).

    Args:
        stem: The shared part: a built model with one output, whose branches begin at
            that output.
        branches: Models from the stem's output to class scores, trained as they are.
        gate: Any layer from the stem's output to weights `(batch, branches)`. None for
            global average pooling, `Dense(branches)`, synchronized
            BatchNormalization, ReLU and softmax.
        temperature: T, above 0.
        branch_weight: Weight of the branches' losses, each.
        ensemble_weight: Weight of the ensemble's loss.
        soft_weight: Weight of the divergence.
        ramp_up: R, 0 for none. The official code takes 80 of 300 epochs.
        name: Name of the model.

    Raises:
        TypeError: If a part is not a Keras model.
        ValueError: If there is no branch, shapes do not fit, or a number is out of
            its range.

    Example:

    ```python
    ensemble = kd.OneEnsemble.from_model(model, "stage2", num_branches=3)
    ensemble.compile("adam", "sparse_categorical_crossentropy")
    ensemble.fit(x, y, validation_data=(x_val, y_val), epochs=30)
    ensemble.deploy("best").save("model.keras")
    ```

    References:
        Lan, Zhu, Gong, Knowledge Distillation by On-the-Fly Native Ensemble,
        NeurIPS 2018 (arXiv 1806.04606).
    """

    def __init__(
        self,
        stem: keras.Model,
        branches: Sequence[keras.Model],
        *,
        gate: keras.Layer | None = None,
        temperature: float = 3.0,
        branch_weight: float = 1.0,
        ensemble_weight: float = 1.0,
        soft_weight: float = 1.0,
        ramp_up: int = 0,
        name: str | None = None,
    ) -> None:
        check_positive("temperature", temperature)
        for argument, value in (
            ("branch_weight", branch_weight),
            ("ensemble_weight", ensemble_weight),
            ("soft_weight", soft_weight),
            ("ramp_up", ramp_up),
        ):
            check_weight(argument, value)
        super().__init__(GatedEnsemble(stem, branches, gate), alpha=None, name=name)
        self.ramp_up = ramp_up
        self._temperature = self._scalar("temperature", number(temperature))
        self._divergence = SoftTarget(self._temperature)
        self.add_term("branch", branch_weight)
        self.add_term("ensemble", ensemble_weight)
        self.add_term("soft", soft_weight)
        self.add_log("ensemble_accuracy")
        for index in range(len(self.branches)):
            self.add_log(f"branch_{index}_loss")
            self.add_log(f"branch_{index}_accuracy")
            self.add_log(f"gate_{index}")
        self._validated = self.add_weight(
            name="validated",
            shape=(len(self.branches),),
            dtype="float32",
            initializer=keras.initializers.Constant(NEVER),
            trainable=False,
            autocast=False,
        )
        self._origin: Origin | None = None

    @classmethod
    def from_model(
        cls,
        model: keras.Model,
        split_at: Any,
        num_branches: int = 3,
        init: str = "fresh",
        **kwargs: Any,
    ) -> OneEnsemble:
        """Gives a model branches: everything behind a layer, several times.

        Args:
            model: A functional or sequential model with one output. It is not changed;
                the stem starts with its weights. Nested models are taken apart.
            split_at: The layer whose output the branches share: its name, or its path
                into nested models.
            num_branches: Number of branches, at least 1.
            init: `"fresh"`: every branch gets new weights, from seeds of its own where
                the model's initializers have fixed ones. `"copy"`: every branch gets
                the model's weights.
            **kwargs: `gate`, `temperature`, `branch_weight`, `ensemble_weight`,
                `soft_weight`, `ramp_up`, `name`.

        Raises:
            TypeError: If `model` is subclassed, so that its graph is not known.
            ValueError: If there is no such layer, tensors bypass the cut, or a layer is
                used on both sides of it.
        """
        if num_branches != int(num_branches) or num_branches < 1:
            raise ValueError(
                f"`num_branches` must be an integer from 1. Received: {num_branches!r}"
            )
        if init not in ("fresh", "copy"):
            raise ValueError(f"`init` must be 'fresh' or 'copy'. Received: {init!r}")
        graph = Graph(model)
        first, rest = graph.split([graph.tensor_of(split_at, "split_at")], "split_at")
        stem, stem_names = first.build("stem")
        built = [
            rest.build(f"branch_{index}", reseed=index)
            for index in range(int(num_branches))
        ]
        origin = Origin.of(model, [stem_names, built[0][1]])
        origin.scatter(model, stem, 0)
        if init == "copy":
            for branch, _ in built:
                origin.scatter(model, branch, 1)
        ensemble = cls(stem, [branch for branch, _ in built], **kwargs)
        ensemble._origin = origin
        return ensemble

    # -- the terms ------------------------------------------------------------------

    def compute_terms(
        self, x: Any, y: Any, sample_weight: Any, training: bool
    ) -> tuple[Any, dict[str, Any]]:
        network = self.student
        outputs, gates = network.parts(x, training)
        note_losses(network)
        ensemble = network.mix(outputs, gates)
        logits = [network.logits(output) for output in outputs]
        teacher = network.logits(ensemble)
        terms: dict[str, Any] = {}
        losses = [
            self.label_loss(y, output, sample_weight, f"branch_{index}_loss")
            for index, output in enumerate(outputs)
        ]
        own = self.label_loss(y, ensemble, sample_weight)
        if own is not None:
            found = [loss for loss in losses if loss is not None]
            total = ops.sum(ops.stack([loss.value for loss in found]))
            terms = {"branch": Counted(total, own.rows), "ensemble": own}
        for index, branch in enumerate(logits):
            self.log_accuracy(f"branch_{index}_accuracy", y, branch)
            self.log_metric(f"gate_{index}", gates[:, index])
        self.log_accuracy("ensemble_accuracy", y, teacher)
        soft = self._soft(ops.stop_gradient(teacher), logits, sample_weight)
        if training:
            terms["soft"] = soft
        else:
            self.log_term("soft_loss", soft)
        return ensemble, terms

    def _soft(self, teacher: Any, logits: list[Any], sample_weight: Any) -> Any:
        values = []
        for branch in logits:
            weight = for_masked(sample_weight, getattr(branch, "_keras_mask", None))
            values.append(self._divergence(teacher, branch, weight))
        return ops.sum(ops.stack(values))

    def term_weight(self, term: str) -> Any:
        weight = super().term_weight(term)
        return weight * ramp(self._epoch, self.ramp_up) if term == "soft" else weight

    def epoch_ended(self, logs: dict[str, Any]) -> None:
        names = [f"val_branch_{index}_accuracy" for index in range(len(self.branches))]
        if all(name in logs for name in names):
            self._validated.assign([float(logs[name]) for name in names])

    # -- properties -----------------------------------------------------------------

    @property
    def stem(self) -> keras.Model:
        """The shared part."""
        return self.student.stem

    @property
    def branches(self) -> list[keras.Model]:
        """The branches."""
        return list(self.student.branches)

    @property
    def gate(self) -> keras.Layer:
        """The layer that weighs the branches."""
        return self.student.gate

    def gate_weights(self, x: Any) -> Any:
        """How the gate weighs the branches for each row: `(B, branches)`."""
        network = self.student
        shared = call_model(network.stem, x, False)
        return call_model(network.gate, shared, False)

    # -- what is deployed -----------------------------------------------------------

    def deploy(self, which: int | str) -> keras.Model:
        """A plain Keras model, a copy that needs this package nowhere.

        Args:
            which: The index of a branch, from 0: the model that `from_model` was given
                (its configuration, layers and size), with the weights of stem and
                branch. `"best"`: the branch whose last `val_branch_<i>_accuracy` in
                `fit` was the highest. `"ensemble"`: all branches and the gate.

        Raises:
            ValueError: If there is no such branch, or `"best"` is asked for before any
                validation.
        """
        if which == "ensemble":
            return self.student.plain()
        if which == "best":
            which = self._best()
        last = len(self.branches) - 1
        if not isinstance(which, (int, np.integer)) or not 0 <= which <= last:
            raise ValueError(
                "`which` must be 'best', 'ensemble' or the index of a branch, 0 to "
                f"{last}. Received: {which!r}"
            )
        branch = self.branches[which]
        if self._origin is not None:
            return self._origin.assemble([self.stem, branch])
        inputs = symbolic_inputs(self.stem)
        shared = clone(self.stem, "stem")(inputs)
        return keras.Model(inputs, clone(branch, "branch")(shared), name=branch.name)

    def _best(self) -> int:
        accuracies = ops.convert_to_numpy(self._validated)
        if accuracies[0] == NEVER:
            raise ValueError(
                "`deploy('best')` needs accuracies of a validation: give `fit` "
                "`validation_data=`, or choose a branch by its index."
            )
        return int(accuracies.argmax())

    # -- saving ---------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        origin = self._origin
        return {
            "stem": serialize(self.stem),
            "branches": [serialize(branch) for branch in self.branches],
            "gate": serialize(self.gate),
            "temperature": number(self.temperature),
            "branch_weight": number(self.term_weights["branch"]),
            "ensemble_weight": number(self.term_weights["ensemble"]),
            "soft_weight": number(self.term_weights["soft"]),
            "ramp_up": self.ramp_up,
            "name": self.name,
            "origin": None if origin is None else origin.to_json(),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> OneEnsemble:
        config = dict(config)
        origin = config.pop("origin")
        ensemble = cls(**keras.saving.deserialize_keras_object(config, custom_objects))
        ensemble._origin = None if origin is None else Origin.from_json(origin)
        return ensemble


def ramp(epoch: Any, length: float) -> Any:
    """The ramp-up `exp(-5 (1 - min(e, R) / R)²)`, 1 for R of 0."""
    if not length:
        return 1.0
    rest = 1.0 - ops.minimum(ops.cast(epoch, "float32") / length, 1.0)
    return ops.exp(-5.0 * rest**2)
