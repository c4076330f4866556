"""Reference of grouped matmul: multiplies every row with every matrix, selects the result of its own; and SwiGLU."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`. Does G times the work of the others."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(lhs.shape[0])
    member = (row >= (ends - group_sizes)[:, None]) & (row < ends[:, None])  # (G, M)
    return jnp.einsum("gm,gmn->mn", member.astype(lhs.dtype), jnp.einsum("mk,gkn->gmn", lhs, rhs))


def swiglu(gate: jax.Array, up: jax.Array, factors: jax.Array) -> jax.Array:
    """silu(gate) * up * factors, rounded once: (M, F), (M, F) and (M, 1) -> (M, F) of the dtype of `gate`."""
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    return (jax.nn.silu(gate.astype(wide)) * up.astype(wide) * factors).astype(gate.dtype)
