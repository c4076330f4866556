"""Tokens a second, model FLOP/s, and their share of the device's peak where that is known."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.transformer import DeepSeekV3

PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}
"""Dense bfloat16 peak of a device by its `device_kind`, FLOP/s: the vendors' data sheets."""


def model_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one training token: 6 for each weight that multiplies it, and causal attention's scores and values.

    The weights are counted on the model's abstract parameters: all but embedding, norms and the experts that a
    token isn't sent to. Attention costs 6 H (d_qk + d_v) T / 2 a layer, half of T being visible on average.
    Rematerialised work isn't counted. MTP modules count, with one use of the head each.
    """
    c = config
    tree = jax.eval_shape(DeepSeekV3(c).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    weights = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [p.key for p in path]
        if names[-1].endswith("norm") or names[-1] == "embed_tokens":
            continue
        share = c.num_experts_per_tok / c.n_routed_experts if "experts" in names else 1.0
        uses = 1 + c.num_nextn_predict_layers if names[-1] == "lm_head" else 1
        weights += math.prod(leaf.shape) * share * uses
    widths = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    return 6 * (weights + layers * c.num_attention_heads * widths * sequence_length / 2)


class Throughput:
    """Rates between two calls of `measure`; the first one, and the first after `restart`, only starts the clock."""

    def __init__(self, config: ModelConfig, sequence_length: int) -> None:
        self._flops_per_token = model_flops_per_token(config, sequence_length)
        self._tokens = 0
        self._since: float | None = None

    def add(self, tokens: int) -> None:
        """Counts a step's tokens."""
        self._tokens += tokens

    def restart(self) -> None:
        """Leaves out the time until the next measurement, in which something else than training runs."""
        self._since = None

    def measure(self, finished: jax.Array) -> dict[str, Any]:
        """Waits for `finished`, then returns what was done since the last measurement, a second."""
        jax.block_until_ready(finished)
        now, since, tokens = time.perf_counter(), self._since, self._tokens
        self._since, self._tokens = now, 0
        if since is None:
            return {}
        rate = tokens / (now - since)
        metrics = {"tokens_per_second": rate, "model_flops_per_second": rate * self._flops_per_token}
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        if peak is not None:
            metrics["mfu"] = metrics["model_flops_per_second"] / (peak * jax.device_count())
        return metrics
