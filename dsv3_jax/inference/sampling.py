"""The next token from its logits."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from dsv3_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedily at temperature 0, else from the tempered and cut distribution.

    Temperature comes first, then top-k, then top-p of what top-k left, as in transformers and vLLM.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Draws among this many most likely tokens, and those as likely as the last of them."""
    top_p: float = 1.0
    """Draws among the fewest most likely tokens that together have this share of the probability left by top_k."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}: it must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}: it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: it must be above 0 and at most 1")


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Draws one token of each row: logits (B, V) float, a typed key -> (B,) int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, cut(logits, sampling), axis=-1).astype(jnp.int32)


def cut(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the distribution that is drawn from at a positive temperature, -inf for tokens cut off.

    (B, V) float -> (B, V) float32.
    """
    logits = logits.astype(jnp.float32)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature  # no overflow at small temperatures
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True)
        likely = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
        kept = jnp.cumsum(likely, axis=-1) - likely < sampling.top_p  # while those before don't reach it
        logits = jnp.where(jnp.put_along_axis(jnp.zeros_like(kept), order, kept, -1, inplace=False), logits, -jnp.inf)
    return logits
