"""A transformer block: latent attention and a feed-forward, each on a normed residual stream."""

from __future__ import annotations

import flax.linen as nn
import jax

from dsv3_jax.config import ModelConfig, Runtime
from dsv3_jax.model.attention import Index, LayerCache, MultiHeadLatentAttention
from dsv3_jax.model.moe import FeedForward, MoE
from dsv3_jax.model.norm import norm_scale, rms_norm
from dsv3_jax.model.router import RouterStats
from dsv3_jax.parallel.rules import constrain


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), the latter dense or a mixture of experts."""

    config: ModelConfig
    runtime: Runtime
    is_moe: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, index: Index, cache: LayerCache | None
    ) -> tuple[jax.Array, tuple[LayerCache | None, RouterStats | None]]:
        """x (B, T, D) -> the same, with the extended cache and, of an MoE block, the routing's stats."""
        c, r = self.config, self.runtime
        h = rms_norm(x, norm_scale(self, "input_layernorm", c.hidden_size), c.rms_norm_eps)
        h, cache = MultiHeadLatentAttention(c, r, name="self_attn")(h, index, cache)
        x = constrain(x + h, r, "batch", "sequence", None)
        h = rms_norm(x, norm_scale(self, "post_attention_layernorm", c.hidden_size), c.rms_norm_eps)
        if self.is_moe:
            h, stats = MoE(c, r, name="mlp")(h)
        else:
            h, stats = FeedForward(c, r, c.intermediate_size, name="mlp")(h), None
        return constrain(x + h, r, "batch", "sequence", None), (cache, stats)
