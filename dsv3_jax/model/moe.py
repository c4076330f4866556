"""DeepSeekMoE: routed experts beside shared ones (report section 2.1.2, eq. 12), and the dense feed-forward."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig, Runtime
from dsv3_jax.model.linear import linear, weight
from dsv3_jax.model.remat import kept
from dsv3_jax.model.router import Router, RouterStats
from pallas_kernels.grouped_matmul import grouped_matmul


class ExpertWeights(NamedTuple):
    """SwiGLU of every expert: gate_proj and up_proj (E, D, F), down_proj (E, F, D)."""

    gate_proj: jax.Array
    up_proj: jax.Array
    down_proj: jax.Array


def experts_reference(x: jax.Array, ids: jax.Array, weights: jax.Array, w: ExpertWeights) -> jax.Array:
    """Every expert on every token, weighted with zero where it wasn't chosen: E / K times the work, obviously right.

    Args: x (N, D); ids (N, K) int32; weights (N, K) float32. Returns (N, D) of `x`'s dtype.
    """
    hidden = jax.nn.silu(jnp.einsum("nd,edf->nef", x, w.gate_proj)) * jnp.einsum("nd,edf->nef", x, w.up_proj)
    out = jnp.einsum("nef,efd->ned", hidden, w.down_proj)
    chosen = jax.nn.one_hot(ids, w.gate_proj.shape[0], dtype=weights.dtype)  # (N, K, E)
    return jnp.einsum("nke,nk,ned->nd", chosen, weights, out).astype(x.dtype)


def experts_grouped(
    x: jax.Array, ids: jax.Array, weights: jax.Array, w: ExpertWeights, implementation: str
) -> jax.Array:
    """The same on one device, without waste: tokens sorted by expert, three grouped matmuls, and back. Dropless."""
    tokens, k = ids.shape
    order = jnp.argsort(ids.ravel())  # of the N K (token, choice) pairs
    sizes = jnp.bincount(ids.ravel(), length=w.gate_proj.shape[0]).astype(jnp.int32)
    rows = x[order // k]
    gate = kept(grouped_matmul(rows, w.gate_proj, sizes, implementation=implementation))
    up = kept(grouped_matmul(rows, w.up_proj, sizes, implementation=implementation))
    out = grouped_matmul(jax.nn.silu(gate) * up, w.down_proj, sizes, implementation=implementation)
    unsorted = out[jnp.argsort(order)].reshape(tokens, k, -1)
    return jnp.einsum("nkd,nk->nd", unsorted, weights).astype(x.dtype)


def experts(x: jax.Array, ids: jax.Array, weights: jax.Array, w: ExpertWeights, runtime: Runtime) -> jax.Array:
    """The experts seam: sum over the chosen experts of weight times FFN (the routed part of eq. 12).

    Args: x (N, D) of the runtime's dtype; ids (N, K) int32; weights (N, K) float32; expert parameters.
    Returns (N, D) of `x`'s dtype.
    """
    w = ExpertWeights(*(a.astype(x.dtype) for a in w))
    if runtime.experts_impl == "reference":
        return experts_reference(x, ids, weights, w)
    return experts_grouped(x, ids, weights, w, runtime.experts_impl)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). The dense layers', and the shared experts' as one of their summed width."""

    config: ModelConfig
    runtime: Runtime
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., D) -> (..., D) of the runtime's dtype."""
        d, dtype = self.config.hidden_size, self.runtime.dtype
        gate = kept(linear(x, weight(self, "gate_proj", d, self.width), dtype))
        up = kept(linear(x, weight(self, "up_proj", d, self.width), dtype))
        return linear(jax.nn.silu(gate) * up, weight(self, "down_proj", self.width, d), dtype)


class RoutedExperts(nn.Module):
    """The parameters of the routed experts, and the seam applied to them."""

    config: ModelConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        """x (B, T, D), ids and weights (B, T, K) -> (B, T, D)."""
        c = self.config
        e, d, f = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        w = ExpertWeights(
            weight(self, "gate_proj", e, d, f), weight(self, "up_proj", e, d, f), weight(self, "down_proj", e, f, d)
        )
        flat = lambda a: a.reshape(-1, a.shape[-1])
        return experts(flat(x), flat(ids), flat(weights), w, self.runtime).reshape(x.shape)


class MoE(nn.Module):
    """Shared experts plus the routed ones that the gate chose (eq. 12, without the residual)."""

    config: ModelConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, RouterStats]:
        """x (B, T, D) of the runtime's dtype -> the same, and the routing's stats."""
        c, r = self.config, self.runtime
        ids, weights, stats = Router(c, r, name="gate")(x)
        y = RoutedExperts(c, r, name="experts")(x, ids, weights)
        if c.n_shared_experts:
            y += FeedForward(c, r, c.n_shared_experts * c.moe_intermediate_size, name="shared_experts")(x)
        return y, stats
