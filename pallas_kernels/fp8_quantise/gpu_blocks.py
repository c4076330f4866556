"""Quantisation of matrices in blocks of 128 x 128 on Hopper (Mosaic GPU), as stored and transposed, in one pass.

Hopper multiplies FP8 only where both operands are contiguous along the sum: Dgrad takes a matrix (K, N) as it is, Fprop
transposed. A thread block of one warpgroup fetches a block once, and writes it both ways, as `gpu.py` does tiles.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fp8_quantise.gpu import HALF, LAYOUT, shared_tile
from pallas_kernels.fp8_quantise.reference import TILE, Scaling, encode


@functools.partial(jax.jit, static_argnames=("how", "interpret"))
def fp8_quantise_blocks(
    w: jax.Array, how: Scaling, *, interpret: plgpu.InterpretGPUParams | None = None
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """See `api.fp8_quantise_blocks`; w is (G, K, N). `interpret` runs it on a CPU, slowly."""
    groups, depth, columns = w.shape
    grid = groups, -(-depth // TILE), -(-columns // TILE)
    shape, fp8 = jax.ShapeDtypeStruct, jnp.float8_e4m3fn
    values, turned, scales = plgpu.kernel(
        functools.partial(_kernel, how=how),
        out_type=(shape(w.shape, fp8), shape((groups, columns, depth), fp8), shape(grid, jnp.float32)),
        scratch_types=dict(
            w_smem=shared_tile(w.dtype),
            values_smem=shared_tile(fp8),
            turned_smem=shared_tile(fp8),
            largest_smem=plgpu.SMEM((TILE,), jnp.float32),
            arrived=plgpu.Barrier(),
        ),
        grid=grid,
        grid_names=("matrix", "row", "column"),
        interpret=interpret,
    )(w)
    return (values, scales), (turned, scales.mT)


def _kernel(
    w_gmem, values_gmem, turned_gmem, scales_gmem, *, w_smem, values_smem, turned_smem, largest_smem, arrived, how
):  # fmt: skip
    matrix, row, column = (lax.axis_index(name) for name in ("matrix", "row", "column"))
    rows, columns = pl.ds(row * TILE, TILE), pl.ds(column * TILE, TILE)
    halves = [pl.ds(i * HALF, HALF) for i in range(2)]
    plgpu.copy_gmem_to_smem(w_gmem.at[matrix, rows, columns], w_smem, arrived)
    plgpu.barrier_wait(arrived)
    for half in halves:
        largest_smem[half] = jnp.max(jnp.abs(plgpu.load(w_smem.at[half], layout=LAYOUT).astype(jnp.float32)), axis=1)
    largest = jnp.max(largest_smem[...])

    def scale(shape: tuple[int, ...]) -> jax.Array:
        return how.of(lax.broadcast_in_dim(largest, shape, []))

    scales_gmem[matrix, row, pl.ds(column, 1)] = scale((1,))
    for half in halves:
        for block, staged in ((w_smem.at[half], values_smem), (w_smem.at[:, half].transpose((1, 0)), turned_smem)):
            wide = plgpu.load(block, layout=LAYOUT).astype(jnp.float32)
            staged[half] = encode(wide, scale(wide.shape))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values_smem, values_gmem.at[matrix, rows, columns])
    plgpu.copy_smem_to_gmem(turned_smem, turned_gmem.at[matrix, columns, rows])
    plgpu.wait_smem_to_gmem(0)
