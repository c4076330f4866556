"""Grouped matmul on Hopper (Mosaic GPU) for few rows, as in decoding: bound by the matrices' bytes, each read once.

A thread block computes up to 64 rows of one group times a strip of columns. One warpgroup fetches, in steps of 64 along
the contraction, as far ahead as shared memory reaches; the other multiplies and stores. The matrix units work on 64
rows however few there are: rows that weren't fetched give results that nobody stores.

Thread blocks stay, one a multiprocessor, and each walks through the groups by itself, counting tiles: no list of work
has to be made first, by kernels that would take as long, and matrices of groups without rows are never touched.

`swiglu` computes silu(x gate) * (x up) in one pass, the activation in float32.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.row_blocks import (
    FEW_ROWS,
    MULTIPROCESSORS,
    TILE_ROWS,
    TILED,
    fetch_rows,
    staging,
    store_rows,
    walk_tiles,
)

ROWS, DEPTH = FEW_ROWS, 64
COLUMNS = 128
"""Columns of the matrices that a step fetches: of one, or half of each of two."""
STAGES = 6


def product(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, interpret: plgpu.InterpretGPUParams | None = None
) -> jax.Array:
    """See `api.grouped_matmul`.

    Raises:
      ValueError: not bfloat16, or K and N no multiples of 64.
    """
    return _call(lhs, (rhs,), group_sizes, interpret)


def swiglu(
    lhs: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    group_sizes: jax.Array,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """silu(lhs gate) * (lhs up), rounded once. Arguments, result and errors as in `product`."""
    return _call(lhs, (gate, up), group_sizes, interpret)


@functools.partial(jax.jit, static_argnames="interpret")
def _call(lhs, matrices, group_sizes, interpret):
    rows, depth = lhs.shape
    columns = matrices[0].shape[2]
    if depth % DEPTH or columns % DEPTH or {a.dtype for a in (lhs, *matrices)} != {jnp.dtype(jnp.bfloat16)}:
        raise ValueError(
            f"grouped_matmul on Hopper takes bfloat16 and matrices of multiples of {DEPTH}, "
            f"but got {lhs.dtype}, {depth} x {columns}"
        )
    if rows > TILE_ROWS:  # what the copy engine takes: fewer, or multiples
        lhs = jnp.pad(lhs, ((0, -rows % TILE_ROWS), (0, 0)))
    width = COLUMNS // len(matrices)
    return plgpu.kernel(
        functools.partial(_kernel, rows=rows, width=width),
        out_type=jax.ShapeDtypeStruct((len(lhs), columns), lhs.dtype),
        scratch_types=dict(
            x_smem=plgpu.SMEM((STAGES, ROWS, DEPTH), jnp.bfloat16, transforms=TILED),
            w_smem=plgpu.SMEM((STAGES, len(matrices), DEPTH, width), jnp.bfloat16, transforms=TILED),
            out_smem=staging(ROWS, width)[:1],
            ready=plgpu.Barrier(num_arrivals=1 + len(matrices), num_barriers=STAGES),
            free=plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
        ),
        grid=(MULTIPROCESSORS if not interpret else 2,),
        grid_names=("worker",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0, approx_math=True),
        interpret=interpret,
    )(lhs, *matrices, group_sizes.astype(jnp.int32))[:rows]


def _kernel(x_gmem, *refs, x_smem, w_smem, out_smem, ready, free, rows, width):
    *w_gmems, size_gmem, out_gmem = refs
    groups, depth, columns = w_gmems[0].shape
    steps = depth // DEPTH
    walk = functools.partial(walk_tiles, size_gmem, rows, groups, columns, width)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 1)
    def _fetch():
        def tile(group, first, _, upper, column, before):
            def step(i, n):
                stage = lax.rem(n, STAGES)
                pl.when(n >= STAGES)(lambda: plgpu.barrier_wait(free.at[stage]))
                along = pl.ds(i * DEPTH, DEPTH)
                fetch_rows(x_gmem, x_smem, first, upper, along, stage, ready)
                for w, w_gmem in enumerate(w_gmems):
                    strip = w_gmem.at[group, along, pl.ds(column, width)]
                    plgpu.copy_gmem_to_smem(strip, w_smem.at[stage, w], ready.at[stage])
                return n + 1

            return lax.fori_loop(0, jnp.where(group < groups, steps, 0), step, before)

        used = walk(tile, jnp.int32(0))
        for stage in range(STAGES):
            pl.when(stage < used)(functools.partial(plgpu.barrier_wait, free.at[stage]))

    @pl.when(warpgroup == 0)
    def _multiply():
        def tile(group, first, lower, upper, column, before):
            busy = jnp.where(group < groups, steps, 0)

            def accumulate(*accs):
                @pl.loop(0, busy)
                def _(i):
                    stage = lax.rem(before + i, STAGES)
                    plgpu.barrier_wait(ready.at[stage])
                    for w, acc in enumerate(accs):
                        plgpu.wgmma(acc, x_smem.at[stage], w_smem.at[stage, w])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[stage])

                return [acc[...] for acc in accs]

            values = pl.run_scoped(accumulate, *[plgpu.ACC((ROWS, width), jnp.float32) for _ in w_gmems])
            out = values[0] if len(values) == 1 else values[0] / (1 + jnp.exp(-values[0])) * values[1]
            target = lambda r: out_gmem.at[pl.ds(first + r.start, r.size), pl.ds(column, width)]
            store_rows(out_smem, out.astype(jnp.bfloat16), target, (lower, upper))
            return before + busy

        walk(tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
