"""Gradient of the matrices of FP8 grouped matmul on Hopper (Mosaic GPU): both operands in tiles of 128 along the sum.

A thread block computes 128 x 256 of a group's matrix (128 x 128, where 256 doesn't divide its columns), 64 rows a
warpgroup; the third warpgroup fetches. Hopper multiplies FP8 only where both operands are contiguous along the sum, so
both come transposed. As in the product (`gpu.py`), every 128 rows of the sum start from zero in the matrix units. What
they give is scaled by both operands' scales, a vector along either side, and added in float32 registers.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.row_blocks import BLOCK, each_tile, fetch_shared, fetch_tiles, launch, stage_barriers

ROWS = 64  # of a warpgroup's product
_FP8 = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
_FLOAT32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


class Variant(NamedTuple):
    """A tile of 128 height x 128 width. `piece`: columns scaled at a time; `staged`: columns stored at a time."""

    height: int = 1
    width: int = 2
    stages: int = 3
    piece: int = 128
    staged: int = 128
    hoist: bool = False
    commit: bool = True


VARIANT = Variant()


@functools.partial(jax.jit, static_argnames=("interpret", "variant"))
def weight_gradient(
    lhs: jax.Array,
    lhs_scales: jax.Array,
    dout: jax.Array,
    dout_scales: jax.Array,
    group_steps: jax.Array,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
    variant: Variant | None = None,
) -> jax.Array:
    """See `api.fp8_grouped_weight_gradient`. `interpret` runs it on a CPU, slowly."""
    depth, columns, groups = len(lhs), len(dout), len(group_steps)
    variant = variant or VARIANT
    height, width, stages = variant.height, variant.width, variant.stages
    cluster = 1 if interpret else 2  # the interpreter knows no clusters
    ends = jnp.cumsum(group_steps)
    spans = jnp.stack([ends - group_steps, group_steps], axis=1).astype(jnp.int32)
    row_blocks, column_blocks = -(-depth // (BLOCK * height)), -(-columns // (BLOCK * width))
    if height > width:
        column_blocks = -(-column_blocks // cluster)
    else:
        row_blocks = -(-row_blocks // cluster)
    tiles = groups * row_blocks * column_blocks
    return plgpu.kernel(
        functools.partial(
            _kernel, tiles=tiles, row_blocks=row_blocks, column_blocks=column_blocks, variant=variant, cluster=cluster
        ),
        out_type=jax.ShapeDtypeStruct((groups, depth, columns), jnp.float32),
        scratch_types=dict(
            x_smem=plgpu.SMEM((stages, height * BLOCK, BLOCK), lhs.dtype, transforms=_FP8),
            dy_smem=plgpu.SMEM((stages, width * BLOCK, BLOCK), dout.dtype, transforms=_FP8),
            x_scale_smem=plgpu.SMEM((stages, height * BLOCK), jnp.float32),
            dy_scale_smem=plgpu.SMEM((stages, width * BLOCK), jnp.float32),
            out_smem=[plgpu.SMEM((ROWS, variant.staged), jnp.float32, transforms=_FLOAT32) for _ in range(2)],
            **stage_barriers(stages, 4, cluster),
        ),
        **launch(tiles, cluster, interpret),
    )(lhs, lhs_scales, dout, dout_scales, spans)


def _kernel(
    x_gmem, x_scale_gmem, dy_gmem, dy_scale_gmem, span_gmem, out_gmem,
    *, x_smem, dy_smem, x_scale_smem, dy_scale_smem, out_smem, ready, free, cluster_free,
    tiles, row_blocks, column_blocks, variant, cluster,
):  # fmt: skip
    height, width, stages, piece, staged, hoist, commit = variant
    warpgroup = lax.axis_index("warpgroup")
    tall = height > width  # the cluster's blocks share the larger operand
    layout = plgpu.Layout.WGMMA

    def place(tile):
        group, rest = tile // (row_blocks * column_blocks), lax.rem(tile, row_blocks * column_blocks)
        row, column = lax.rem(rest, row_blocks), rest // row_blocks
        peer = lax.axis_index("cluster")
        row, column = (row, column * cluster + peer) if tall else (row * cluster + peer, column)
        return group, row * height * BLOCK, column * width * BLOCK, span_gmem[group, 0], span_gmem[group, 1]

    def prepare(tile):
        _, row, column, first, steps = place(tile)

        def fetch(step, stage, arrived):
            at, rows, columns = (
                pl.ds((first + step) * BLOCK, BLOCK),
                pl.ds(row, height * BLOCK),
                pl.ds(column, width * BLOCK),
            )
            fetch_shared(x_gmem.at[rows, at], x_smem.at[stage], arrived, cluster > 1 and tall)
            fetch_shared(dy_gmem.at[columns, at], dy_smem.at[stage], arrived, cluster > 1 and not tall)
            plgpu.copy_gmem_to_smem(x_scale_gmem.at[first + step, rows], x_scale_smem.at[stage], arrived)
            plgpu.copy_gmem_to_smem(dy_scale_gmem.at[first + step, columns], dy_scale_smem.at[stage], arrived)

        return steps, cluster > 1, fetch

    def multiply(tile, _):
        group, row, column, _, steps = place(tile)
        origin = pl.multiple_of(warpgroup * (height * ROWS), ROWS)

        def body(step, accs):
            stage = lax.rem(step, stages)
            plgpu.barrier_wait(ready.at[stage])
            of_dy = {}

            def product(ref, h, i):
                mine = pl.ds(origin + h * ROWS, ROWS)
                plgpu.wgmma(ref, x_smem.at[stage, mine], dy_smem.at[stage, pl.ds(i * BLOCK, BLOCK)].transpose((1, 0)))
                of_x = plgpu.load(x_scale_smem.at[stage, mine], layout=layout.reduce(1), optimized=False)
                return ref[...], of_x

            def column_scales(at):
                if at not in of_dy or not hoist:
                    of_dy[at] = plgpu.load(
                        dy_scale_smem.at[stage, pl.ds(at, piece)], layout=layout.reduce(0), optimized=False
                    )
                return of_dy[at]

            if hoist:
                for at in range(0, width * BLOCK, piece):
                    column_scales(at)
            sums = []
            for h, i in itertools.product(range(height), range(width)):
                part, of_x = pl.run_scoped(functools.partial(product, h=h, i=i), plgpu.ACC((ROWS, BLOCK), jnp.float32))
                for at in range(0, BLOCK, piece):
                    scaled = part[:, at : at + piece]
                    scaled = scaled * lax.broadcast_in_dim(of_x, scaled.shape, [0])
                    scaled = scaled * lax.broadcast_in_dim(column_scales(i * BLOCK + at), scaled.shape, [1])
                    sums.append(accs[len(sums)] + scaled)
            if commit:
                plgpu.commit_smem()  # what was read, before copies overwrite it
            plgpu.barrier_arrive(free.at[stage])
            return sums

        zero = plgpu.layout_cast(jnp.zeros((ROWS, piece), jnp.float32), layout)
        accs = lax.fori_loop(0, steps, body, [zero] * (height * width * BLOCK // piece))
        order = itertools.product(range(height), range(0, width * BLOCK, piece))
        for (h, left), acc in zip(order, accs, strict=True):
            for at in range(0, piece, staged):
                rows, columns = pl.ds(row + origin + h * ROWS, ROWS), pl.ds(column + left + at, staged)
                _store(out_smem, acc[:, at : at + staged], out_gmem.at[group, rows, columns])

    pl.when(warpgroup == 2)(lambda: fetch_tiles(tiles, stages, prepare, ready, free, cluster_free))

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
