"""MLA decoding on TPUs (Mosaic TPU): one grid step a piece of a sequence, pages fetched by double-buffered DMAs.

TPU memory is tiled by 128 columns, so that a cache of width 576 would occupy 640. A packed `SplitCache` wastes nothing:
latents lie apart from rope keys, and the rope keys of tokens i and i + page size / 2 share a row of 128. The kernel
keeps that order. It fetches the pages' lower and upper halves of tokens into a buffer each, and multiplies the rows
of rope keys by the rotated queries twice, once beside zeros on the right and once beside zeros on the left.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_decode.cache import ROPE, SplitCache
from pallas_kernels.mla_decode.schedule import Plan, merge, plan

LANES = 128
BLOCK = 512  # tokens that are worked on at a time
CORES = 2  # of a v5p or tpu7x chip; further pieces for them to share
MASKED = -1e30
INTERPRET = pltpu.InterpretParams(
    detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan", out_of_bounds_reads="raise"
)


def mla_decode(
    q: jax.Array,
    cache: SplitCache,
    block_tables: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    schedule: Plan | None = None,
    interpret: pltpu.InterpretParams | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.mla_decode`. `interpret` runs it on a CPU, slowly."""
    batch, tokens, heads, width = q.shape
    rank = width - ROPE
    page_size = cache.latent.shape[1]
    if rank % LANES or page_size % 32 or BLOCK % page_size or q.dtype != jnp.bfloat16:
        raise ValueError(
            f"mla_decode on TPUs takes bfloat16, a latent of a multiple of {LANES} and pages of 32, 64, 128, 256 or "
            f"{BLOCK} tokens, but got {q.dtype}, {rank} and {page_size}"
        )
    rows = tokens * heads
    padded = -(-rows // 16) * 16
    scaled = cache.scales is not None
    if scaled and page_size % (2 * LANES):
        raise ValueError(
            f"mla_decode on TPUs takes FP8 latents in pages of {2 * LANES} or {BLOCK} tokens, so that the scales of "
            f"half a page fill rows of {LANES}, but got {page_size}"
        )
    # As they are: a copy may take one row out of a tile of eight. As (pages, 1, page size) XLA would lay out all scales
    # anew at each call, since a row of two tiles or more doesn't lie in one piece.
    scales = [cache.scales] if scaled else []
    if schedule is None:
        schedule = plan(lengths, page_size=page_size, pieces=batch + CORES)
    pieces = schedule.work.shape[0]

    q = jnp.pad(q.reshape(batch, rows, width), ((0, 0), (0, padded - rows), (0, 0)))
    q_rope = q[..., rank:]
    zeros = jnp.zeros_like(q_rope)
    queries = (
        q[..., :rank],
        jnp.concatenate([q_rope, zeros], axis=-1),
        jnp.concatenate([zeros, q_rope], axis=-1),
    )
    group = BLOCK // page_size

    def of_sequence(columns):
        return pl.BlockSpec((1, padded, columns), lambda piece, work, *_: (work[piece, 0], 0, 0))

    def of_piece(columns):
        return pl.BlockSpec((1, padded, columns), lambda piece, *_: (piece, 0, 0))

    out, lse = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, heads=heads, scale=scale, page_size=page_size, scaled=scaled),
        out_shape=(
            jax.ShapeDtypeStruct((pieces, padded, rank), jnp.float32),
            jax.ShapeDtypeStruct((pieces, padded, LANES), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pieces,),
            in_specs=[
                *(of_sequence(x.shape[-1]) for x in queries),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in (cache.latent, cache.rope, *scales)),
            ],
            out_specs=(of_piece(rank), of_piece(LANES)),
            scratch_shapes=[
                pltpu.VMEM((2, 2, group, page_size // 2, rank), cache.latent.dtype),
                pltpu.VMEM((2, group, page_size // 2, LANES), cache.rope.dtype),
                pltpu.VMEM((padded, rank), jnp.float32),
                pltpu.VMEM((padded, LANES), jnp.float32),
                pltpu.VMEM((padded, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                *(pltpu.VMEM((2, group, 1, page_size), jnp.float32) for _ in scales),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret or False,
    )(schedule.work, block_tables, lengths, *queries, cache.latent, cache.rope, *scales)
    out, lse = merge(out[:, :rows], lse[:, :rows, 0], schedule)
    shape = (batch, tokens, heads)
    return out.astype(q.dtype).reshape(*shape, rank), lse.reshape(shape)


def _kernel(
    work, table, lengths, q, q_low, q_high, latent_hbm, rope_hbm, *rest,
    tokens, heads, scale, page_size, scaled,
):  # fmt: skip
    scales_hbm, rest = (rest[0], rest[1:]) if scaled else (None, rest)
    out, lse_out, latents, ropes, acc, top, total, arrived, *scale_rows = rest
    piece = pl.program_id(0)
    sequence, begin, end = work[piece, 0], work[piece, 1], work[piece, 2]
    length = lengths[sequence]
    stop = jnp.minimum(length, end * page_size)
    group, half = latents.shape[2], page_size // 2

    def each_copy(block, slot, do):
        for g in range(group):
            number = begin + block * group + g

            @pl.when(number < end)
            def _(g=g, number=number):
                page = table[sequence, number]
                for h in range(2):
                    source = latent_hbm.at[page, pl.ds(h * half, half)]
                    do(pltpu.make_async_copy(source, latents.at[slot, h, g], arrived.at[slot]))
                do(pltpu.make_async_copy(rope_hbm.at[page], ropes.at[slot, g], arrived.at[slot]))
                if scaled:
                    source = scales_hbm.at[pl.ds(page, 1)]
                    do(pltpu.make_async_copy(source, scale_rows[0].at[slot, g], arrived.at[slot]))

    def attend(block, slot, masked):
        first = (begin + block * group) * page_size
        # The precision is said because bfloat16 has no other, whatever the default that the user set.
        dot = functools.partial(lax.dot_general, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32)
        transposed = (((1,), (1,)), ((), ()))
        rope = ropes[slot].reshape(group * half, LANES)

        def position(shape, dimension, h):
            i = lax.broadcasted_iota(jnp.int32, shape, dimension)
            return first + (i // half) * page_size + h * half + i % half

        if masked:  # slots past the end may hold anything, and 0 * NaN is NaN
            high = lax.broadcasted_iota(jnp.int32, rope.shape, 1) // ROPE
            rope = jnp.where(position(rope.shape, 0, high) < stop, rope, 0)
        scores, values, factors = [], [], []
        for h, q_rope in enumerate((q_low, q_high)):
            keys = latents[slot, h].reshape(group * half, -1).astype(q.dtype)
            s = dot(q[0], keys, transposed)
            if scaled:  # of the latents, a token each: of the scores here, of the weights below
                row = jnp.concatenate([scale_rows[0][slot, g, :, h * half : (h + 1) * half] for g in range(group)], 1)
                factors.append(jnp.where(position(row.shape, 1, h) < stop, row, 0) if masked else row)
                s *= factors[h]
            s = (s + dot(q_rope[0], rope, transposed)) * scale
            if masked:
                seen = position(s.shape, 1, h)
                limit = length - tokens + 1 + lax.broadcasted_iota(jnp.int32, s.shape, 0) // heads
                s = jnp.where((seen < stop) & (seen < limit), s, -jnp.inf)
                keys = jnp.where(position(keys.shape, 0, h) < stop, keys, 0)
            scores.append(s)
            values.append(keys)

        old = top[:, :1]
        new = functools.reduce(jnp.maximum, (jnp.max(s, axis=1, keepdims=True) for s in scores), old)
        change = jnp.exp(old - new)
        weights = [jnp.exp(s - new) for s in scores]
        sums = total[:, :1] * change + sum(jnp.sum(w, axis=1, keepdims=True) for w in weights)
        if scaled:
            weights = [w * f for w, f in zip(weights, factors, strict=True)]
        product = sum(
            dot(w.astype(v.dtype), v, (((1,), (0,)), ((), ()))) for w, v in zip(weights, values, strict=False)
        )
        acc[...] = acc[...] * change + product
        top[...] = jnp.broadcast_to(new, top.shape)
        total[...] = jnp.broadcast_to(sums, total.shape)

    acc[...] = jnp.zeros_like(acc)
    top[...] = jnp.full_like(top, MASKED)
    total[...] = jnp.zeros_like(total)
    blocks = (end - begin + group - 1) // group
    pl.when(blocks > 0)(lambda: each_copy(0, 0, lambda copy: copy.start()))

    def step(block, _, masked):
        slot = block % 2

        @pl.when(block + 1 < blocks)
        def _():
            each_copy(block + 1, 1 - slot, lambda copy: copy.start())

        each_copy(block, slot, lambda copy: copy.wait())
        attend(block, slot, masked)

    # Almost all blocks lie before all limits, and need no mask.
    full = jnp.maximum(0, jnp.minimum(stop, length - tokens + 1) - begin * page_size) // BLOCK
    lax.fori_loop(0, full, functools.partial(step, masked=False), None)
    lax.fori_loop(full, blocks, functools.partial(step, masked=True), None)

    seen = total[...] > 0
    lse_out[0] = jnp.where(seen, top[...] + jnp.log(jnp.where(seen, total[...], 1)), -jnp.inf)
    out[0] = acc[...] / jnp.where(seen, total[...], 1)[:, :1]
