"""FP8 grouped matmul on Hopper (Mosaic GPU): wgmma on E4M3, partial sums promoted to scaled float32 every 128.

A thread block computes 128 rows of one group times 256 columns (128, where 256 doesn't divide their number). Two
warpgroups multiply, 64 rows each; a third fetches.
Hopper's FP8 accumulation keeps few bits, and the scales change every 128 elements of the contraction and every 128
columns: so each step of 128 starts from zero for each half of the columns, and its result is scaled and added in
float32 registers while the other warpgroup multiplies.

A block of 128 rows may belong to several groups: each visits it, computes all of it and stores its own rows.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.row_blocks import (
    BLOCK,
    MULTIPROCESSORS,
    SWATH,
    TILE_ROWS,
    each_tile,
    fetch_shared,
    fetch_tiles,
    launch,
    stage_barriers,
    staging,
    store_rows,
    visit_of,
    visits,
)

ROWS = 64  # of a warpgroup
STAGES = 4
FEW = 96
"""Rows per group, on average, up to which `gpu_few_rows` is taken, as in bfloat16."""
FEW_OF_ONE = 256
"""And of a single matrix, whose wide tiles would leave most multiprocessors idle."""
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


def few(rows: int, groups: int) -> bool:
    """Whether rows are so few that the bytes of the matrices bind."""
    return rows <= (FEW_OF_ONE if groups == 1 else FEW * groups)


@functools.partial(jax.jit, static_argnames="interpret")
def fp8_grouped_matmul(
    lhs: jax.Array,
    lhs_scales: jax.Array,
    rhs: jax.Array,
    rhs_scales: jax.Array,
    group_sizes: jax.Array,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """See `api.fp8_grouped_matmul`. `interpret` runs it on a CPU, slowly."""
    rows, depth = lhs.shape
    groups, asked, _ = rhs.shape
    rhs = jnp.pad(rhs, ((0, 0), (0, -asked % BLOCK), (0, 0)))
    columns = rhs.shape[1]
    width = 2 if columns % (2 * BLOCK) == 0 else 1  # of a tile, in blocks of columns
    # Thread blocks that stay, and fetch the next tile while they write one, drift apart. Where a matrix doesn't stay in
    # L2 that costs more than it gains (measured on an H100): there each tile has a thread block of its own.
    stays = depth * columns < 25 << 20
    # Rows past the last group are a group without a matrix.
    group_sizes = jnp.append(group_sizes, rows - jnp.sum(group_sizes))
    count = -(-(-(-rows // BLOCK) + groups + 1) // SWATH) * SWATH
    cluster = 1 if interpret else 2  # the interpreter knows no clusters
    pad = ((0, -rows % BLOCK), (0, 0))
    work = visits(group_sizes, count)
    tiles = count // cluster * (columns // BLOCK // width)
    scales = jnp.swapaxes(jnp.pad(lhs_scales, pad), 0, 1)  # a step's scales are read together
    return plgpu.kernel(
        functools.partial(_kernel, tiles=tiles, steps=depth // BLOCK, cluster=cluster, width=width),
        out_type=jax.ShapeDtypeStruct((rows + -rows % TILE_ROWS, columns), jnp.bfloat16),
        scratch_types=dict(
            x_smem=plgpu.SMEM((STAGES, BLOCK, BLOCK), lhs.dtype, transforms=_tiled()),
            w_smem=plgpu.SMEM((STAGES, width, BLOCK, BLOCK), rhs.dtype, transforms=_tiled()),
            out_smem=staging(ROWS, BLOCK),
            **stage_barriers(STAGES, 1 + width, cluster),
        ),
        **launch(tiles, cluster, interpret, workers=MULTIPROCESSORS if stays else tiles * cluster),
    )(jnp.pad(lhs, pad), scales, rhs, rhs_scales, work)[:rows, :asked]


def _tiled():
    return (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))


def _kernel(
    x_gmem, scale_gmem, w_gmem, w_scale_gmem, work_gmem, out_gmem,
    *, x_smem, w_smem, out_smem, ready, free, cluster_free, tiles, steps, cluster, width,
):  # fmt: skip
    warpgroup = lax.axis_index("warpgroup")
    groups, column_blocks = w_gmem.shape[0], out_gmem.shape[1] // BLOCK // width
    mine = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)

    def prepare(tile):
        column_block, group, block, lower, upper, shared = visit_of(tile, work_gmem, column_blocks, cluster)

        def fetch(step, stage, arrived):
            depth = pl.ds(step * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(block * BLOCK, BLOCK), depth], x_smem.at[stage], arrived)
            for i in range(width):
                columns = pl.ds((column_block * width + i) * BLOCK, BLOCK)
                fetch_shared(w_gmem.at[group, columns, depth], w_smem.at[stage, i], arrived, shared)

        return jnp.where((lower < upper) & (group < groups), steps, 0), shared, fetch

    def multiply(tile, _):
        column_block, group, block, lower, upper, _ = visit_of(tile, work_gmem, column_blocks, cluster)
        origin = block * BLOCK + warpgroup * ROWS

        def scales(step):
            row = plgpu.load(
                scale_gmem.at[step, pl.ds(origin, ROWS)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
            )
            matrix = jnp.minimum(group, groups - 1)
            return row, [w_scale_gmem[matrix, column_block * width + i, step] for i in range(width)]

        def body(step, carry):
            accs, (row, w_scales) = carry
            stage = lax.rem(step, STAGES)
            following = scales(jnp.minimum(step + 1, steps - 1))  # a step ahead, to hide the latency
            plgpu.barrier_wait(ready.at[stage])

            def product(ref, i):
                plgpu.wgmma(ref, x_smem.at[stage, mine], w_smem.at[stage, i].transpose((1, 0)))
                return ref[...]

            sums = []
            for i in range(width):
                part = pl.run_scoped(functools.partial(product, i=i), plgpu.ACC((ROWS, BLOCK), jnp.float32))
                if i == width - 1:
                    plgpu.barrier_arrive(free.at[stage])
                sums.append(accs[i] + part * lax.broadcast_in_dim(row * w_scales[i], part.shape, [0]))
            return sums, following

        @pl.when(lower < upper)
        def _():
            zero = plgpu.layout_cast(jnp.zeros((ROWS, BLOCK), jnp.float32), plgpu.Layout.WGMMA)
            accs, _ = lax.fori_loop(0, jnp.where(group < groups, steps, 0), body, ([zero] * width, scales(0)))
            span = jnp.clip(lower - warpgroup * ROWS, 0, ROWS), jnp.clip(upper - warpgroup * ROWS, 0, ROWS)
            for i, acc in enumerate(accs):
                columns = pl.ds((column_block * width + i) * BLOCK, BLOCK)
                target = lambda rows, to=columns: out_gmem.at[pl.ds(origin + rows.start, rows.size), to]
                store_rows(out_smem, acc.astype(jnp.bfloat16), target, span)

    pl.when(warpgroup == 2)(lambda: fetch_tiles(tiles, STAGES, prepare, ready, free, cluster_free))

    @pl.when(warpgroup < 2)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        each_tile(tiles, multiply)
        plgpu.wait_smem_to_gmem(0)
