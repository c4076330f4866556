"""Formats of a paged latent cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ROPE = 64
"""Width of the rotated part of queries and keys (qk_rope_head_dim)."""
FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""


class SplitCache(NamedTuple):
    """A paged cache with separate arrays for latents and rope keys.

    latent: (pages, page size, R), bfloat16 or float8_e4m3fn.
    rope: (pages, page size, 64) bfloat16; packed, for TPUs, (pages, page size / 2, 128): see `pack_rope`.
    scales: (pages, page size) float32: scale of each token's FP8 latent. None for bfloat16.
    """

    latent: jax.Array
    rope: jax.Array
    scales: jax.Array | None = None

    @property
    def packed(self) -> bool:
        """Whether the rope keys of two tokens share a row."""
        return self.rope.shape[-1] == 2 * ROPE


def split(cache: jax.Array) -> SplitCache:
    """Splits a cache (pages, page size, R + 64) in its parts."""
    return SplitCache(cache[..., :-ROPE], cache[..., -ROPE:])


def join(cache: SplitCache) -> jax.Array:
    """The inverse of `split`, for every format: (pages, page size, R + 64), float32 if latents are FP8."""
    latent, rope, scales = cache
    if scales is not None:
        latent, rope = latent.astype(jnp.float32) * scales[..., None], rope.astype(jnp.float32)
    if cache.packed:
        rope = jnp.concatenate(jnp.split(rope, 2, axis=-1), axis=1)
    return jnp.concatenate([latent, rope], axis=-1)


def pack(cache: SplitCache) -> SplitCache:
    """Packs the rope keys of two tokens per row for TPUs, whose memory is tiled by 128 columns."""
    return cache._replace(rope=pack_rope(cache.rope))


def pack_rope(rope: jax.Array) -> jax.Array:
    """(pages, page size, 64) -> (pages, page size / 2, 128): token i beside token i + page size / 2."""
    return jnp.concatenate(jnp.split(rope, 2, axis=1), axis=-1)


def quantise(cache: SplitCache) -> SplitCache:
    """Quantises latents to FP8, each scaled by its largest magnitude. Rope keys are unchanged."""
    values, scales = quantise_latent(cache.latent)
    return SplitCache(values, cache.rope, scales)


def quantise_latent(latent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises (..., R) to float8_e4m3fn (..., R) and float32 scales (...). The scale of a zero token is 1."""
    wide = latent.astype(jnp.float32)
    largest = jnp.abs(wide).max(-1)
    scales = jnp.where(largest == 0, 1, largest / FP8_MAX)
    return (wide / scales[..., None]).astype(jnp.float8_e4m3fn), scales


def check_split(cache: SplitCache) -> tuple[tuple[int, ...], Any]:
    """Returns the shape of the same cache in one array, and the dtype of queries for it.

    Raises ValueError if its parts are inconsistent.
    """
    latent, rope, scales = cache
    if latent.ndim != 3 or rope.shape not in (
        (*latent.shape[:2], ROPE),
        (latent.shape[0], latent.shape[1] // 2, 2 * ROPE),
    ):
        raise ValueError(
            "a SplitCache needs latents (pages, page size, R) and ropes (pages, page size, 64) or packed (pages, page "
            f"size / 2, 128), but got {latent.shape} and {rope.shape}"
        )
    if (latent.dtype == jnp.float8_e4m3fn) != (scales is not None) or (scales is None and rope.dtype != latent.dtype):
        raise ValueError(
            "a SplitCache needs latents and ropes of one dtype, or float8_e4m3fn latents with scales, but got "
            f"{latent.dtype} and {rope.dtype} {'without' if scales is None else 'with'} scales"
        )
    if scales is not None and (scales.shape != latent.shape[:2] or scales.dtype != jnp.float32):
        raise ValueError(
            f"a SplitCache needs float32 scales {latent.shape[:2]}, one per token: got {scales.dtype} {scales.shape}"
        )
    return (*latent.shape[:2], latent.shape[2] + ROPE), rope.dtype
