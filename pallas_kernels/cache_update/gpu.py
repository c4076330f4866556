"""The cache update on GPUs (Mosaic GPU): a thread block of one warpgroup a token.

A row of the cache is put together in shared memory and goes out as one copy, which can't be done from registers: 576 is
no multiple of 128 threads. XLA puts each rotated element's partner beside it beforehand.

Not several tokens per thread block: the reductions of all its warpgroups would share one place in shared memory, and
the compiler doesn't say so.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cache_update.reference import partner, per_element, slots
from pallas_kernels.mla_decode.cache import FP8_MAX, ROPE, SplitCache, check_split

RANK, PAGE, LANES = 512, 64, 128
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


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
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array | SplitCache:
    """See `api.cache_update`. `interpret` runs it on a CPU, slowly."""
    parts = tuple(x for x in cache if x is not None) if isinstance(cache, SplitCache) else (cache,)
    shape, dtype = check_split(cache) if isinstance(cache, SplitCache) else (cache.shape, cache.dtype)
    rank, page_size = kv.shape[-1] - ROPE, shape[1]
    if (rank, page_size) != (RANK, PAGE) or (kv.dtype, dtype) != (jnp.bfloat16, jnp.bfloat16):
        raise ValueError(
            f"cache_update on GPUs takes bfloat16, latents of {RANK} and pages of {PAGE} tokens, but got {kv.dtype}, a "
            f"{dtype} cache, latents of {rank} and pages of {page_size}"
        )
    batch, tokens, _ = kv.shape
    rows = batch * tokens
    page, slot = slots(block_tables, lengths, tokens, page_size)
    where = jnp.stack([page, slot], -1).reshape(rows, 2)
    key = kv[..., RANK:].astype(jnp.float32)
    factors = (key, per_element(cos, interleave), partner(key, interleave), per_element(sin, interleave))
    scale = norm.astype(jnp.bfloat16).astype(jnp.float32)
    wide = lambda x: jnp.pad(x.reshape(rows, ROPE), ((0, 0), (0, LANES - ROPE)))

    def run(refs):
        plgpu.kernel(
            functools.partial(_kernel, eps=eps),
            grid=(rows,),
            grid_names=("row",),
            scratch_types=dict(
                row_smem=plgpu.SMEM((RANK + LANES,), jnp.bfloat16),
                fp8_smem=plgpu.SMEM((RANK,), jnp.float8_e4m3fn) if len(parts) == 3 else None,
            ),
            interpret=interpret,
        )(kv[..., :RANK].reshape(rows, RANK), *map(wide, factors), scale, where, *refs)

    updated = pl.run_state(run)(parts)  # in place
    return SplitCache(*updated) if isinstance(cache, SplitCache) else updated[0]


def _kernel(
    latent_gmem, key_gmem, cos_gmem, partner_gmem, sin_gmem, norm_gmem, where_gmem, *cache_gmem, row_smem, fp8_smem, eps
):
    row = lax.axis_index("row")
    page, slot = where_gmem[row, 0], where_gmem[row, 1]

    @pl.when(page >= 0)
    def _():
        latent = latent_gmem[row].astype(jnp.float32)
        latent = latent * lax.rsqrt(jnp.sum(latent * latent) / RANK + eps)
        latent = latent.astype(jnp.bfloat16).astype(jnp.float32) * norm_gmem[...]  # rounded as in the reference
        latent = latent.astype(jnp.bfloat16)
        key = key_gmem[row] * cos_gmem[row] + partner_gmem[row] * sin_gmem[row]
        row_smem[pl.ds(0, RANK)] = latent
        row_smem[pl.ds(RANK, LANES)] = key.astype(jnp.bfloat16)  # of which the second half is nothing
        if fp8_smem is not None:
            latent = latent.astype(jnp.float32)
            largest = jnp.max(jnp.abs(latent))
            factor = jnp.where(largest == 0, 1.0, largest / FP8_MAX)
            fp8_smem[...] = (latent / factor).astype(jnp.float8_e4m3fn)
            cache_gmem[2][page, slot] = factor
        plgpu.commit_smem()
        if len(cache_gmem) == 1:
            plgpu.copy_smem_to_gmem(row_smem.at[pl.ds(0, RANK + ROPE)], cache_gmem[0].at[page, slot])
        else:
            new = row_smem.at[pl.ds(0, RANK)] if fp8_smem is None else fp8_smem
            plgpu.copy_smem_to_gmem(new, cache_gmem[0].at[page, slot])
            plgpu.copy_smem_to_gmem(row_smem.at[pl.ds(RANK, ROPE)], cache_gmem[1].at[page, slot])
        plgpu.wait_smem_to_gmem(0)
