"""Router: the experts of each token and their weights (report section 2.1.2, eq. 13 to 16)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.linear import weight
from dsv3_jax.model.module import Module
from dsv3_jax.parallel.dispatch import no_exchange
from pallas_kernels.devices import platform

ROUTER = "router"
"""The Linen collection of `e_score_correction_bias`, apart from the parameters: no optimizer or cast affects it."""

CHOICES = "choices"
"""The Linen collection of the chosen experts, ids (B, T, K) per gate.

`model.apply(..., mutable=[CHOICES])` records the choices, and passing them among the variables replays them: each token
goes to these experts, whatever the gate would choose. The weights and their gradient are still the gate's.
"""

_MANY_ROWS = 1024
"""Tokens from which on a GPU finds experts one after another. In decoding, a sort of few rows is fewer launches."""


@struct.dataclass
class RouterStats:
    """Routing statistics of one MoE layer, for balancing. All are float32.

    load: (B, E), tokens of the sequence sent to the expert.
    fraction: (B, E) f_i of eq. 18: E / (K T) times the tokens whose top K affinities include the expert.
    affinity: (B, E) P_i of eq. 20: the mean over tokens of the normalised affinity.
    exchanges: two axes with an entry per device that has its own tokens, and one of 1 or 0: whether their exchange took
      several rounds, and whether it would have with each of `parallel.dispatch.SLACKS`.
    """

    load: jax.Array
    fraction: jax.Array
    affinity: jax.Array
    exchanges: jax.Array


def affinities(logits: jax.Array, config: ModelConfig) -> jax.Array:
    """Affinities s of eq. 15 (sigmoid), or DeepSeek-V2's softmax: float32 (..., E) -> (..., E)."""
    return jax.nn.sigmoid(logits) if config.scoring_func == "sigmoid" else jax.nn.softmax(logits, axis=-1)


def normalised_affinities(logits: jax.Array, config: ModelConfig) -> jax.Array:
    """s' of eq. 19, s / sum(s): float32 (..., E) -> (..., E). Uses logarithms, since s may underflow in float32."""
    return jax.nn.softmax(jax.nn.log_sigmoid(logits) if config.scoring_func == "sigmoid" else logits, axis=-1)


@jax.named_scope("select_experts")
def select_experts(
    scores: jax.Array, bias: jax.Array | None, config: ModelConfig, ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Top-K experts of each token under group-limited routing (eq. 14 and 16).

    The bias affects only the choice. Groups other than the best `topk_group` are masked with -inf, since zero would win
    over a negative biased score.

    Args:
      scores: (N, E) affinities, float32.
      bias: (E,) e_score_correction_bias, float32, or None (V2).
      ids: (N, K) int32, experts to use instead of choosing.

    Returns:
      ids (N, K) int32 and weights (N, K) float32: affinities, normalised over the K if `norm_topk_prob`,
      times `routed_scaling_factor`.
    """
    c = config
    if ids is None:
        ids = _top_experts(scores if bias is None else scores + bias, c)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if c.norm_topk_prob:
        # First scaled to about 1, exactly, by a power of two: the quotient's gradient divides by the square of the sum,
        # which isn't a float32 number where all affinities are small.
        size = jax.lax.stop_gradient(jnp.maximum(weights.max(-1, keepdims=True), 1e-30))
        size = jax.lax.reduce_precision(size, jnp.finfo(size.dtype).nexp, 0)
        weights /= size
        weights /= weights.sum(-1, keepdims=True) + 1e-20 / size
    return ids, weights * c.routed_scaling_factor


def _top_experts(choice: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns the K highest of the biased affinities (N, E) within the best groups: ids (N, K) int32."""
    c = config
    if c.n_group > 1:
        grouped = choice.reshape(-1, c.n_group, c.n_routed_experts // c.n_group)
        best = grouped.max(-1)
        if c.has_router_bias and grouped.shape[-1] > 1:  # V3 ranks a group by its two best, V2 by its best
            first = jax.nn.one_hot(grouped.argmax(-1), grouped.shape[-1], dtype=bool)
            best += jnp.where(first, -jnp.inf, grouped).max(-1)
        in_best = jax.nn.one_hot(highest(best, c.topk_group), c.n_group, dtype=bool).any(-2)
        choice = jnp.where(in_best[..., None], grouped, -jnp.inf).reshape(choice.shape)
    return highest(choice, c.num_experts_per_tok)


def highest(x: jax.Array, k: int) -> jax.Array:
    """Places (N, k) int32 of the k highest of each row of x (N, E), as `jax.lax.top_k`: NaN first, the first of equals.

    For many rows on a GPU one after another, where XLA sorts each row by itself.
    """
    if platform() != "gpu" or len(x) < _MANY_ROWS:
        return jax.lax.top_k(x, k)[1]
    return highest_in_turns(x, k)


def highest_in_turns(x: jax.Array, k: int) -> jax.Array:
    """`highest` by k passes over x."""
    x, chosen = jnp.maximum(x, jnp.finfo(x.dtype).min), []  # -inf is for what has been chosen
    for _ in range(k):
        chosen.append(jnp.argmax(x, axis=-1).astype(jnp.int32))
        x = jnp.where(jax.nn.one_hot(chosen[-1], x.shape[-1], dtype=bool), -jnp.inf, x)
    return jnp.stack(chosen, axis=-1)


def _count(ids: jax.Array, experts: int) -> jax.Array:
    """Counts how often each expert occurs in ids (B, T, K): float32 (B, E)."""
    return jax.vmap(lambda i: jnp.bincount(i.ravel(), length=experts))(ids).astype(jnp.float32)


class Router(Module):
    """The gate of one MoE layer. It computes in float32, since rounded affinities would change the choice."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, RouterStats]:
        """x (B, T, D) -> ids (B, T, K) int32, weights (B, T, K) float32, and routing statistics."""
        c = self.config
        (batch, tokens, width), experts, k = x.shape, c.n_routed_experts, c.num_experts_per_tok
        wide = jnp.promote_types(x.dtype, jnp.float32)
        centroids = weight(self, "weight", (width, experts), ("embed", None), dtype=wide)  # e_i of eq. 15, as columns
        logits = jnp.dot(x.astype(wide), centroids, precision=jax.lax.Precision.HIGHEST)
        scores = affinities(logits, c)
        bias = None
        if c.has_router_bias:
            zeros = lambda: jnp.zeros((experts,), jnp.float32)
            bias = self.variable(ROUTER, "e_score_correction_bias", zeros).value
        before: jax.Array | None = self.get_variable(CHOICES, "ids")
        ids, weights = select_experts(
            scores.reshape(-1, experts), bias, c, None if before is None else before.reshape(-1, k)
        )
        ids, weights = ids.reshape(batch, tokens, k), weights.reshape(batch, tokens, k)
        if self.is_mutable_collection(CHOICES) and not self.is_initializing():
            self.put_variable(CHOICES, "ids", ids)

        top_k = highest(jax.lax.stop_gradient(scores).reshape(-1, experts), k).reshape(batch, tokens, k)
        stats = RouterStats(
            load=_count(ids, experts),
            fraction=_count(top_k, experts) * (experts / (k * tokens)),  # eq. 18, of s without the bias as written
            affinity=jnp.mean(normalised_affinities(logits, c), axis=1),  # eq. 19 and 20
            exchanges=no_exchange()[None, None],  # which are known only when the tokens have been sent
        )
        return ids, weights, stats
