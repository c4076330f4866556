"""The next token from its logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dsv3_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedily at temperature 0, else from the cut and tempered distribution."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Draws among this many most likely tokens."""
    top_p: float = 1.0
    """Draws among the fewest most likely tokens that together have this probability."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}: it must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}: it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: it must be above 0 and at most 1")


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Draws one token of each row: logits (B, V) float, a typed key -> (B,) int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    ordered = jnp.sort(logits, axis=-1, descending=True)
    if sampling.top_k is not None:
        logits = jnp.where(logits < ordered[:, min(sampling.top_k, logits.shape[-1]) - 1, None], -jnp.inf, logits)
    if sampling.top_p < 1:
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
