"""MLA decoding on Hopper GPUs (Mosaic GPU): wgmma, TMA, three specialised warpgroups, split-KV.

A thread block takes 64 query rows (heads x tokens) through one piece of a sequence, two pages of 64 tokens at a time.
The float32 output of 64 x 512 fills half the register file, so it lives in two warpgroups, 256 columns each. Both
share the work on scores: warpgroup w computes those of page w of the pair, and the two exchange row maxima and
probabilities through shared memory. The third warpgroup fetches pages.

Shared memory holds the queries (72 KiB) and two pages (72 KiB each); nothing is left for the probabilities, so they
overlay their page's rope columns, which are needed for the scores alone.

Blocks of the same piece (128 heads make two) are launched side by side, so that one finds in L2 what the other fetched.

FP8 latents land in the second half of the page's own room, as there is no other, and the fetching warpgroup widens them
to bfloat16. A token's scale multiplies the latent's part of its scores, and its probability before the second product.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mla_decode.cache import ROPE, SplitCache
from pallas_kernels.mla_decode.schedule import WHOLE, Plan, plan

RANK, PAGE, ROWS = 512, 64, 64
WIDTH = RANK + ROPE
HALF, QUARTER = RANK // 2, RANK // 4
MULTIPROCESSORS = 132
LOG2E = math.log2(math.e)
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
MASKED = -1e30
"""Where the running maximum starts. Finite, so that rows that see nothing don't compute inf - inf."""


def mla_decode(
    q: jax.Array,
    cache: jax.Array | SplitCache,
    block_tables: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    schedule: Plan | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.mla_decode`. `interpret` runs it on a CPU, slowly."""
    batch, tokens, heads, width = q.shape
    # Latents and rope keys, and the first column of these: the same array twice if they lie side by side.
    latent, rope, rope_column = (cache.latent, cache.rope, 0) if isinstance(cache, SplitCache) else (cache, cache, RANK)
    scales = [cache.scales] if isinstance(cache, SplitCache) and cache.scales is not None else []
    if (width, latent.shape[1]) != (WIDTH, PAGE) or q.dtype != jnp.bfloat16:
        raise ValueError(
            f"mla_decode on GPUs takes bfloat16, width {WIDTH} and pages of {PAGE} tokens, but got {q.dtype} queries "
            f"of width {width} and a {latent.dtype} cache with pages of {latent.shape[1]}"
        )
    rows = tokens * heads
    padded = -(-rows // ROWS) * ROWS
    blocks = padded // ROWS
    if schedule is None:
        schedule = plan(lengths, page_size=PAGE, pieces=default_pieces(batch, rows))
    pieces = schedule.work.shape[0]

    q = jnp.pad(q.reshape(batch, rows, width), ((0, 0), (0, padded - rows), (0, 0)))
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            tokens=tokens,
            heads=heads,
            scale=scale,
            rope_column=rope_column,
            hardware=not interpret,
            scaled=bool(scales),
        ),
        out_type=(
            jax.ShapeDtypeStruct((batch, padded, RANK), q.dtype),
            jax.ShapeDtypeStruct((batch, padded), jnp.float32),
            jax.ShapeDtypeStruct((pieces, padded, RANK), q.dtype),
            jax.ShapeDtypeStruct((pieces, padded), jnp.float32),
        ),
        scratch_types=_scratch(bool(scales), hardware=not interpret),
        grid=(pieces, blocks),  # the last one runs fastest: a piece's pages are in L2 for all of its rows
        grid_names=("piece", "row_block"),
        num_threads=3,
        thread_name="warpgroup",
        # The barriers that this program needs are all written down in it.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    out, lse, partial_out, partial_lse = kernel(q, latent, rope, *scales, block_tables, lengths, schedule.work)
    if pieces > batch:
        out, lse = _merge(out, lse, partial_out, partial_lse, schedule.slots, rows=rows, interpret=interpret)
    shape = (batch, tokens, heads)
    return out[:, :rows].reshape(*shape, RANK), lse[:, :rows].reshape(shape)


def default_pieces(batch: int, rows: int) -> int:
    """How many pieces make every multiprocessor busy, with one thread block each for 64 of the rows."""
    return batch + max(1, MULTIPROCESSORS // -(-rows // ROWS))


def _scratch(scaled: bool, hardware: bool) -> dict:
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    halves = plgpu.SMEM((2, 2, PAGE, HALF), jnp.bfloat16, transforms=tiled)
    quarters = None
    if scaled:  # as many bytes, of which the second half of each page is used
        tiled_8 = (plgpu.TilingTransform((8, QUARTER)), plgpu.SwizzleTransform(128))
        quarters = plgpu.SMEM((2, 2, 4, PAGE, QUARTER), jnp.float8_e4m3fn, transforms=tiled_8)
    overlaid = scaled and hardware  # the interpreter takes one for a race with the other
    return dict(
        q_smem=plgpu.SMEM((ROWS, WIDTH), jnp.bfloat16, transforms=tiled),
        pages=plgpu.RefUnion(halves, quarters) if overlaid else (halves, quarters),
        scale_smem=plgpu.SMEM((2, PAGE), jnp.float32) if scaled else None,
        ropes=plgpu.SMEM((2, PAGE, ROPE), jnp.bfloat16, transforms=tiled),
        row_smem=plgpu.SMEM((2, ROWS), jnp.float32),
        sum_smem=plgpu.SMEM((2, 2, ROWS), jnp.float32),
        q_ready=plgpu.Barrier(),
        half_ready=plgpu.Barrier(num_barriers=4),
        rope_ready=plgpu.Barrier(num_barriers=2, num_arrivals=2 if scaled else 1),
        landed=plgpu.Barrier(num_barriers=2, num_arrivals=4) if scaled else None,
        half_free=plgpu.Barrier(num_barriers=4),
        weights_ready=plgpu.Barrier(num_barriers=2),
        sums_ready=plgpu.Barrier(num_arrivals=2),
    )


def _kernel(
    q_gmem, latent_gmem, rope_gmem, *other_gmem,
    q_smem, pages, scale_smem, ropes, row_smem, sum_smem, q_ready, landed, half_ready, rope_ready, half_free,
    weights_ready, sums_ready,
    tokens, heads, scale, rope_column, hardware, scaled,
):  # fmt: skip
    *scales_gmem, table_gmem, lengths_gmem, work_gmem, out_gmem, lse_gmem, partial_out_gmem, partial_lse_gmem = (
        other_gmem
    )
    halves, quarters = pages
    warpgroup = lax.axis_index("warpgroup")
    piece = lax.axis_index("piece")
    row = lax.axis_index("row_block") * ROWS
    sequence, begin, end, slot = (work_gmem[piece, i] for i in range(4))
    pairs = (end - begin + 1) // 2  # 0 for an empty sequence, and for no piece

    @pl.when(warpgroup == 2)
    def _fetch():
        # All three warpgroups together: 504, what they start with. For one more the others would wait for ever.
        plgpu.set_max_registers(56 if scaled else 40, action="decrease")
        copy = plgpu.copy_gmem_to_smem
        pl.when(pairs > 0)(lambda: copy(q_gmem.at[sequence, pl.ds(row, ROWS)], q_smem, q_ready))

        def widen(i):
            """Page i's FP8 latents to bfloat16, those of the first half first: its second half is where they are."""
            plgpu.barrier_wait(landed.at[i])
            read = lambda c: plgpu.load(quarters.at[i, 1, c], layout=plgpu.Layout.WGMMA_8BIT)

            def write(c, values):
                to = pl.ds(c % 2 * QUARTER, QUARTER)
                halves[i, c // 2, :, to] = values.astype(jnp.float32).astype(jnp.bfloat16)

            def ready(h):
                plgpu.commit_smem()
                plgpu.barrier_arrive(half_ready.at[2 * i + h])

            for c in range(2):
                write(c, read(c))
            ready(0)
            rest = read(2), read(3)
            plgpu.commit_smem()  # all of it is read before any is overwritten
            for c, values in enumerate(rest):
                write(2 + c, values)
            ready(1)

        @pl.loop(0, pairs)
        def _pair(pair):
            for i in range(2):
                # A piece of odd length has its last page twice; the second is masked out whole.
                page = table_gmem[sequence, jnp.minimum(begin + 2 * pair + i, end - 1)]
                for h in range(2):
                    pl.when(pair > 0)(functools.partial(plgpu.barrier_wait, half_free.at[2 * i + h]))
                    if not scaled:
                        copy(latent_gmem.at[page, :, pl.ds(h * HALF, HALF)], halves.at[i, h], half_ready.at[2 * i + h])
                for c in range(4 if scaled else 0):
                    copy(latent_gmem.at[page, :, pl.ds(c * QUARTER, QUARTER)], quarters.at[i, 1, c], landed.at[i])
                # The probabilities of the page before lay here, for both warpgroups.
                copy(rope_gmem.at[page, :, pl.ds(rope_column, ROPE)], ropes.at[i], rope_ready.at[i])
                if scaled:
                    copy(scales_gmem[0].at[page], scale_smem.at[i], rope_ready.at[i])
                    widen(i)

        @pl.when(pairs > 0)  # the interpreter wants every arrival waited for
        def _drain():
            for i in range(4):
                plgpu.barrier_wait(half_free.at[i])

    def compute(mine: int):
        plgpu.set_max_registers(224 if scaled else 232, action="increase")
        length = lengths_gmem[sequence]
        stop = jnp.minimum(length, end * PAGE)
        other = 1 - mine
        columns = pl.ds(mine * HALF, HALF)
        weights = ropes  # see above
        row_layout = plgpu.Layout.WGMMA.reduce(1)

        def alone(shape, product):
            """Term that `product` adds to the accumulator that it is given."""

            def value(ref):
                product(ref)
                return ref[...]

            return pl.run_scoped(value, plgpu.ACC(shape, jnp.float32))

        def onto(acc, product):
            if hardware:
                return pl.run_state(product)(plgpu.ACC.init(acc))
            return acc + alone(acc.shape, product)  # the interpreter knows no accumulator with a start value

        def page_scales(first, masked):
            """Factor of each token of my page, for all rows; 0 where there is none."""
            row = plgpu.load(scale_smem.at[mine], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            scales = lax.broadcast_in_dim(row, (ROWS, PAGE), [1])
            return jnp.where(first + _iota(1) < stop, scales, 0.0) if masked else scales

        def score(first, masked):
            """The scaled scores of my page, which starts at position `first`; and its tokens' FP8 scales."""

            def latents(ref):
                # A loop, and one whose length the compiler can't see: unrolled, its many matrix descriptors would be
                # hoisted out of the loop over pages, spill, and be reloaded between the wgmmas.
                @pl.loop(0, jnp.minimum(end - begin + 1, 2))
                def _(h):
                    plgpu.barrier_wait(half_ready.at[2 * mine + h])
                    q_half = q_smem.at[:, pl.ds(pl.multiple_of(h * HALF, HALF), HALF)]
                    plgpu.wgmma(ref, q_half, halves.at[mine, h].transpose((1, 0)))

            def rotated(ref):
                plgpu.wgmma(ref, q_smem.at[:, pl.ds(RANK, ROPE)], ropes.at[mine].transpose((1, 0)))
                plgpu.wgmma_wait(0)

            def both(ref):
                latents(ref)
                plgpu.barrier_wait(rope_ready.at[mine])
                rotated(ref)

            factors = None
            if scaled:  # the latent's part alone is scaled
                plgpu.barrier_wait(rope_ready.at[mine])
                factors = page_scales(first, masked)
                scores = onto(alone((ROWS, PAGE), latents) * factors, rotated)
            else:
                scores = alone((ROWS, PAGE), both)
            scores *= scale * LOG2E
            if not masked:
                return scores, factors
            position = first + _iota(1)
            visible = position < stop
            if tokens > 1:
                visible &= position < length - tokens + 1 + (row + _iota(0)) // heads
            return jnp.where(visible, scores, -jnp.inf), factors

        def weigh(scores, factors, m):
            """Hands my page's probabilities, relative to the maximum `m`, to both warpgroups; returns their sums."""
            p = jnp.exp2(scores - lax.broadcast_in_dim(m, scores.shape, [0]))
            row_smem[mine] = m
            plgpu.commit_smem()  # no warp's wgmma reads the rope keys any more
            weights[mine] = (p * factors if scaled else p).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.barrier_arrive(weights_ready.at[mine])
            return jnp.sum(p, axis=1)

        def receive():
            """Awaits my half of the other page and its probabilities; returns the maximum that they are relative to.

            Not the other half: it may be refilled before I look, and a barrier two phases on looks like one not ready.
            """
            plgpu.barrier_wait(rope_ready.at[other])
            plgpu.barrier_wait(half_ready.at[2 * other + mine])
            plgpu.barrier_wait(weights_ready.at[other])
            return plgpu.load(row_smem.at[other], layout=row_layout)

        def accumulate(acc, alpha, i, first, masked, meanwhile):
            """Adds page i's share to my columns, and gives my half back. Calls `meanwhile` while the wgmmas run."""
            if masked:  # slots past the end may hold anything, and 0 * NaN is NaN
                for c in range(HALF // 64):
                    block = halves.at[i, mine, :, pl.ds(c * 64, 64)]
                    block[...] = jnp.where(first + _iota(0) < stop, block[...], jnp.bfloat16(0))
                plgpu.commit_smem()

            def product(ref):
                plgpu.wgmma(ref, weights.at[i], halves.at[i, mine])
                meanwhile()
                plgpu.wgmma_wait(0)

            acc = onto(acc * lax.broadcast_in_dim(alpha, acc.shape, [0]), product)
            plgpu.barrier_arrive(half_free.at[2 * i + mine])
            return acc

        def body(pair, carry, masked):
            acc, m = carry
            first = (begin + 2 * pair) * PAGE

            def add(turn, change, new=0.0):
                # In shared memory only because nothing computed in `meanwhile` can leave it; and there from one
                # place to another, as four threads hold each sum and none may read what another has added to.
                old = plgpu.load(sum_smem.at[mine, turn], layout=row_layout)
                sum_smem[mine, 1 - turn] = old * change + new

            def share(acc, i, change, meanwhile=lambda: None):
                return accumulate(acc, change, i, first + i * PAGE, masked, meanwhile)

            scores, factors = score(first + mine * PAGE, masked)
            top = jnp.max(scores, axis=1)
            if mine == 0:
                m_0 = jnp.maximum(m, top)
                to_0 = jnp.exp2(m - m_0)
                new = weigh(scores, factors, m_0)
                acc = share(acc, 0, to_0, lambda: add(0, to_0, new))
                m_1 = receive()
                to_1 = jnp.exp2(m_0 - m_1)
                acc = share(acc, 1, to_1, lambda: add(1, to_1))
            else:
                # Its scores are worked out while warpgroup 0 is at its probabilities, and its own probabilities while
                # the matrix units add page 0's share.
                m_0 = receive()
                m_1 = jnp.maximum(m_0, top)
                to_0, to_1 = jnp.exp2(m - m_0), jnp.exp2(m_0 - m_1)

                def meanwhile():
                    add(0, to_0)
                    add(1, to_1, weigh(scores, factors, m_1))

                acc = share(acc, 0, to_0, meanwhile)
                acc = share(acc, 1, to_1)
            return acc, m_1

        acc = plgpu.layout_cast(jnp.zeros((ROWS, HALF), jnp.float32), plgpu.Layout.WGMMA)
        m = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), row_layout)
        sum_smem[mine, 0] = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout)
        pl.when(pairs > 0)(lambda: plgpu.barrier_wait(q_ready))
        # Almost all pairs of pages lie before all limits, and need no mask.
        full = jnp.clip(jnp.minimum(stop, length - tokens + 1) // PAGE - begin, 0, end - begin) // 2
        carry = lax.fori_loop(0, full, functools.partial(body, masked=False), (acc, m))
        acc, m = lax.fori_loop(full, pairs, functools.partial(body, masked=True), carry)

        plgpu.barrier_arrive(sums_ready)
        plgpu.barrier_wait(sums_ready)
        total = sum(plgpu.load(sum_smem.at[w, 0], layout=row_layout) for w in (mine, other))
        seen = total > 0
        out = acc * lax.broadcast_in_dim(jnp.where(seen, 1 / jnp.where(seen, total, 1.0), 0.0), acc.shape, [0])
        lse = jnp.where(seen, m / LOG2E + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)

        staged = halves.at[0, mine]  # both warpgroups are done with all pages
        staged[...] = out.astype(jnp.bfloat16)
        plgpu.commit_smem()

        def store(index, to_out, to_lse):
            plgpu.copy_smem_to_gmem(staged, to_out.at[index, pl.ds(row, ROWS), columns])
            if mine == 0:
                to_lse[index, pl.ds(row, ROWS)] = lse
            plgpu.wait_smem_to_gmem(0)

        pl.when(slot == WHOLE)(lambda: store(sequence, out_gmem, lse_gmem))
        pl.when(slot >= 0)(lambda: store(slot, partial_out_gmem, partial_lse_gmem))

    for w in range(2):
        pl.when(warpgroup == w)(functools.partial(compute, w))


def _iota(dimension: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, PAGE), dimension, layout=plgpu.Layout.WGMMA)


def _merge(out, lse, partial_out, partial_lse, slots, *, rows, interpret):
    """Merges the pieces of the sequences that were cut, by their log-sum-exps; leaves the others alone."""
    batch = lse.shape[0]
    parts = 4  # warpgroups, each with every fourth piece, and in the end with a fourth of the columns
    blocks = min(rows, -(-4 * MULTIPROCESSORS // batch))  # few of them where most will find nothing to do
    width = RANK // parts

    def kernel(
        partial_out_gmem, partial_lse_gmem, slots_gmem, out_gmem, lse_gmem, acc_smem, top_smem, total_smem, ready
    ):  # fmt: skip
        if not interpret:
            plgpu.griddepcontrol_wait()  # it may be launched while the pieces are still worked on
        sequence = lax.axis_index("sequence")
        block, part = lax.axis_index("block"), lax.axis_index("warpgroup")
        first, count = slots_gmem[sequence, 0], slots_gmem[sequence, 1]

        def add(row, unroll, step, carry):
            """`unroll` more pieces, all loaded before the first is needed."""
            top, total, acc = carry
            index = [(step * unroll + i) * parts + part for i in range(unroll)]
            slot = [first + jnp.minimum(i, count - 1) for i in index]
            lses = [jnp.where(i < count, partial_lse_gmem[s, row], -jnp.inf) for i, s in zip(index, slot, strict=True)]
            values = [partial_out_gmem[s, row].astype(jnp.float32) for s in slot]
            new = functools.reduce(jnp.maximum, lses, top)
            total, acc = (x * jnp.exp(top - new) for x in (total, acc))
            for part_lse, value in zip(lses, values, strict=True):
                weight = jnp.exp(part_lse - new)
                total, acc = total + weight, acc + weight * value
            return new, total, acc

        def meet():
            plgpu.barrier_arrive(ready)
            plgpu.barrier_wait(ready)

        @pl.loop(0, jnp.where(count > 1, (rows - block + blocks - 1) // blocks, 0))
        def _(turn):
            row = block + turn * blocks
            carry = jnp.float32(MASKED), jnp.float32(0), jnp.zeros((RANK,), jnp.float32)
            mine = (count - part + parts - 1) // parts
            for unroll, fits in ((16, mine > 4), (2, mine <= 4)):  # what is past the end is loaded for nothing
                steps = jnp.where(fits, (mine + unroll - 1) // unroll, 0)
                carry = lax.fori_loop(0, steps, functools.partial(add, row, unroll), carry)
            top_smem[part], total_smem[part], acc_smem[part] = carry
            meet()
            tops = [top_smem[p] for p in range(parts)]
            top = functools.reduce(jnp.maximum, tops)
            weights = [jnp.exp(t - top) for t in tops]
            columns = pl.ds(pl.multiple_of(part * width, width), width)
            total = sum(w * total_smem[p] for p, w in enumerate(weights))
            acc = sum(w * acc_smem[p, columns] for p, w in enumerate(weights))
            seen = total > 0
            out_gmem[sequence, row, columns] = (acc / jnp.where(seen, total, 1.0)).astype(jnp.bfloat16)

            @pl.when(part == 0)
            def _():
                lse_gmem[sequence, row] = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)

            meet()  # before the next row's parts overwrite these

    def run(refs):
        plgpu.kernel(
            kernel,
            grid=(batch, blocks),
            grid_names=("sequence", "block"),
            num_threads=parts,
            thread_name="warpgroup",
            scratch_types=dict(
                acc_smem=plgpu.SMEM((parts, RANK), jnp.float32),
                top_smem=plgpu.SMEM((parts,), jnp.float32),
                total_smem=plgpu.SMEM((parts,), jnp.float32),
                ready=plgpu.Barrier(num_arrivals=parts),
            ),
            interpret=interpret,
        )(partial_out, partial_lse, slots, *refs)

    return pl.run_state(run)((out, lse))  # in place, and without an effect that a scan over layers would refuse
