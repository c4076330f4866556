"""Reference of the cache update: normalise, rotate, and write to the pages in the block table."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.mla_decode.cache import ROPE, SplitCache, join, pack, quantise_latent, split


def slots(block_tables: jax.Array, lengths: jax.Array, tokens: int, page_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns page and slot, (B, T) each, of the last tokens of every sequence; -1 for a token before the first."""
    position = lengths[:, None] - tokens + jnp.arange(tokens, dtype=jnp.int32)
    number = jnp.maximum(position, 0) // page_size
    page = jnp.take_along_axis(block_tables, number, axis=1)
    real = position >= 0
    return jnp.where(real, page, -1), jnp.where(real, position % page_size, -1)


def partner(x: jax.Array, interleave: bool) -> jax.Array:
    """Factor of the sine for each element of the last axis: -b for a, and a for b, where (a, b) is a pair."""
    pairs = (*x.shape[:-1], -1, 2) if interleave else (*x.shape[:-1], 2, -1)
    axis = -1 if interleave else -2
    a, b = jnp.moveaxis(x.reshape(pairs), axis, 0)
    return jnp.stack([-b, a], axis).reshape(x.shape)


def per_element(x: jax.Array, interleave: bool) -> jax.Array:
    """Expands (..., P / 2), per pair, to (..., P), per element."""
    return jnp.repeat(x, 2, -1) if interleave else jnp.concatenate([x, x], -1)


def new_entries(
    kv: jax.Array, norm: jax.Array, cos: jax.Array, sin: jax.Array, *, eps: float, interleave: bool
) -> tuple[jax.Array, jax.Array]:
    """Normalised latents (B, T, R) and rotated keys (B, T, P), of the dtype of kv. Computes in float32 or float64."""
    wide = kv.astype(jnp.promote_types(kv.dtype, jnp.float32))
    latent, key = wide[..., :-ROPE], wide[..., -ROPE:]
    latent = latent * jax.lax.rsqrt(jnp.mean(latent**2, -1, keepdims=True) + eps)
    latent = latent.astype(kv.dtype) * norm.astype(kv.dtype)  # rounded before it is scaled, as the weights were trained
    key = key * per_element(cos, interleave) + partner(key, interleave) * per_element(sin, interleave)
    return latent, key.astype(kv.dtype)


def cache_update(
    cache: jax.Array | SplitCache,
    kv: jax.Array,
    norm: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    block_tables: jax.Array,
    lengths: jax.Array,
    *,
    eps: float,
    interleave: bool,
) -> jax.Array | SplitCache:
    """See `api.cache_update`."""
    latent, key = new_entries(kv, norm, cos, sin, eps=eps, interleave=interleave)
    parts = cache if isinstance(cache, SplitCache) else split(cache)
    page, slot = slots(block_tables, lengths, kv.shape[1], parts.latent.shape[1])
    page = jnp.where(page < 0, parts.latent.shape[0], page)  # past the end, where writes are dropped

    def put(to: jax.Array, new: jax.Array) -> jax.Array:
        return to.at[page, slot].set(new.astype(to.dtype), mode="drop")

    scales = parts.scales
    if scales is not None:
        latent, scale = quantise_latent(latent)
        scales = put(scales, scale)
    packed = parts.packed
    rope = jnp.concatenate(jnp.split(parts.rope, 2, axis=-1), axis=1) if packed else parts.rope
    new = SplitCache(put(parts.latent, latent), put(rope, key), scales)
    if not isinstance(cache, SplitCache):
        return join(new)
    return pack(new) if packed else new
