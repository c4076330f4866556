"""Well-kept attention kernels of others that take queries and keys wider than values, fitted to our arguments.

Both want one key a head, so that the rope key is copied to every head in memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

TILE = 64
"""With a mask, tokamax's gradient for Hopper takes multiples of so many tokens and keys."""


def _joined(q_nope, q_rope, k_nope, k_rope):
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    return jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, k_rope], -1)


def causal_mask(tokens: int, keys: int, segments: jax.Array | None) -> jax.Array | None:
    """(B or 1, 1, T, S), or None where plain causal masking from the upper left corner says it all."""
    if segments is None and tokens == keys:
        return None
    mask = (jnp.arange(keys) <= keys - tokens + jnp.arange(tokens)[:, None])[None, None]
    if segments is not None:
        mask &= (segments[:, None, :] == segments[:, keys - tokens :, None])[:, None]
    return mask


def tokamax(q_nope, q_rope, k_nope, k_rope, v, *, scale, segments=None):
    """tokamax's Mosaic GPU flash attention. Differentiable."""
    from tokamax import dot_product_attention  # a dependency of this choice only

    q, k = _joined(q_nope, q_rope, k_nope, k_rope)
    tokens = q.shape[1]
    mask = causal_mask(tokens, k.shape[1], segments)
    if mask is not None:
        q, k, v, mask = _whole_tiles(q, k, v, mask)
    attend = functools.partial(dot_product_attention, scale=scale, implementation="mosaic_gpu")
    return attend(q, k, v, mask=mask, is_causal=mask is None)[:, :tokens]


def _whole_tiles(q, k, v, mask):
    """Filled up to multiples of `TILE` tokens and keys. No token sees the new keys; what new tokens see is dropped."""
    fill = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, 0)))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, -mask.shape[2] % TILE), (0, 0)), constant_values=True)
    return fill(q), fill(k), fill(v), jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, -mask.shape[3] % TILE)))


def splash(q_nope, q_rope, k_nope, k_rope, v, *, scale, segments=None, interpret=False):
    """JAX's splash attention for TPUs. Differentiable."""
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    q, k = _joined(q_nope, q_rope, k_nope, k_rope)
    tokens, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # it has no scale of its own
    bq, bkv = (next(b for b in (512, 256, 128) if n % b == 0) for n in (tokens, keys))
    blocks = lib.BlockSizes(block_q=bq, block_kv=bkv, block_q_dkv=bq, block_kv_dkv=bkv, block_q_dq=bq, block_kv_dq=bkv)
    mask = lib.MultiHeadMask([lib.CausalMask((tokens, keys), offset=keys - tokens)] * heads)
    kernel = lib.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    if segments is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        ids = lib.SegmentIds(q=segments[:, keys - tokens :], kv=segments)
        out = jax.vmap(functools.partial(kernel))(q, k, v, ids)
    return jnp.swapaxes(out, 1, 2)
