"""Gradient of the matrices of FP8 grouped matmul on Hopper (Mosaic GPU): both operands in tiles of 128 along the sum.

A thread block computes 128 x 256 of a group's matrix, 64 rows a warpgroup; the third warpgroup fetches, the scales of a
step with its operands. What is past an array's edge is read as zeros and not written. Hopper multiplies FP8 only where
both operands are contiguous along the sum, so both come transposed. As in the product (`gpu.py`), every 128 rows of the
sum start from zero in the matrix units. What they give is scaled by both operands' scales, a vector along either side,
and added in float32 registers.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.row_blocks import BLOCK, each_tile, fetch_shared, fetch_tiles, launch, stage_barriers

ROWS = 64  # of a warpgroup
COLUMNS = 2 * BLOCK
STAGES = 4
PIECE = 32
"""Columns that are scaled and stored at a time, so that registers hold few scales."""
_FP8 = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
_FLOAT32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


@functools.partial(jax.jit, static_argnames="interpret")
def weight_gradient(
    lhs: jax.Array,
    lhs_scales: jax.Array,
    dout: jax.Array,
    dout_scales: jax.Array,
    group_steps: jax.Array,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """See `api.fp8_grouped_weight_gradient`. `interpret` runs it on a CPU, slowly."""
    depth, columns, groups = len(lhs), len(dout), len(group_steps)
    cluster = 1 if interpret else 2  # the interpreter knows no clusters
    ends = jnp.cumsum(group_steps)
    spans = jnp.stack([ends - group_steps, group_steps], axis=1).astype(jnp.int32)
    tiles = groups * -(-columns // COLUMNS) * -(-depth // (BLOCK * cluster))
    return plgpu.kernel(
        functools.partial(_kernel, tiles=tiles, cluster=cluster),
        out_type=jax.ShapeDtypeStruct((groups, depth, columns), jnp.float32),
        scratch_types=dict(
            x_smem=plgpu.SMEM((STAGES, BLOCK, BLOCK), lhs.dtype, transforms=_FP8),
            dy_smem=plgpu.SMEM((STAGES, COLUMNS, BLOCK), dout.dtype, transforms=_FP8),
            x_scale_smem=plgpu.SMEM((STAGES, BLOCK), jnp.float32),
            dy_scale_smem=plgpu.SMEM((STAGES, COLUMNS), jnp.float32),
            out_smem=[plgpu.SMEM((ROWS, PIECE), jnp.float32, transforms=_FLOAT32) for _ in range(2)],
            **stage_barriers(STAGES, 4, cluster),
        ),
        **launch(tiles, cluster, interpret),
    )(lhs, lhs_scales, dout, dout_scales, spans)


def _kernel(
    x_gmem, x_scale_gmem, dy_gmem, dy_scale_gmem, span_gmem, out_gmem,
    *, x_smem, dy_smem, x_scale_smem, dy_scale_smem, out_smem, ready, free, cluster_free, tiles, cluster,
):  # fmt: skip
    warpgroup = lax.axis_index("warpgroup")
    _, depth, columns = out_gmem.shape
    row_blocks, column_blocks = -(-depth // (BLOCK * cluster)), -(-columns // COLUMNS)
    mine = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
    layout = plgpu.Layout.WGMMA

    def place(tile):
        group, rest = tile // (row_blocks * column_blocks), lax.rem(tile, row_blocks * column_blocks)
        row = (lax.rem(rest, row_blocks) * cluster + lax.axis_index("cluster")) * BLOCK
        return group, row, rest // row_blocks * COLUMNS, span_gmem[group, 0], span_gmem[group, 1]

    def prepare(tile):
        _, row, column, first, steps = place(tile)
        rows, columns = pl.ds(row, BLOCK), pl.ds(column, COLUMNS)

        def fetch(step, stage, arrived):
            at = pl.ds((first + step) * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(x_gmem.at[rows, at], x_smem.at[stage], arrived)
            fetch_shared(dy_gmem.at[columns, at], dy_smem.at[stage], arrived, cluster > 1)
            plgpu.copy_gmem_to_smem(x_scale_gmem.at[first + step, rows], x_scale_smem.at[stage], arrived)
            plgpu.copy_gmem_to_smem(dy_scale_gmem.at[first + step, columns], dy_scale_smem.at[stage], arrived)

        return steps, cluster > 1, fetch

    def multiply(tile, _):
        group, row, column, _, steps = place(tile)

        def body(step, accs):
            stage = lax.rem(step, STAGES)
            plgpu.barrier_wait(ready.at[stage])

            def product(ref, start):
                plgpu.wgmma(ref, x_smem.at[stage, mine], dy_smem.at[stage, pl.ds(start, BLOCK)].transpose((1, 0)))
                of_x = plgpu.load(x_scale_smem.at[stage, mine], layout=layout.reduce(1), optimized=False)
                return ref[...], of_x

            sums = []
            for start in range(0, COLUMNS, BLOCK):
                multiplied = functools.partial(product, start=start)
                part, of_x = pl.run_scoped(multiplied, plgpu.ACC((ROWS, BLOCK), jnp.float32))
                for at in range(0, BLOCK, PIECE):
                    of_dy = plgpu.load(
                        dy_scale_smem.at[stage, pl.ds(start + at, PIECE)], layout=layout.reduce(0), optimized=False
                    )
                    scaled = part[:, at : at + PIECE]
                    scaled = scaled * lax.broadcast_in_dim(of_x, scaled.shape, [0])
                    scaled = scaled * lax.broadcast_in_dim(of_dy, scaled.shape, [1])
                    sums.append(accs[len(sums)] + scaled)
            plgpu.commit_smem()  # the scales have been read, before copies overwrite them
            plgpu.barrier_arrive(free.at[stage])
            return sums

        zero = plgpu.layout_cast(jnp.zeros((ROWS, PIECE), jnp.float32), layout)
        accs = lax.fori_loop(0, steps, body, [zero] * (COLUMNS // PIECE))
        rows = pl.ds(row + warpgroup * ROWS, ROWS)
        for i, acc in enumerate(accs):
            _store(out_smem, acc, out_gmem.at[group, rows, pl.ds(column + i * PIECE, PIECE)])

    pl.when(warpgroup == 2)(lambda: fetch_tiles(tiles, STAGES, prepare, ready, free, cluster_free))

    @pl.when(warpgroup < 2)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        each_tile(tiles, multiply)
        plgpu.wait_smem_to_gmem(0)


def _store(staged, values, target) -> None:
    """Starts storing a warpgroup's values by way of its own shared memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # for what was stored before
    for w, smem in enumerate(staged):

        @pl.when(lax.axis_index("warpgroup") == w)
        def _(smem=smem):
            smem[...] = values
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, target)
