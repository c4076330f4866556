"""The cache update on TPUs (Mosaic TPU): a grid step a sequence, which fetches, changes and writes back whole pages.

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
from pallas_kernels.mla_decode.cache import ROPE, SplitCache

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
    if rank % LANES or page_size % 32 or kv.dtype != jnp.bfloat16 or cache.latent.dtype != jnp.bfloat16:
        raise ValueError(
            f"cache_update on TPUs takes bfloat16, latents of a multiple of {LANES} and pages of a multiple of 32 "
            f"tokens, but got {kv.dtype}, a {cache.latent.dtype} cache, {rank} and {page_size}"
        )
    key = kv[..., rank:].astype(jnp.float32)
    factors = key, per_element(cos, interleave), partner(key, interleave), per_element(sin, interleave)
    twice = lambda x: jnp.concatenate([x, x], -1)

    def of_sequence(columns):
        return pl.BlockSpec((1, tokens, columns), lambda i, *_: (i, 0, 0))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    latent, rope = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, page_size=page_size, eps=eps),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache[:2]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch,),
            in_specs=[
                of_sequence(rank), *(of_sequence(LANES) for _ in factors),
                pl.BlockSpec((1, rank), lambda i, *_: (0, 0)), anywhere, anywhere,
            ],
            out_specs=(anywhere, anywhere),
            scratch_shapes=[
                pltpu.VMEM((page_size, rank), jnp.bfloat16),
                pltpu.VMEM((page_size // 2, LANES), jnp.bfloat16),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        input_output_aliases={8: 0, 9: 1},  # counted with the prefetched scalars
        interpret=interpret or False,
    )(
        block_tables, lengths, kv[..., :rank].astype(jnp.float32), *map(twice, factors),
        norm.astype(jnp.bfloat16).astype(jnp.float32)[None], cache.latent, cache.rope,
    )  # fmt: skip
    return SplitCache(latent, rope)


def _kernel(
    table, lengths, kv, key, cos, other, sin, norm, _latent_in, _rope_in, latent_hbm, rope_hbm,
    latents, ropes, done, *, tokens, page_size, eps,
):  # fmt: skip
    sequence = pl.program_id(0)
    first = lengths[sequence] - tokens  # position of the first new token, perhaps negative
    last = lengths[sequence] - 1
    half = page_size // 2
    new = kv[0] * lax.rsqrt(jnp.mean(kv[0] ** 2, axis=1, keepdims=True) + eps)
    new = new.astype(jnp.bfloat16).astype(jnp.float32) * norm[...]  # rounded as in the reference
    rotated = key[0] * cos[0] + other[0] * sin[0]

    def update(number):
        page = table[sequence, number]
        here = latent_hbm.at[page], rope_hbm.at[page]
        there = latents, ropes

        def both(copies):
            for copy in copies:
                copy.start()
            for copy in copies:
                copy.wait()

        both([pltpu.make_async_copy(a, b, done.at[i]) for i, (a, b) in enumerate(zip(here, there, strict=True))])
        latent, rope = latents[...].astype(jnp.float32), ropes[...].astype(jnp.float32)
        row, rope_row = (lax.broadcasted_iota(jnp.int32, x.shape, 0) for x in (latent, rope))
        side = lax.broadcasted_iota(jnp.int32, rope.shape, 1) // ROPE
        for t in range(tokens):
            slot = first + t - number * page_size  # outside the page where it isn't the token's
            latent = jnp.where(row == slot, new[t : t + 1], latent)
            rope = jnp.where(rope_row + side * half == slot, rotated[t : t + 1], rope)
        latents[...], ropes[...] = latent.astype(latents.dtype), rope.astype(ropes.dtype)
        both([pltpu.make_async_copy(b, a, done.at[i]) for i, (a, b) in enumerate(zip(here, there, strict=True))])

    first_page = jnp.maximum(first, 0) // page_size
    pl.when(last >= 0)(lambda: update(first_page))
    pl.when((last >= 0) & (last // page_size > first_page))(lambda: update(last // page_size))
