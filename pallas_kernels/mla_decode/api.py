"""The public function of MLA decoding: validates arguments, and chooses a backend by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import require_hopper, require_tpu
from pallas_kernels.mla_decode import blockwise, gpu, reference, tpu
from pallas_kernels.mla_decode.cache import ROPE, SplitCache, check_split, join, split
from pallas_kernels.mla_decode.schedule import Plan

IMPLEMENTATIONS = ("reference", "blockwise", "gpu", "gpu_interpret", "tpu", "tpu_interpret")


def mla_decode(
    q: jax.Array,
    cache: jax.Array | SplitCache,
    block_tables: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    implementation: str,
    schedule: Plan | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends from the last `T` tokens of each sequence to its cached latents (absorbed MLA, report eq. 9 and 10).

    Args:
      q: (B, T, H, R + P): queries, absorbed into the latent space (R), followed by their rotated part (P). The new
        tokens are the last ones of each sequence, and token t attends to keys before `lengths - T + t + 1`.
      cache: (pages, page size, R + P), `q`'s dtype: the normalised latent of a token, followed by its rotated key; or a
        `SplitCache` of the same, whose latents may be FP8 (on TPUs: in pages of 256 or 512). TPUs require a packed
        `SplitCache`, GPUs an unpacked one, "blockwise" an unpacked one without FP8.
      block_tables: (B, max pages) int32: the pages of a sequence, in order. Entries beyond its length, and slots beyond
        it in its last page, are never read; but for "blockwise" those slots must hold finite numbers.
      lengths: (B,) int32: tokens of each sequence in the cache, including the new ones. May be 0.
      scale: factor of the scores.
      implementation: "reference" (plain; any cache), "blockwise" (plain JAX for CPUs, a few pages at a time, in any
        dtype; `blockwise.mla_decode` takes any R and P), "gpu" (Hopper: bfloat16 queries, R = 512, P = 64, pages of
        64), "tpu" (bfloat16 queries, R a multiple of 128, P = 64, pages of 32 to 512). "gpu_interpret" and
        "tpu_interpret" run these on a CPU, slowly and with race detection, for tests.
      schedule: the distribution of work, from `schedule.plan`; by default computed from the lengths. It depends on
        nothing else, so that all layers of a model can share one.

    Returns:
      The outputs in the latent space, (B, T, H, R) of the dtype of `q`, and the log-sum-exp of the scaled scores, (B,
      T, H) float32. They are 0 and -inf for a token without keys.

    Raises:
      ValueError: shapes or dtypes are inconsistent or unsupported, or there is no such implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"no MLA decoding {implementation!r}: there are {', '.join(IMPLEMENTATIONS)}")
    backend = implementation.split("_")[0]
    if isinstance(cache, SplitCache):
        shape, dtype = check_split(cache)
        packed = cache.packed
    else:
        shape, dtype, packed = cache.shape, cache.dtype, False
    if backend != "reference" and packed != (backend == "tpu"):
        raise ValueError(
            f"mla_decode takes a packed SplitCache on TPUs and no packed one elsewhere, but got {type(cache).__name__} "
            f"{shape}, packed: {packed}"
        )
    if backend == "blockwise" and isinstance(cache, SplitCache) and cache.scales is not None:
        raise ValueError("mla_decode by blockwise takes no FP8 latents: reference does")
    if q.ndim != 4 or len(shape) != 3 or q.shape[3] != shape[2] or q.shape[3] <= ROPE:
        raise ValueError(
            f"mla_decode needs queries (B, T, H, R + P) and a cache (pages, page size, R + P) with P = "
            f"{ROPE}, but got {q.shape} and {shape}"
        )
    batch = q.shape[0]
    if block_tables.ndim != 2 or block_tables.shape[0] != batch or lengths.shape != (batch,):
        raise ValueError(
            f"mla_decode of {batch} sequences needs block_tables ({batch}, max pages) and lengths ({batch},), "
            f"but got {block_tables.shape} and {lengths.shape}"
        )
    if q.dtype != dtype or block_tables.dtype != jnp.int32 or lengths.dtype != jnp.int32:
        raise ValueError(
            "mla_decode needs queries and cache of one dtype, int32 block_tables and lengths, but got "
            f"{q.dtype}, {dtype}, {block_tables.dtype} and {lengths.dtype}"
        )
    if backend == "reference":
        plain = join(cache) if isinstance(cache, SplitCache) else cache
        return reference.mla_decode(q, plain, block_tables, lengths, scale=scale)
    if backend == "blockwise":
        parts = cache if isinstance(cache, SplitCache) else split(cache)
        return blockwise.mla_decode(q, parts, block_tables, lengths, scale=scale)
    if implementation == "gpu":
        require_hopper("mla_decode")
    if implementation == "tpu":
        require_tpu("mla_decode")
    module: Any = {"gpu": gpu, "tpu": tpu}[backend]
    interpret = module.INTERPRET if implementation.endswith("_interpret") else None
    how = dict(scale=scale, schedule=schedule, interpret=interpret)
    out: tuple[jax.Array, jax.Array] = module.mla_decode(q, cache, block_tables, lengths, **how)
    return out
