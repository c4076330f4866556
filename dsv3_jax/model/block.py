"""A transformer block: latent attention and a feed-forward, each applied to the normalised residual stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3_jax.config import ConfigError
from dsv3_jax.model.attention import MultiHeadLatentAttention
from dsv3_jax.model.cache import LayerCache, TokenPositions
from dsv3_jax.model.module import Module
from dsv3_jax.model.moe import FeedForward, MoE
from dsv3_jax.model.norm import norm_scale, rms_norm
from dsv3_jax.model.router import CHOICES, RouterStats
from dsv3_jax.parallel.sharding import constrain


class Block(Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), where the feed-forward is dense or a mixture of experts."""

    is_moe: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, where: TokenPositions, cache: LayerCache | None
    ) -> tuple[jax.Array, tuple[LayerCache | None, RouterStats | None]]:
        """x (B, T, D) -> (B, T, D), with the extended cache and, for an MoE block, routing statistics."""
        c, r = self.config, self.runtime
        before_attention = norm_scale(self, "input_layernorm", c.hidden_size)
        attention = MultiHeadLatentAttention(c, r, name="self_attn")
        before_ffn = norm_scale(self, "post_attention_layernorm", c.hidden_size)
        ffn: nn.Module = MoE(c, r, name="mlp") if self.is_moe else FeedForward(c, r, c.intermediate_size, name="mlp")

        def block(
            x: jax.Array, where: TokenPositions, cache: LayerCache | None
        ) -> tuple[jax.Array, tuple[LayerCache | None, RouterStats | None]]:
            h, cache = attention(rms_norm(x, before_attention, c.rms_norm_eps), where, cache)
            x = constrain(x + h, r, "batch", "sequence", None)
            h = rms_norm(x, before_ffn, c.rms_norm_eps)
            h, stats = ffn(h) if self.is_moe else (ffn(h), None)
            return constrain(x + h, r, "batch", "sequence", None), (cache, stats)

        # Which experts a token chose is recorded, and replayed, for a whole batch.
        whole = CHOICES in self.variables or self.is_mutable_collection(CHOICES)
        if self.is_moe and cache is None and r.interleave > 1 and not whole:
            return _interleaved(block, x, where, r.interleave)
        return block(x, where, cache)


def _interleaved(
    block: Callable[..., tuple[jax.Array, tuple[LayerCache | None, RouterStats | None]]],
    x: jax.Array,
    where: TokenPositions,
    parts: int,
) -> tuple[jax.Array, tuple[LayerCache | None, RouterStats | None]]:
    """Applies the block to `parts` independent parts of the batch.

    The dispatch of one can then overlap with the attention of another (report section 3.4). A part takes every
    `parts`-th sequence, so that it is sharded over devices like the batch.
    """
    if x.shape[0] % parts:
        raise ConfigError(f"runtime.interleave is {parts}: it doesn't divide the {x.shape[0]} sequences of a batch")
    of_batch = dataclasses.replace(where, order=None)

    def on_share(i: int) -> tuple[jax.Array, tuple[LayerCache | None, RouterStats | None]]:
        mine, place = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:])[:, i], (x, of_batch))
        return block(mine, dataclasses.replace(place, order=where.order), None)

    done = [on_share(i) for i in range(parts)]
    whole: Any = jax.tree.map(lambda *shares: jnp.stack(shares, 1).reshape(-1, *shares[0].shape[1:]), *done)
    return cast(tuple[jax.Array, tuple[LayerCache | None, RouterStats | None]], whole)
