"""The cache update on TPUs (Mosaic TPU): one grid step per sequence fetches, changes and writes back whole pages.

Memory is tiled by 16 rows of bfloat16, so that a single token's row can't be written. The last tokens of a sequence lie
in one page, or in two. XLA puts each rotated element's partner beside it beforehand, and everything rotated twice,
for the two halves of a row that rope keys of two tokens share.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cache_update.reference import partner, per_element
from pallas_kernels.mla_decode.cache import FP8_MAX, ROPE, SplitCache

LANES = 128
INTERPRET = pltpu.InterpretParams(
    detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan", out_of_bounds_reads="raise"
)


def cache_update(
    cache: SplitCache,
    kv: jax.Array,
    norm: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    block_tables: jax.Array,
    lengths: jax.Array,
    *,
    eps: float,
    interleave: bool,
    interpret: pltpu.InterpretParams | None = None,
) -> SplitCache:
    """See `api.cache_update`. `interpret` runs it on a CPU, slowly."""
    (_, page_size, rank), (batch, tokens, _) = cache.latent.shape, kv.shape
    scaled = cache.scales is not None
    multiple = LANES if scaled else 32
    if rank % LANES or page_size % multiple or kv.dtype != jnp.bfloat16 or cache.rope.dtype != jnp.bfloat16:
        raise ValueError(
            f"cache_update on TPUs takes bfloat16, latents of a multiple of {LANES} and pages of a multiple of "
            f"{multiple} tokens, but got {kv.dtype}, a {cache.rope.dtype} cache, {rank} and {page_size}"
        )
    key = kv[..., rank:].astype(jnp.float32)
    factors = key, per_element(cos, interleave), partner(key, interleave), per_element(sin, interleave)
    twice = lambda x: jnp.concatenate([x, x], -1)

    def of_sequence(columns):
        return pl.BlockSpec((1, tokens, columns), lambda i, *_: (i, 0, 0))

    # A row of scales of its own for each page, as the copies want.
    pages = [cache.latent, cache.rope, *([cache.scales[:, None]] if scaled else [])]
    anywhere = [pl.BlockSpec(memory_space=pl.ANY) for _ in pages]
    updated = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, page_size=page_size, eps=eps, parts=len(pages)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pages],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch,),
            in_specs=[
                of_sequence(rank), *(of_sequence(LANES) for _ in factors),
                pl.BlockSpec((1, rank), lambda i, *_: (0, 0)), *anywhere,
            ],
            out_specs=anywhere,
            scratch_shapes=[*(pltpu.VMEM(x.shape[1:], x.dtype) for x in pages), pltpu.SemaphoreType.DMA((len(pages),))],
        ),
        input_output_aliases={8 + i: i for i in range(len(pages))},  # counted with the prefetched scalars
        interpret=interpret or False,
    )(
        block_tables, lengths, kv[..., :rank].astype(jnp.float32), *map(twice, factors),
        norm.astype(jnp.bfloat16).astype(jnp.float32)[None], *pages,
    )  # fmt: skip
    return SplitCache(updated[0], updated[1], updated[2][:, 0] if scaled else None)


def _kernel(table, lengths, kv, key, cos, other, sin, norm, *refs, tokens, page_size, eps, parts):
    hbm, vmem, done = refs[parts : 2 * parts], refs[2 * parts : -1], refs[-1]
    sequence = pl.program_id(0)
    first = lengths[sequence] - tokens  # position of the first new token, perhaps negative
    last = lengths[sequence] - 1
    half = page_size // 2
    latent = kv[0] * lax.rsqrt(jnp.mean(kv[0] ** 2, axis=1, keepdims=True) + eps)
    latent = (latent.astype(jnp.bfloat16).astype(jnp.float32) * norm[...]).astype(jnp.bfloat16).astype(jnp.float32)
    new = [latent, key[0] * cos[0] + other[0] * sin[0]]
    if parts == 3:  # as `quantise_latent`
        largest = jnp.max(jnp.abs(latent), axis=1, keepdims=True)
        scale = jnp.where(largest == 0, 1, largest / FP8_MAX)
        new = [latent / scale, new[1], scale]

    def copy_all(to_vmem, number):
        pairs = [(h.at[table[sequence, number]], v) for h, v in zip(hbm, vmem, strict=True)]
        copies = [pltpu.make_async_copy(*(pair if to_vmem else pair[::-1]), done.at[i]) for i, pair in enumerate(pairs)]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()

    def update(number):
        copy_all(True, number)
        for i, ref in enumerate(vmem):
            page = ref[...].astype(jnp.float32)
            row, column = (lax.broadcasted_iota(jnp.int32, page.shape, d) for d in range(2))
            here = [row, row + column // ROPE * half, column][i]  # the slot of each element
            for t in range(tokens):
                slot = first + t - number * page_size  # outside the page where it isn't the token's
                page = jnp.where(here == slot, new[i][t : t + 1], page)
            ref[...] = page.astype(ref.dtype)
        copy_all(False, number)

    first_page = jnp.maximum(first, 0) // page_size
    pl.when(last >= 0)(lambda: update(first_page))
    pl.when((last >= 0) & (last // page_size > first_page))(lambda: update(last // page_size))
