"""MLA decoding in plain JAX, one block of pages at a time, for CPUs.

On a CPU memory decides. All pages of all texts at once would be a copy larger than the processor's caches, in memory
that the allocator maps anew for each call. Here the pages of a block are copied into the caches, both products take
them from there, and the softmax is the online one of FlashAttention-2 (Dao, 2023). As many blocks are read as the
longest text has.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mla_decode.cache import SplitCache

BLOCK = 8 * 1024 * 1024
"""Largest number of bytes of a block's keys and scores, if it has more than one page of each text."""
LOWEST = -1e30
"""Where the running maximum starts. Finite, so that queries that see nothing don't compute inf - inf."""


def mla_decode(
    q: jax.Array, cache: SplitCache, block_tables: jax.Array, lengths: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """See `api.mla_decode`. Sums are in float32, or in float64 if the inputs are."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    batch, tokens, heads, width = q.shape
    _, size, rank = cache.latent.shape
    rows = tokens * heads
    count = _pages_per_block(block_tables.shape[1], batch * size * (width * q.dtype.itemsize + rows * wide.itemsize))
    queries = q.reshape(batch, rows, width)
    ends = jnp.repeat(lengths[:, None] - tokens + 1 + jnp.arange(tokens, dtype=jnp.int32), heads, axis=1)
    used = jnp.arange(block_tables.shape[1]) * size < lengths[:, None]
    tables = jnp.pad(jnp.where(used, block_tables, 0), ((0, 0), (0, -block_tables.shape[1] % count)))

    def block(i: jax.Array, state: Any) -> Any:
        top, total, out = state
        table = lax.dynamic_slice_in_dim(tables, i * count, count, axis=1)
        latent, rope = _read(cache.latent, table), _read(cache.rope, table)
        scores = jnp.einsum("bmr,bsr->bms", queries[..., :rank], latent, preferred_element_type=wide)
        scores += jnp.einsum("bmp,bsp->bms", queries[..., rank:], rope, preferred_element_type=wide)
        place = i * count * size + jnp.arange(count * size, dtype=jnp.int32)
        scores = jnp.where(place < ends[..., None], scores * scale, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        fade = jnp.exp(top - new_top)
        more = jnp.einsum("bms,bsr->bmr", weights.astype(latent.dtype), latent, preferred_element_type=wide)
        return new_top, fade * total + jnp.sum(weights, axis=-1), fade[..., None] * out + more

    zeros = jnp.zeros((batch, rows), wide)
    state = zeros + LOWEST, zeros, jnp.zeros((batch, rows, rank), wide)
    if count == tables.shape[1]:
        state = block(jnp.int32(0), state)
    else:
        state = lax.fori_loop(0, -(-jnp.max(lengths) // (count * size)), block, state)
    top, total, out = state
    seen = total > 0
    total = jnp.where(seen, total, 1)
    lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)
    out = (out / total[..., None]).astype(q.dtype)
    return out.reshape(batch, tokens, heads, rank), lse.reshape(batch, tokens, heads)


def _pages_per_block(pages: int, page_bytes: int) -> int:
    """Pages of each text in a block: the same number in all blocks, or nearly."""
    blocks = -(-pages // max(1, BLOCK // page_bytes))
    return -(-pages // blocks)


def _read(pages: jax.Array, table: jax.Array) -> jax.Array:
    """The pages (pages, size, W) of a table (B, n) as (B, n size, W)."""
    _, size, width = pages.shape
    # By whole pages, as rows: XLA copies one quickly, and several rows of a page element by element.
    flat = pages.reshape(-1, size * width)
    read = flat.at[table.reshape(-1)].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return read.reshape(len(table), -1, width)
