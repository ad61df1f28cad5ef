"""The states of random generators, saved and loaded."""

from __future__ import annotations

import json
import os
from typing import Any

from keras import ops

_FILE = "seed_generators.json"


class RandomStates:
    """Mixed into the distillers: after loading, dropout goes on where it was.

    Keras leaves the states of random generators out of its files.
    """

    def save_assets(self: Any, dir_path: str) -> None:
        states = [ops.convert_to_numpy(v.value).tolist() for v in self._seed_states()]
        with open(os.path.join(dir_path, _FILE), "w") as file:
            json.dump(states, file)

    def load_assets(self: Any, dir_path: str) -> None:
        path = os.path.join(dir_path, _FILE)
        if os.path.exists(path):
            with open(path) as file:
                states = json.load(file)
            for variable, state in zip(self._seed_states(), states, strict=True):
                variable.assign(state)

    def _seed_states(self: Any) -> list[Any]:
        layers = self._flatten_layers()
        return [g.state for layer in layers for g in layer._seed_generators]
