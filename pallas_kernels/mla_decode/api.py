"""The one entry to MLA decoding: checks the arguments, chooses a backend by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import require_hopper, require_tpu
from pallas_kernels.mla_decode import gpu, reference, tpu
from pallas_kernels.mla_decode.cache import ROPE, SplitCache, check_split, join
from pallas_kernels.mla_decode.schedule import Plan

IMPLEMENTATIONS = ("reference", "gpu", "gpu_interpret", "tpu", "tpu_interpret")


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
      q: (B, T, H, R + P): a head's query, absorbed into the latent space (R) beside its rotated part (P). The new
        tokens are the sequence's last ones, and token t sees the keys before `lengths - T + t + 1`.
      cache: (pages, page size, R + P), `q`'s dtype: a token's latent (after its norm) beside its rotated key; or a
        `SplitCache` of the same, whose latents may be FP8 (on TPUs: in pages of 256 or 512). TPUs take packed
        `SplitCache`s only, GPUs no packed ones.
      block_tables: (B, max pages) int32: the pages of a sequence, in order. Entries past its length are never
        read, nor are slots past it in its last page: either may hold anything.
      lengths: (B,) int32: tokens of each sequence in the cache, the new ones included. May be 0.
      scale: what multiplies the scores.
      implementation: "reference" (plain; any cache), "gpu" (Hopper: bfloat16 queries, R = 512, P = 64, pages of 64),
        "tpu" (bfloat16 queries, R a multiple of 128, P = 64, pages of 32 to 512). "gpu_interpret" and "tpu_interpret"
        run these on a CPU, slowly, and look for races: for tests.
      schedule: how the work is shared out, by `schedule.plan`; worked out from the lengths if None. It depends on
        nothing else, so that the layers of a model can share one.

    Returns:
      The heads' outputs in the latent space, (B, T, H, R) of `q`'s dtype, and the log-sum-exp of their scaled scores,
      (B, T, H) float32. A token that sees no key has 0 and -inf.

    Raises:
      ValueError: shapes or dtypes don't fit together or the backend, or there is no such implementation.
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
            f"mla_decode takes a packed SplitCache on TPUs and no packed one on GPUs, but got {type(cache).__name__} "
            f"{shape}, packed: {packed}"
        )
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
    if implementation == "gpu":
        require_hopper("mla_decode")
    if implementation == "tpu":
        require_tpu("mla_decode")
    module: Any = {"gpu": gpu, "tpu": tpu}[backend]
    interpret = module.INTERPRET if implementation.endswith("_interpret") else None
    how = dict(scale=scale, schedule=schedule, interpret=interpret)
    out: tuple[jax.Array, jax.Array] = module.mla_decode(q, cache, block_tables, lengths, **how)
    return out
