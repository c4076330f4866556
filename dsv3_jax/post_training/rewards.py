"""Rewards by rule, as functions of a problem and a text, and generated arithmetic problems with known answers."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError

Problem = Mapping[str, Any]
"""A problem: `prompt`, and whatever else the reward needs, such as `answer`."""

Reward = Callable[[Problem, str], float]


def load_reward(path: str) -> Reward:
    """Imports a reward function by its dotted path, `package.module.function`. Raises ConfigError if there is none."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"reward {path!r} can't be imported: {error}") from None
    if not callable(function):
        raise ConfigError(f"reward {path!r} is no function, but a {type(function).__name__}")
    reward: Reward = function
    return reward


@dataclasses.dataclass
class SafeReward:
    """A reward function with caught exceptions: a text for which it fails gets 0, and is counted."""

    function: Reward
    errors: int = 0
    last_error: str | None = None

    def __call__(self, problem: Problem, text: str) -> float:
        try:
            value = float(self.function(problem, text))
            if not math.isfinite(value):
                raise ValueError(f"the reward is {value}")
            return value
        except Exception as error:
            self.errors += 1
            self.last_error = f"{type(error).__name__}: {error}"
            return 0.0


def arithmetic_problems(count: int, seed: int, largest: int = 99) -> list[dict[str, str]]:
    """Generates sums and differences, such as `{"prompt": "17+25=", "answer": "42"}`."""
    rng = np.random.default_rng(seed)
    a, b, plus = rng.integers(0, largest + 1, count), rng.integers(0, largest + 1, count), rng.random(count) < 0.5
    return [
        {"prompt": f"{x}{'+' if p else '-'}{y}=", "answer": str(x + y if p else x - y)}
        for x, y, p in zip(a.tolist(), b.tolist(), plus.tolist(), strict=True)
    ]


def arithmetic_reward(problem: Problem, text: str) -> float:
    """Returns 1 if the text begins with the right number, 0.1 for another number, else 0."""
    found = re.match(r"-?\d+", text)
    if not found:
        return 0.0
    return 1.0 if found.group() == problem["answer"] else 0.1
