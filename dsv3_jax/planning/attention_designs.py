"""Cache bytes and FLOPs per decoded token: MLA against caches of whole keys and values."""

from __future__ import annotations

import dataclasses

from dsv3_jax.accounting.flops import decode_flops
from dsv3_jax.accounting.hardware import Hardware
from dsv3_jax.accounting.parameters import cache_bytes_per_token
from dsv3_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class AttentionDesign:
    """One model's decoding attention, all layers together.

    bytes_per_token: bfloat16 cache per token, which is also what a decoded token reads per cached one.
    flops_per_position: scores and values of a decoded token, per cached one.
    """

    name: str
    bytes_per_token: float
    flops_per_position: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte of cache: above a device's peak over its bandwidth, compute is what limits."""
        return self.flops_per_position / self.bytes_per_token

    def seconds_per_position(self, sheet: Hardware, queries: int = 1) -> float:
        """Time of a sequence's attention per cached token, at printed rates, with `queries` tokens at once."""
        return max(self.bytes_per_token / sheet.bandwidth, queries * self.flops_per_position / sheet.peak("bf16"))


def mla(config: ModelConfig) -> AttentionDesign:
    """MLA as decoded: absorbed, over the latent cache that the model itself makes."""
    flops = decode_flops(config, 1).attention
    return AttentionDesign("MLA (absorbed)", cache_bytes_per_token(config), flops)


def mla_expanded(config: ModelConfig) -> AttentionDesign:
    """MLA whose keys and values are cached per head."""
    c = config
    numbers = c.num_hidden_layers * c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return AttentionDesign("MLA, keys and values cached", 2.0 * numbers, 2.0 * numbers)


def grouped(name: str, layers: int, heads: int, kv_heads: int, head_dim: int = 128) -> AttentionDesign:
    """Grouped-query attention; kv_heads = heads is multi-head, 1 is multi-query."""
    return AttentionDesign(name, 2.0 * 2 * layers * kv_heads * head_dim, 2.0 * 2 * layers * heads * head_dim)


def same_shape(config: ModelConfig, kv_heads: int) -> AttentionDesign:
    """Grouped-query attention with as many layers and query heads as `config`, heads as wide as its values."""
    heads = config.num_attention_heads
    name = {1: "MQA", heads: f"MHA, {heads} heads"}.get(kv_heads, f"GQA, {kv_heads} groups")
    return grouped(f"{name}, same shape", config.num_hidden_layers, heads, kv_heads, config.v_head_dim)


PUBLISHED = (
    grouped("LLaMA-3.1 405B (GQA)", layers=126, heads=128, kv_heads=8),
    grouped("Qwen2.5 72B (GQA)", layers=80, heads=64, kv_heads=8),
)
"""Shapes from their config.json."""
