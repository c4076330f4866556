"""DeepSeekMoE: routed experts beside shared ones (report section 2.1.2, eq. 12), and the dense feed-forward."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.auto import experts_impl
from dsv3_jax.model.linear import Weight, grouped_swiglu, linear_weight, swiglu, weight_einsum
from dsv3_jax.model.module import Module
from dsv3_jax.model.router import Router, RouterStats
from dsv3_jax.parallel.dispatch import experts_are_spread, flatten, no_exchange, spread_experts
from dsv3_jax.parallel.rows import collect, spread
from dsv3_jax.quantization.packed import PackedTiles
from dsv3_jax.runtime import Runtime

EXPERT_PLACEMENT = "placement"
"""The Linen collection of the slots of redundant experts; see `inference.expert_placement`."""


STACKS, LAYER = "stacks", "layer"
"""The Linen collections of experts' weights that a loop over layers doesn't cut: those of all layers, at the paths of
`params`, which then lacks them, and in each layer its number, `layer`. See `inference.expert_stacks`."""


class ExpertWeights(NamedTuple):
    """Weights of the experts' SwiGLU: gate_proj and up_proj (E, D, F), down_proj (E, F, D)."""

    gate_proj: Weight
    up_proj: Weight
    down_proj: Weight


def experts_reference(
    x: jax.Array, ids: jax.Array, weights: jax.Array, w: ExpertWeights, rows: int | None = None
) -> jax.Array:
    """Reference: applies every expert to every token, with weight zero if it wasn't chosen. E / K times the work.

    Args:
      x: (N, D). ids: (N, K) int32, E for no expert. weights: (N, K) float32.
      rows: an upper bound on the number of ids below E, used only by the other implementation.

    Returns (N, D) of `x`'s dtype.
    """
    up = functools.partial(weight_einsum, "nd,edf->nef", x)
    out = weight_einsum("nef,efd->ned", jax.nn.silu(up(w.gate_proj)) * up(w.up_proj), w.down_proj)
    chosen = jax.nn.one_hot(ids, w.gate_proj.shape[0], dtype=weights.dtype)  # (N, K, E)
    return jnp.einsum("nke,nk,ned->nd", chosen, weights, out).astype(x.dtype)


def experts_grouped(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w: ExpertWeights,
    rows: int,
    *,
    implementation: str,
    layer: jax.Array | None = None,
) -> jax.Array:
    """Sorts tokens by expert, applies grouped matmuls, and restores the order. No token is dropped.

    layer: () int32, which of the weights are meant if those of all layers are given, (L, E, ...).
    """
    tokens, k = ids.shape
    count: int = w.gate_proj.shape[-3]
    first: jax.Array | int = 0
    if layer is not None:
        first = layer * count
        w = ExpertWeights(*(jax.lax.collapse(cast(jax.Array, a), 0, 2) for a in w))
    order = jnp.argsort(ids.ravel())[:rows]  # of the N K (token, choice) pairs; those without an expert come last
    sizes = jnp.bincount(ids.ravel(), length=count).astype(jnp.int32)
    place = jnp.full((tokens * k,), rows, order.dtype).at[order].set(jnp.arange(rows, dtype=order.dtype))
    maps = order // k, place.reshape(tokens, k)
    weights = spread(weights.reshape(-1, 1), order, place[:, None])
    out = grouped_swiglu(spread(x, *maps), *w, weights, sizes, implementation=implementation, first=first)
    return collect(out, *maps).astype(x.dtype)


def experts(
    x: jax.Array, ids: jax.Array, weights: jax.Array, w: ExpertWeights, config: ModelConfig, runtime: Runtime
) -> jax.Array:
    """The experts seam: sum over the chosen experts of weight times FFN (the routed part of eq. 12).

    Args: x (B, T, D) of the runtime's dtype; ids (B, T, K) int32; weights (B, T, K) float32; expert parameters.
    Returns (B, T, D) of `x`'s dtype.
    """
    return experts_and_exchanges(x, ids, weights, w, config, runtime)[0]


def experts_and_exchanges(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w: ExpertWeights,
    config: ModelConfig,
    runtime: Runtime,
    layer: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`experts`, and `RouterStats.exchanges`. layer: as in `experts_grouped`."""
    compute, name = experts_reference, experts_impl(runtime)
    if name != "reference":
        compute = functools.partial(experts_grouped, implementation=name, layer=layer)
    if experts_are_spread(runtime):
        packing = PackedTiles() if runtime.precision == "fp8" else None
        return spread_experts(x, ids, weights, w, compute=compute, config=config, runtime=runtime, packing=packing)
    y = compute(flatten(x), flatten(ids), flatten(weights), w, ids.size).reshape(x.shape)
    return y, no_exchange()[None, None]


class FeedForward(Module):
    """SwiGLU, down(silu(gate(x)) * up(x)), for dense layers and, as one of their total width, shared experts."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., D) -> (..., D) of the runtime's dtype."""
        return swiglu(self, x, self.width)


class RoutedExperts(Module):
    """The routed experts: their parameters, and the experts seam."""

    @nn.compact
    def __call__(self, x: jax.Array, ids: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x (B, T, D), ids and weights (B, T, K) -> (B, T, D), and `RouterStats.exchanges`."""
        c = self.config
        if self.runtime.redundant_experts:
            ids = self._slots(ids)
        if self.has_variable(STACKS, "gate_proj"):
            w = ExpertWeights(*(self.get_variable(STACKS, name) for name in ExpertWeights._fields))
            return experts_and_exchanges(x, ids, weights, w, c, self.runtime, self.get_variable(LAYER, "layer"))
        e, d, f = c.n_routed_experts + self.runtime.redundant_experts, c.hidden_size, c.moe_intermediate_size
        w = ExpertWeights(
            linear_weight(self, "gate_proj", (e, d, f), ("experts", "embed", "expert_ffn"), stack=1),
            linear_weight(self, "up_proj", (e, d, f), ("experts", "embed", "expert_ffn"), stack=1),
            linear_weight(self, "down_proj", (e, f, d), ("experts", "expert_ffn", "embed"), stack=1),
        )
        return experts_and_exchanges(x, ids, weights, w, c, self.runtime)

    def _slots(self, ids: jax.Array) -> jax.Array:
        """Maps experts (B, T, K) to slots; tokens are assigned to the copies of an expert in turn."""
        e, redundant = self.config.n_routed_experts, self.runtime.redundant_experts
        alone = lambda: jnp.broadcast_to(jnp.arange(e, dtype=jnp.int32)[:, None], (e, 1 + redundant))
        slot_of = self.variable(EXPERT_PLACEMENT, "slot_of", alone).value
        copies = self.variable(EXPERT_PLACEMENT, "copies", lambda: jnp.ones((e,), jnp.int32)).value
        token = jnp.arange(ids[..., 0].size, dtype=jnp.int32).reshape(*ids.shape[:-1], 1)
        return slot_of[ids, token % copies[ids]]


class MoE(Module):
    """Shared experts plus the routed ones that the gate chose (eq. 12, without the residual)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, RouterStats]:
        """x (B, T, D) of the runtime's dtype -> (B, T, D), and routing statistics."""
        c, r = self.config, self.runtime
        ids, weights, stats = Router(c, r, name="gate")(x)
        y, exchanges = RoutedExperts(c, r, name="experts")(x, ids, weights)
        if c.n_shared_experts:
            y += FeedForward(c, r, c.n_shared_experts * c.moe_intermediate_size, name="shared_experts")(x)
        return y, dataclasses.replace(stats, exchanges=exchanges)
