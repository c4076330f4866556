"""Cache bytes and FLOPs per decoded token: MLA compared with caches of full keys and values."""

from __future__ import annotations

import dataclasses

from dsv3_jax.accounting.flops import decode_flops
from dsv3_jax.accounting.hardware import Hardware
from dsv3_jax.accounting.parameters import cache_bytes_per_token
from dsv3_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class AttentionDesign:
    """Decoding attention of one model, summed over layers.

    bytes_per_token: bfloat16 cache per token; a decoded token reads as much per cached token.
    flops_per_position: for scores and values of a decoded token, per cached token.
    """

    name: str
    bytes_per_token: float
    flops_per_position: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte of cache; compute-bound if above the ratio of a device's peak FLOP/s and bandwidth."""
        return self.flops_per_position / self.bytes_per_token

    def seconds_per_position(self, sheet: Hardware, queries: int = 1) -> float:
        """Seconds of attention per sequence and cached token, at data-sheet rates, for `queries` tokens at once."""
        return max(self.bytes_per_token / sheet.bandwidth, queries * self.flops_per_position / sheet.peak("bf16"))


def mla(config: ModelConfig) -> AttentionDesign:
    """MLA in absorbed form, over the model's own latent cache."""
    flops = decode_flops(config, 1).attention
    return AttentionDesign("MLA (absorbed)", cache_bytes_per_token(config), flops)


def mla_expanded(config: ModelConfig) -> AttentionDesign:
    """MLA with keys and values cached per head."""
    c = config
    numbers = c.num_hidden_layers * c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return AttentionDesign("MLA, keys and values cached", 2.0 * numbers, 2.0 * numbers)


def grouped(name: str, layers: int, heads: int, kv_heads: int, head_dim: int = 128) -> AttentionDesign:
    """Grouped-query attention; multi-head if kv_heads = heads, multi-query if 1."""
    return AttentionDesign(name, 2.0 * 2 * layers * kv_heads * head_dim, 2.0 * 2 * layers * heads * head_dim)


def same_shape(config: ModelConfig, kv_heads: int) -> AttentionDesign:
    """Grouped-query attention with the layers, query heads and value width of `config`."""
    heads = config.num_attention_heads
    name = {1: "MQA", heads: f"MHA, {heads} heads"}.get(kv_heads, f"GQA, {kv_heads} groups")
    return grouped(f"{name}, same shape", config.num_hidden_layers, heads, kv_heads, config.v_head_dim)


PUBLISHED = (
    grouped("LLaMA-3.1 405B (GQA)", layers=126, heads=128, kv_heads=8),
    grouped("Qwen2.5 72B (GQA)", layers=80, heads=64, kv_heads=8),
)
"""Shapes from the models' config.json."""
