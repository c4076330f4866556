"""Causal attention with decoupled heads, said plainly, a block of queries at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.mla_prefill.residuals import residual

BLOCK = 512  # queries whose scores exist at once; in the backward pass they are computed again


def mla_prefill(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    segments: jax.Array | None = None,
) -> jax.Array:
    """See `api.mla_prefill`. The softmax is in float32, or in float64 where the inputs are."""
    wide = jnp.promote_types(q_nope.dtype, jnp.float32)
    tokens, keys = q_nope.shape[1], k_nope.shape[1]
    key_index = jnp.arange(keys)

    @functools.partial(jax.checkpoint, static_argnums=(2, 3))
    def block(q_nope: jax.Array, q_rope: jax.Array, start: int, stop: int) -> jax.Array:
        scores = jnp.einsum("bthn,bshn->bhts", q_nope, k_nope, preferred_element_type=wide)
        scores += jnp.einsum("bthp,bsp->bhts", q_rope, k_rope, preferred_element_type=wide)
        index = keys - tokens + jnp.arange(start, stop)
        mask = (key_index <= index[:, None])[None]
        if segments is not None:
            mask &= segments[:, None] == segments[:, keys - tokens + start : keys - tokens + stop, None]
        scores = jnp.where(mask[:, None], scores * scale, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bhts,bshv->bthv", weights, v)

    starts = range(0, tokens, BLOCK)
    ends = [min(s + BLOCK, tokens) for s in starts]
    parts = [block(q_nope[:, s:e], q_rope[:, s:e], s, e) for s, e in zip(starts, ends, strict=False)]
    return residual(jnp.concatenate(parts, axis=1))
