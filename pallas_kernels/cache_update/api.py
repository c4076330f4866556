"""The public function of the cache update: validates arguments, and chooses a backend by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cache_update import gpu, reference, tpu
from pallas_kernels.devices import require_hopper, require_tpu
from pallas_kernels.mla_decode.cache import ROPE, SplitCache, check_split

IMPLEMENTATIONS = ("reference", "gpu", "gpu_interpret", "tpu", "tpu_interpret")
MOST_TOKENS = 4


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
    implementation: str,
) -> jax.Array | SplitCache:
    """Normalises latents of new tokens, rotates their keys, and writes both to a paged cache (report eq. 1 and 3).

    Args:
      cache: (pages, page size, R + P), or a `SplitCache`. Latents may be FP8. "reference" supports every form; "gpu" (R
        = 512, pages of 64) unpacked ones; "tpu" (R a multiple of 128) packed ones, with pages of a multiple of 32, or
        of 128 with FP8 latents.
      kv: (B, T, R + P), bfloat16 except for "reference": the output of kv_a_proj for the last T <= 4 tokens of each
        sequence, the raw latent followed by the raw key.
      norm: (R,), the scale of the norm. eps: its epsilon.
      cos, sin: (B, T, P / 2) float32, at the tokens' positions, including RoPE's scaling.
      block_tables: (B, max pages) int32, as in `mla_decode`.
      lengths: (B,) int32: tokens of each sequence, including the new ones. Token t is written to position lengths - T +
        t, or not at all if that is negative.
      interleave: a pair of RoPE is two neighbours (as in the released weights), or an element of the first half and its
        twin in the second.
      implementation: "reference", "gpu" (Hopper), "tpu"; "gpu_interpret" and "tpu_interpret" run these on a CPU,
        slowly.

    Returns:
      The cache, otherwise unchanged. Under `jit` with `cache` donated, nothing is copied.

    Raises:
      ValueError: shapes or dtypes are inconsistent or unsupported, or there is no such implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"no cache update {implementation!r}: there are {', '.join(IMPLEMENTATIONS)}")
    backend = implementation.split("_")[0]
    if isinstance(cache, SplitCache):
        shape, packed = check_split(cache)[0], cache.packed
    else:
        shape, packed = cache.shape, False
    if backend != "reference" and packed != (backend == "tpu"):
        raise ValueError(f"cache_update takes a packed SplitCache on TPUs and no packed one on GPUs, but got {shape}")
    if kv.ndim != 3 or len(shape) != 3 or kv.shape[2] != shape[2] or kv.shape[2] <= ROPE:
        raise ValueError(
            f"cache_update needs kv (B, T, R + P) and a cache (pages, page size, R + P) with P = {ROPE}, but got "
            f"{kv.shape} and {shape}"
        )
    batch, tokens, width = kv.shape
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"cache_update takes 1 to {MOST_TOKENS} new tokens per sequence, but got {tokens}")
    expected = (width - ROPE,), (batch, tokens, ROPE // 2), (batch, tokens, ROPE // 2), (batch,)
    given = norm.shape, cos.shape, sin.shape, lengths.shape
    if given != expected or block_tables.ndim != 2 or len(block_tables) != batch:
        raise ValueError(
            f"cache_update of kv {kv.shape} needs norm, cos, sin and lengths {expected} and block_tables ({batch}, max "
            f"pages), but got {given} and {block_tables.shape}"
        )
    if block_tables.dtype != jnp.int32 or lengths.dtype != jnp.int32:
        raise ValueError(
            f"cache_update needs int32 block_tables and lengths, but got {block_tables.dtype} and {lengths.dtype}"
        )
    arguments = cache, kv, norm, cos, sin, block_tables, lengths
    if backend == "reference":
        return reference.cache_update(*arguments, eps=eps, interleave=interleave)
    if implementation == "gpu":
        require_hopper("cache_update")
    if implementation == "tpu":
        require_tpu("cache_update")
    module: Any = {"gpu": gpu, "tpu": tpu}[backend]
    interpret = module.INTERPRET if implementation.endswith("_interpret") else None
    updated: jax.Array | SplitCache = module.cache_update(
        *arguments, eps=eps, interleave=interleave, interpret=interpret
    )
    return updated
