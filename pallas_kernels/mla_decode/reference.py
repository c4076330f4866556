"""Reference of MLA decoding over a paged latent cache: gather the pages, mask, softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.mla_decode.cache import ROPE


def mla_decode(
    q: jax.Array, cache: jax.Array, block_tables: jax.Array, lengths: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """See `api.mla_decode`. Computes in float32, or in float64 if the inputs are."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    batch, tokens, _, width = q.shape
    page_size = cache.shape[1]
    rank = width - ROPE
    position = jnp.arange(block_tables.shape[1] * page_size)
    used = position < lengths[:, None]  # (B, S)
    # Neither an unused table entry nor an unused slot may matter, whatever they hold.
    table = jnp.where(used[:, ::page_size], block_tables, 0)
    keys = jnp.where(used[..., None], cache[table].reshape(batch, -1, width), 0).astype(wide)

    scores = jnp.einsum("bthd,bsd->bths", q.astype(wide), keys, precision="highest") * scale
    visible = position < (lengths[:, None] - tokens + 1 + jnp.arange(tokens))[..., None]  # (B, T, S)
    scores = jnp.where(visible[:, :, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(visible[:, :, None], jnp.exp(scores - jnp.where(jnp.isinf(lse), 0, lse)[..., None]), 0)
    out = jnp.einsum("bths,bsr->bthr", weights, keys[..., :rank], precision="highest")
    return out.astype(q.dtype), lse.astype(wide)
