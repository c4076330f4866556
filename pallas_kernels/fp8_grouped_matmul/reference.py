"""Reference of FP8 grouped matmul: apply the scales, then multiply each row with its group's matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 128


def fp8_grouped_matmul(
    lhs: jax.Array, lhs_scales: jax.Array, rhs: jax.Array, rhs_scales: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """See `api.fp8_grouped_matmul`. Computes in float32 (or float64, if the scales are), with G times the work."""
    return _product(lhs, lhs_scales, rhs, rhs_scales, group_sizes).astype(jnp.bfloat16)


def fp8_grouped_swiglu(
    lhs: jax.Array,
    lhs_scales: jax.Array,
    gate: tuple[jax.Array, jax.Array],
    up: tuple[jax.Array, jax.Array],
    group_sizes: jax.Array,
) -> jax.Array:
    """See `api.fp8_grouped_swiglu`. Rounds the result alone; otherwise as `fp8_grouped_matmul`."""
    g, u = (_product(lhs, lhs_scales, *of, group_sizes) for of in (gate, up))
    return (jax.nn.silu(g) * u).astype(jnp.bfloat16)


def _product(
    lhs: jax.Array, lhs_scales: jax.Array, rhs: jax.Array, rhs_scales: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """(M, N) in the dtype of the scales."""
    wide = lhs_scales.dtype
    x = lhs.astype(wide) * jnp.repeat(lhs_scales, BLOCK, 1)
    w = rhs.astype(wide) * jnp.repeat(jnp.repeat(rhs_scales, BLOCK, 1), BLOCK, 2)[:, : rhs.shape[1]]
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(lhs.shape[0])
    member = (row >= (ends - group_sizes)[:, None]) & (row < ends[:, None])  # (G, M)
    out = jnp.zeros((lhs.shape[0], rhs.shape[1]), wide)
    for g in range(rhs.shape[0]):
        out += jnp.where(member[g][:, None], jnp.dot(x, w[g].T, precision="highest"), 0)
    return out


def weight_gradient(
    lhs: jax.Array, lhs_scales: jax.Array, dout: jax.Array, dout_scales: jax.Array, group_steps: jax.Array
) -> jax.Array:
    """See `api.fp8_grouped_weight_gradient`. Computes in the scales' dtype, with G times the work."""
    wide = lhs_scales.dtype
    x = lhs.astype(wide) * jnp.repeat(lhs_scales.T, BLOCK, 1)
    dy = dout.astype(wide) * jnp.repeat(dout_scales.T, BLOCK, 1)
    ends = jnp.cumsum(group_steps) * BLOCK
    row = jnp.arange(lhs.shape[1])
    member = (row >= (ends - group_steps * BLOCK)[:, None]) & (row < ends[:, None])
    return jnp.stack([jnp.dot(jnp.where(mine, x, 0), dy.T, precision="highest") for mine in member])
