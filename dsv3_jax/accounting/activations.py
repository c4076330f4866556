"""Saved activations: the bytes that one block keeps for its backward pass, counted on its abstract residuals."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.block import Block
from dsv3_jax.model.cache import TokenPositions
from dsv3_jax.model.remat import rematerialise
from dsv3_jax.runtime import Runtime

_PRIME = 1009
"""A sequence length that divides no width of a model, so that the size of an array shows how it grows with it."""


@dataclasses.dataclass(frozen=True)
class SavedActivations:
    """Bytes that one block keeps for its backward pass.

    per_token: per token. per_pair: per pair of query and key; only the reference attention saves these.
    """

    per_token: float
    per_pair: float


@functools.cache
def saved_by_block(config: ModelConfig, runtime: Runtime, is_moe: bool) -> SavedActivations:
    """Counts the residuals that `jax.vjp` of one block saves under the runtime's remat policy, on abstract arrays."""
    block = rematerialise(Block, runtime)(config, runtime, is_moe)
    x = jax.ShapeDtypeStruct((1, _PRIME, config.hidden_size), jnp.dtype(runtime.dtype))

    def backward(x: jax.Array) -> Any:
        where = TokenPositions(jnp.zeros((1, _PRIME), jnp.int32))

        def forward(variables: Any, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            result: Any = block.apply(variables, x, where, None)
            out, (_, stats) = result
            return out, None if stats is None else stats.affinity

        return jax.vjp(forward, block.init(jax.random.key(0), x, where, None), x)[1]

    per_token = per_pair = 0.0
    for leaf in jax.tree.leaves(jax.eval_shape(backward, x)):
        size = leaf.size * leaf.dtype.itemsize
        if leaf.size % _PRIME**2 == 0:
            per_pair += size / _PRIME**2
        elif leaf.size % _PRIME == 0:
            per_token += size / _PRIME
    return SavedActivations(per_token, per_pair)
