"""Temperatures of losses: numbers, variables, and one that is learned."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_distill.losses.base import (
    PACKAGE,
    DistillationLoss,
    check_positive,
    check_weight,
    number,
)


@keras.saving.register_keras_serializable(package=PACKAGE)
class LearnedTemperature(keras.Layer):
    r"""A temperature that is learned against the student (curriculum temperature).

    One trainable number `v` stands for a temperature between two ends,

    $$T = \text{low} + (\text{high} - \text{low}) \cdot \sigma(v)$$

    It is updated by the student's optimizer, in the same step, but with the gradient
    reversed: `v` climbs where the student descends, towards temperatures at which the
    soft loss is larger. How much of the gradient it gets grows with the epoch `e`,
    counted from 0: it is multiplied by

    $$\lambda_e = \frac{\text{strength}}{2}
    \left(1 - \cos\left(\pi \min\left(\frac{e + 1}{R}, 1\right)\right)\right)$$

    with R = `ramp_up`, so that the tasks begin easy and get harder. Give it to a
    `kd.Distiller` as `temperature`, or to the loss that is its `soft_loss`. It is
    trained, saved and loaded with the distiller, as adapters are; the log `temperature`
    is its mean over the epoch's steps. This is the paper's one temperature for the
    whole data set, with the range and the start of the released code; the paper's other
    kind, a temperature for every sample, is not here.

    Weight decay of the optimizer pulls `v` to 0, the middle of the range.

    Args:
        low: The lower end, above 0. It is never reached.
        high: The upper end, above `low`.
        initial: T at the start, between both; None for `v = 1`, as in the released
            code: 15.6 in the range from 1 to 21.
        strength: The highest λ, above 0.
        ramp_up: R, in epochs; 0 for the full strength at once.
        name: Name of the layer.

    Raises:
        ValueError: If a number is out of its range; if something other than the soft
            loss of a `kd.Distiller` is to use it, or it is to be set or scheduled.

    Example:

    ```python
    temperature = kd.LearnedTemperature(initial=4.0, ramp_up=5)
    distiller = kd.Distiller(student, teacher, temperature=temperature)
    ```

    References:
        Li et al., Curriculum Temperature for Knowledge Distillation, AAAI 2023
        (arXiv 2211.16231).
    """

    def __init__(
        self,
        low: float = 1.0,
        high: float = 21.0,
        *,
        initial: float | None = None,
        strength: float = 1.0,
        ramp_up: int = 10,
        name: str | None = None,
    ) -> None:
        for argument, value in (("low", low), ("high", high), ("strength", strength)):
            check_positive(argument, value)
        check_weight("ramp_up", ramp_up)
        if low >= high:
            raise ValueError(f"`high` must be above `low`. Received: {low} and {high}")
        if initial is not None and not low < initial < high:
            raise ValueError(
                f"`initial` must be between {low} and {high}. Received: {initial}"
            )
        super().__init__(name=name, dtype="float32")
        self.low = low
        self.high = high
        self.initial = initial
        self.strength = strength
        self.ramp_up = ramp_up

    def build(self, input_shape: Any = None) -> None:
        start = 1.0
        if self.initial is not None:
            start = math.log((self.initial - self.low) / (self.high - self.initial))
        self.position = self._scalar("position", start, trainable=True)
        self.reversal = self._scalar("reversal", self.strength_in(0), trainable=False)
        self.built = True

    def _scalar(self, name: str, value: float, trainable: bool) -> Any:
        return self.add_weight(
            name=name,
            shape=(),
            dtype="float32",
            initializer=keras.initializers.Constant(value),
            trainable=trainable,
            autocast=False,
        )

    def strength_in(self, epoch: int) -> float:
        """λ in an epoch, counted from 0."""
        part = min((epoch + 1) / self.ramp_up, 1.0) if self.ramp_up else 1.0
        return self.strength * (1.0 - math.cos(math.pi * part)) / 2.0

    def epoch_began(self, epoch: int) -> None:
        """Sets the strength of an epoch, counted from 0."""
        self.reversal.assign(self.strength_in(epoch))

    @property
    def value(self) -> Any:
        """T as a tensor, behind which the gradient is reversed."""
        self._check_built()
        position = ops.convert_to_tensor(self.position)
        still = ops.stop_gradient(position)
        # The difference is exactly 0; its slope is what is wanted.
        turned = still - ops.convert_to_tensor(self.reversal) * (position - still)
        return self.low + (self.high - self.low) * ops.sigmoid(turned)

    @property
    def reach(self) -> tuple[float, float, float]:
        """The lowest temperature, the present one and the highest."""
        return self.low, number(self), self.high

    def numpy(self) -> float:
        """T as a number, as a variable gives its own."""
        self._check_built()
        part = (1.0 + math.tanh(number(self.position) / 2.0)) / 2.0
        return self.low + (self.high - self.low) * part

    def assign(self, value: Any) -> None:
        """A learned temperature takes no value.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "The temperature is learned: it can be neither set nor scheduled. Give the "
            f"distiller a number as `temperature` for that. Received: {value}"
        )

    def _check_built(self) -> None:
        if not self.built:
            raise ValueError(
                "A LearnedTemperature is trained by kd.Distiller(temperature=...), or "
                "as the temperature of its `soft_loss`; elsewhere a temperature must "
                "be a number."
            )

    def get_config(self) -> dict[str, Any]:
        return {
            "low": self.low,
            "high": self.high,
            "initial": self.initial,
            "strength": self.strength,
            "ramp_up": self.ramp_up,
            "name": self.name,
        }

    def __repr__(self) -> str:
        return (
            f"LearnedTemperature({self.low}, {self.high}, initial={self.initial}, "
            f"strength={self.strength}, ramp_up={self.ramp_up})"
        )


class TemperedLoss(DistillationLoss):
    """Base class of losses with one temperature, which a distiller makes its own.

    Args:
        temperature: T, above 0: a number, a variable, or a `LearnedTemperature`.
        **kwargs: As in `DistillationLoss`.
    """

    def __init__(self, temperature: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(temperature, LearnedTemperature):
            check_positive("temperature", temperature)
        self.temperature = temperature

    def current_temperature(self) -> Any:
        """T as a tensor in the dtype of the loss."""
        learned = isinstance(self.temperature, LearnedTemperature)
        value = self.temperature.value if learned else self.temperature
        return ops.cast(value, self.dtype)

    def get_config(self) -> dict[str, Any]:
        temperature = self.temperature
        if isinstance(temperature, LearnedTemperature):
            temperature = keras.saving.serialize_keras_object(temperature)
        else:
            temperature = number(temperature)
        return {**super().get_config(), "temperature": temperature}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TemperedLoss:
        return cls(**keras.saving.deserialize_keras_object(config))
