"""Grouped matmul on Hopper (Mosaic GPU), bfloat16: wgmma, TMA, two multiplying warpgroups and one that fetches.

A thread block computes 128 rows of one group times 256 columns, 64 rows a warpgroup. A block of 128 rows may belong to
several groups: each visits it, computes all of it and stores its own rows. The gradient of the rows reads the matrices
as they lie: the matrix units take them contiguous along either axis, so that nothing is transposed in memory.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import library
from pallas_kernels.row_blocks import BLOCK, store_range, visits

ROWS, COLUMNS, DEPTH = 64, 256, 64  # of a warpgroup's product in one step
STAGES = 4
SWATH = 8  # row blocks that run side by side, so that they share the columns' matrix blocks in L2
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


def product(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    transposed: bool = False,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """See `api.grouped_matmul`; `transposed` takes matrices (G, N, K). Rows past the last group are unwritten.

    Raises:
      ValueError: not bfloat16, or K and N no multiples of 64 and 256.
    """
    rows, depth = lhs.shape
    columns = rhs.shape[1] if transposed else rhs.shape[2]
    if depth % DEPTH or columns % COLUMNS or lhs.dtype != jnp.bfloat16 or rhs.dtype != jnp.bfloat16:
        raise ValueError(
            f"grouped_matmul on Hopper takes bfloat16, a contraction of a multiple of {DEPTH} and columns of a "
            f"multiple of {COLUMNS}, but got {lhs.dtype}, {depth} and {columns}"
        )
    count = -(-(-(-rows // BLOCK) + rhs.shape[0]) // SWATH) * SWATH
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    w_shape = (COLUMNS, DEPTH) if transposed else (DEPTH, COLUMNS)
    return plgpu.kernel(
        functools.partial(_kernel, steps=depth // DEPTH, transposed=transposed),
        out_type=jax.ShapeDtypeStruct((rows, columns), lhs.dtype),
        scratch_types=dict(
            x_smem=plgpu.SMEM((STAGES, BLOCK, DEPTH), lhs.dtype, transforms=tiled),
            w_smem=plgpu.SMEM((STAGES, *w_shape), rhs.dtype, transforms=tiled),
            out_smem=plgpu.SMEM((2, ROWS, COLUMNS // 2), lhs.dtype),
            ready=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            free=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ),
        grid=(SWATH, columns // COLUMNS, count // SWATH),
        grid_names=("in_swath", "column_block", "swath"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=interpret,
    )(jnp.pad(lhs, ((0, -rows % BLOCK), (0, 0))), rhs, visits(group_sizes, count))


def _kernel(x_gmem, w_gmem, work_gmem, out_gmem, *, x_smem, w_smem, out_smem, ready, free, steps, transposed):
    warpgroup = lax.axis_index("warpgroup")
    visit = lax.axis_index("swath") * SWATH + lax.axis_index("in_swath")
    column = lax.axis_index("column_block") * COLUMNS
    group, block, lower, upper = (work_gmem[visit, i] for i in range(4))

    @pl.when((lower < upper) & (warpgroup == 2))
    def _fetch():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, steps)
        def _(step):
            stage = lax.rem(step, STAGES)
            pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(free.at[stage]))
            depth, columns = pl.ds(step * DEPTH, DEPTH), pl.ds(column, COLUMNS)
            w = w_gmem.at[group, columns, depth] if transposed else w_gmem.at[group, depth, columns]
            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(block * BLOCK, BLOCK), depth], x_smem.at[stage], ready.at[stage])
            plgpu.copy_gmem_to_smem(w, w_smem.at[stage], ready.at[stage])

        @pl.loop(max(0, steps - STAGES), steps)
        def _drain(step):
            plgpu.barrier_wait(free.at[lax.rem(step, STAGES)])

    @pl.when((lower < upper) & (warpgroup < 2))
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        mine = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)

        def accumulate(acc):
            @pl.loop(0, steps)
            def _(step):
                stage = lax.rem(step, STAGES)
                plgpu.barrier_wait(ready.at[stage])
                w = w_smem.at[stage].transpose((1, 0)) if transposed else w_smem.at[stage]
                plgpu.wgmma(acc, x_smem.at[stage, mine], w)
                plgpu.wgmma_wait(1)  # the step before is done, this one runs on
                pl.when(step > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(step - 1, STAGES)]))

            return acc[...]

        acc = pl.run_scoped(accumulate, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
        plgpu.barrier_arrive(free.at[(steps - 1) % STAGES])
        first = block * BLOCK + warpgroup * ROWS
        bounds = [jnp.clip(x - warpgroup * ROWS, 0, ROWS) for x in (lower, upper)]
        for half in range(2):
            width = COLUMNS // 2
            out_smem[warpgroup] = acc[:, half * width : (half + 1) * width].astype(out_smem.dtype)
            plgpu.commit_smem()
            columns = pl.ds(column + half * width, width)

            def target(rows, columns=columns):
                return out_gmem.at[pl.ds(first + rows.start, rows.size), columns]

            store_range(out_smem.at[warpgroup], target, *bounds)
            plgpu.wait_smem_to_gmem(0)


@jax.custom_vjp
def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`. The gradient of the matrices, a sum over rows, is tokamax's.

    Raises:
      ValueError: not bfloat16, or K and N no multiples of 256 (N for the product, K for the gradient of the rows).
    """
    if rhs.shape[1] % COLUMNS:
        raise ValueError(
            f"grouped_matmul on Hopper takes bfloat16, a contraction of a multiple of {COLUMNS}, for the sake of its "
            f"gradient, but got {rhs.shape[1]}"
        )
    return _zero_past_the_end(product(lhs, rhs, group_sizes), group_sizes)


def _zero_past_the_end(x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(group_sizes), x, 0)


def _vjp_forward(lhs, rhs, group_sizes):
    return grouped_matmul(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _vjp_backward(residuals, dout):
    lhs, rhs, group_sizes = residuals
    dlhs = _zero_past_the_end(product(dout, rhs, group_sizes, transposed=True), group_sizes)
    (drhs,) = jax.vjp(lambda w: library.tokamax(lhs, w, group_sizes), rhs)[1](dout)
    return dlhs, drhs, None


grouped_matmul.defvjp(_vjp_forward, _vjp_backward)
