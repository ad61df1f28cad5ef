"""MutualLearning: networks that teach each other while they train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_distill.averaging import AveragedModels
from keras_distill.base import BaseDistiller
from keras_distill.compiling import computes_in_float16
from keras_distill.distribute.updates import sum_gradients
from keras_distill.losses.base import PACKAGE, check_positive, number
from keras_distill.losses.response import SoftTarget
from keras_distill.online.optimizers import PeerOptimizers, one_for_each
from keras_distill.steps_tensorflow.discarding import restore
from keras_distill.steps_tensorflow.gradients import values_of
from keras_distill.taps import call_model
from keras_distill.weighting import for_masked, note_losses, this_share


@keras.saving.register_keras_serializable(package=PACKAGE)
class MutualLearning(BaseDistiller):
    r"""Two or more networks learn from the labels and from each other.

    Network i of n minimises, with its own optimizer and with its peers constant,

    $$\text{compiled loss}(y, z_i) + \frac{1}{n - 1} \sum_{j \ne i}
    T^2\, KL(\text{softmax}(z_j / T) \,|\, \text{softmax}(z_i / T))
    + \text{its regularisation losses}$$

    With `updates="in_turn"` (the paper's) the networks are updated one after the other
    on the same batch, each against what its peers say after their updates. A peer that
    was updated already runs a second time, in training mode, without touching its
    statistics or its random state. With `"together"` all are updated from one forward
    pass each, which costs less. The paper's formula is followed; the official code sums
    over the peers instead of taking the mean (the same for two networks), adds 1e-8
    inside the logarithms, and gives each network a batch of its own.

    The networks are trained in place. As a model this is the mean of their
    probabilities: `predict` gives log-probabilities for networks with logits, and the
    compiled metrics and `hard_loss` are about it. `net_<i>_loss` and
    `net_<i>_accuracy` are the networks' own.

    Args:
        networks: Two or more built Keras models with the same classes and one output
            each; they may differ otherwise.
        temperature: T of the divergence, above 0.
        updates: `"in_turn"` or `"together"`.
        unlabelled: The integer label that means "no label"; None switches it off.
            Rows without one count in the divergence.
        name: Name of the model.

    Raises:
        TypeError: If a network is not a Keras model.
        ValueError: If there are fewer than two networks, two of them share variables,
            their classes differ, or an argument is out of range.

    Example:

    ```python
    mutual = kd.MutualLearning([net_0, net_1])
    mutual.compile(
        optimizer=[keras.optimizers.Adam(1e-3), keras.optimizers.SGD(0.1)],
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ).fit(x, y, epochs=2)
    mutual.networks[0].save("net_0.keras")
    ```

    References:
        Zhang, Xiang, Hospedales, Lu, Deep Mutual Learning, CVPR 2018
        (arXiv 1706.00384).
    """

    def __init__(
        self,
        networks: Sequence[keras.Model],
        *,
        temperature: float = 1.0,
        updates: str = "in_turn",
        unlabelled: int | None = -1,
        name: str | None = None,
    ) -> None:
        check_positive("temperature", temperature)
        if updates not in ("in_turn", "together"):
            raise ValueError(
                f"`updates` must be 'in_turn' or 'together'. Received: {updates!r}"
            )
        average = _average(networks)
        super().__init__(average, alpha=None, unlabelled=unlabelled, name=name)
        self.updates = updates
        self._temperature = self._scalar("temperature", number(temperature))
        self._divergence = SoftTarget(self._temperature)
        for index in range(len(networks)):
            self.add_term(f"net_{index}")
            self.add_log(f"net_{index}_accuracy")

    # -- the terms ------------------------------------------------------------------

    def compute_terms(
        self, x: Any, y: Any, sample_weight: Any, training: bool
    ) -> tuple[Any, dict[str, Any]]:
        outputs = [call_model(network, x, training) for network in self.networks]
        logits = self._logits(outputs)
        terms = {
            f"net_{i}": self._term(i, logits, outputs[i], y, sample_weight)
            for i in range(len(outputs))
        }
        return self.student.combine(outputs), terms

    def _logits(self, outputs: Sequence[Any]) -> list[Any]:
        logits = [own for (own,) in self.student.logits(outputs)]
        if self._options["check_finite"]:
            self._assert_finite(logits)
        return logits

    def _term(
        self, index: int, logits: list[Any], output: Any, y: Any, weight: Any
    ) -> Any:
        """What network `index` minimises, apart from its regularisation."""
        own = logits[index]
        self.log_accuracy(f"net_{index}_accuracy", y, own)
        masked = for_masked(weight, getattr(own, "_keras_mask", None))
        divergences = [
            self._divergence(ops.stop_gradient(peer), own, masked)
            for peer in logits[:index] + logits[index + 1 :]
        ]
        term = sum(divergences) / len(divergences)
        labelled = self.label_loss(y, output, weight)
        return term if labelled is None else term + labelled.value

    # -- the step -------------------------------------------------------------------

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight, share = self._unpack(data)
        with this_share(share):
            saved = self._snapshot(share)
            labels, weights = self._read(y, sample_weight, training=True)
            scaled = self._scaled(weights)
            weight = self._one_weight(scaled)
            tapes, heard, extras = [], [], []  # heard: what peers hear from each
            for network in self.networks:
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(values_of(network.trainable_variables))
                    heard.append(call_model(network, x, True))
                    note_losses(network)  # at once, and for this network alone
                    extras.append(self.regularization())
                tapes.append(tape)
            self.hard_loss(labels, self.student.combine(heard), scaled, weights)
            gradients: list[list[Any]] = []
            losses = []
            for turn in self._turns():
                found = []
                for i in turn:
                    with tapes[i]:
                        term = self._term(i, self._logits(heard), heard[i], y, weight)
                        loss = self._weighted(f"net_{i}", term)
                        loss = loss if extras[i] is None else loss + extras[i]
                        to_minimise = self.optimizers[i].scale_loss(loss)
                    losses.append(loss)
                    variables = values_of(self.networks[i].trainable_variables)
                    found.append(tapes[i].gradient(to_minimise, variables))
                gradients += _summed(found)
                last = len(gradients) == len(self.networks)
                verdict = self._verdict(gradients, share, log=last)
                for i in turn:
                    own = self.networks[i].trainable_variables
                    self._apply([gradients[i]], own, verdict, self.optimizers[i])
                    if not last:
                        heard[i] = _once_more(self.networks[i], x)
            self._log_total(losses)
            restore(saved, verdict, self._statistics())
            self._logs.update("steps", 1.0, 1.0)
            return self._step_results(share)

    def _turns(self) -> list[list[int]]:
        """Which networks are updated from the same knowledge, one list per turn."""
        indices = range(len(self.networks))
        if self.updates == "together":
            return [list(indices)]
        return [[index] for index in indices]

    # -- compile, properties, saving ------------------------------------------------

    def compile(
        self,
        optimizer: Any = "rmsprop",
        *args: Any,
        **kwargs: Any,
    ) -> MutualLearning:
        """Prepares training, as `kd.BaseDistiller.compile`.

        Args:
            optimizer: One optimizer, which is cloned for each network, or a list with
                one per network.
            *args: As there.
            **kwargs: As there. `auto_scale_loss` scales the loss of each network that
                computes in float16. `check_finite` looks at the networks' logits.
                `skip_nonfinite` skips the networks from the one with NaN or infinity
                on.

        Raises:
            ValueError: If there is not one optimizer per network, two networks share
                one, or an option has no effect here.
        """
        for option in ("gradient_policy", "log_gradient_share", "across_replicas"):
            if kwargs.get(option):
                raise ValueError(
                    f"`{option}` has no effect on MutualLearning. "
                    f"Received: {kwargs[option]!r}"
                )
        optimizers = one_for_each(optimizer, len(self.networks))
        if kwargs.get("auto_scale_loss", True):
            pairs = zip(optimizers, self.networks, strict=True)
            optimizers = [_scaling(one, network) for one, network in pairs]
        group = PeerOptimizers(optimizers)
        group.build_each([network.trainable_variables for network in self.networks])
        super().compile(group, *args, **kwargs | {"auto_scale_loss": False})
        return self

    @property
    def networks(self) -> list[keras.Model]:
        """The networks, in the order given."""
        return list(self.student.models)

    @property
    def optimizers(self) -> list[Any]:
        """The networks' optimizers, in the same order."""
        return list(self.optimizer.members)

    def get_config(self) -> dict[str, Any]:
        networks = [keras.saving.serialize_keras_object(n) for n in self.networks]
        return {
            "networks": networks,
            "temperature": number(self._temperature),
            "updates": self.updates,
            "unlabelled": self.unlabelled,
            "name": self.name,
        }


def _average(networks: Sequence[keras.Model]) -> AveragedModels:
    if not isinstance(networks, (list, tuple)) or len(networks) < 2:
        raise ValueError(
            f"`networks` must be a list of two or more models. Received: {networks!r}"
        )
    average = AveragedModels(networks)
    if len(average.output_names) != 1:
        raise ValueError(
            "MutualLearning needs networks with one output. The first has "
            f"{average.output_names}."
        )
    owners: dict[int, int] = {}
    for index, network in enumerate(networks):
        for variable in network.variables:
            if owners.setdefault(id(variable), index) != index:
                raise ValueError(
                    f"`networks`: {owners[id(variable)]} and {index} are the same "
                    f"network or share the variable {variable.path!r}. Each needs its "
                    "own weights."
                )
    return average


def _scaling(optimizer: Any, network: keras.Model) -> Any:
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if scaled or not computes_in_float16(network):
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer)


def _summed(gradients: list[list[Any]]) -> list[list[Any]]:
    """All-reduces the gradients of several networks at once."""
    flat = iter(sum_gradients([g for own in gradients for g in own]))
    return [[next(flat) for _ in own] for own in gradients]


def _once_more(network: keras.Model, x: Any) -> Any:
    """Runs a network that its peers listen to: nothing of it changes."""
    states = network.non_trainable_variables
    before = [tf.identity(variable.value) for variable in states]
    outputs = call_model(network, x, True)
    for variable, value in zip(states, before, strict=True):
        variable.assign(value)
    return outputs
