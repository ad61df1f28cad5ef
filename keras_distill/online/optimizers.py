"""One optimizer per network, behind what Keras takes for one optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_distill.losses.base import PACKAGE


@keras.saving.register_keras_serializable(package=PACKAGE)
class PeerOptimizers(keras.optimizers.Optimizer):
    """The optimizers of networks that train side by side.

    To Keras and its callbacks this is one optimizer: `learning_rate` reads the first's
    and sets every one's, `variables` are those of all. Each network is updated by its
    own: `members[i].apply(...)`.

    Args:
        optimizers: One optimizer per network.
        name: Name of the whole.
    """

    def __init__(self, optimizers: Sequence[Any], name: str | None = None) -> None:
        super().__init__(learning_rate=0.0, name=name)
        self.members = tuple(optimizers)
        steps = [o.gradient_accumulation_steps for o in optimizers]
        self.gradient_accumulation_steps = next(filter(None, steps), None)

    def build_each(self, variables: Sequence[list[Any]]) -> None:
        """Builds each member for its network's variables."""
        for member, own in zip(self.members, variables, strict=True):
            if not member.built:
                member.build(own)
        self.built = True

    @property
    def variables(self) -> list[Any]:
        return [v for member in self.members for v in member.variables]

    @property
    def iterations(self) -> Any:
        return self.members[0].iterations

    @property
    def learning_rate(self) -> Any:
        return self.members[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        for member in self.members:
            member.learning_rate = value

    def finalize_variable_values(self, var_list: Any) -> None:
        for member in self.members:
            member.finalize_variable_values(member._trainable_variables)

    def save_own_variables(self, store: Any) -> None:
        """Nothing: Keras finds and saves the members by themselves."""

    def load_own_variables(self, store: Any) -> None:
        """Nothing: see `save_own_variables`."""

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {"optimizers": [serialize(m) for m in self.members], "name": self.name}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> PeerOptimizers:
        optimizers = [
            keras.saving.deserialize_keras_object(item, custom_objects=custom_objects)
            for item in config["optimizers"]
        ]
        return cls(optimizers, name=config["name"])


def one_for_each(optimizer: Any, count: int) -> list[Any]:
    """One optimizer per network: clones of one, or the items of a list.

    Raises:
        ValueError: If a list does not have one optimizer per network, or has one twice.
    """
    if isinstance(optimizer, PeerOptimizers):
        optimizer = optimizer.members
    if isinstance(optimizer, (list, tuple)):
        if len(optimizer) != count:
            raise ValueError(
                f"`optimizer` must be one optimizer, or a list of {count}, one per "
                f"network. Received {len(optimizer)}."
            )
        found = [keras.optimizers.get(item) for item in optimizer]
        if len({id(item) for item in found}) < count:
            raise ValueError(
                "`optimizer`: two networks share one optimizer object. Give one "
                "optimizer (it is cloned for each), or a list of different objects."
            )
        return found
    config = keras.saving.serialize_keras_object(keras.optimizers.get(optimizer))
    return [keras.saving.deserialize_keras_object(config) for _ in range(count)]
