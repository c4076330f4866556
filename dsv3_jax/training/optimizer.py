"""AdamW as in the report (section 4.2), optionally with moments in bfloat16 (section 3.3.2)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import ConfigError
from dsv3_jax.training.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and gradient clipping. The report doesn't state epsilon; 1e-8 is the usual value."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Maximum global norm of gradients; 0 for no clipping."""
    moments_dtype: str = "float32"
    """Dtype of Adam's moments; `bfloat16` halves their memory, as in DeepSeek-V3's own training."""

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}: it must be at least 0 and below 1")
        if not 0 < self.eps < math.inf:
            raise ConfigError(f"optimizer.eps is {self.eps}: it must be positive")
        for name in ("weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}: it must be positive, or 0 for none")
        if self.moments_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"optimizer.moments_dtype is {self.moments_dtype!r}: it must be 'float32' or 'bfloat16'")


def make_optimizer(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    """Returns clipping by global norm, Adam, decoupled weight decay of matrices, and the scheduled learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule.learning_rate),
    )


def decays(params: Any) -> Any:
    """True for every parameter with weight decay: all except the scales of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith("norm"), params)


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """`optax.scale_by_adam` whose two moments are stored in `moments_dtype` and computed in float32.

    Independent of the dtype of parameters and gradients, unlike in optax.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    stored = jnp.dtype(config.moments_dtype)

    def cast(state: optax.ScaleByAdamState, dtype: Any) -> optax.ScaleByAdamState:
        return state._replace(mu=optax.tree.cast(state.mu, dtype), nu=optax.tree.cast(state.nu, dtype))

    def init(params: Any) -> optax.ScaleByAdamState:
        return cast(adam.init(params), stored)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        updates, state = adam.update(optax.tree.cast(updates, jnp.float32), cast(state, jnp.float32), params)
        return updates, cast(state, stored)

    return optax.GradientTransformation(init, update)
