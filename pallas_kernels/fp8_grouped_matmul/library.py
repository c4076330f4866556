"""FP8 grouped matmul on TPUs, by tokamax's kernel for bfloat16 rows and quantised matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.fp8_grouped_matmul.reference import BLOCK
from pallas_kernels.grouped_matmul import library


def tokamax(
    lhs: jax.Array, lhs_scales: jax.Array, rhs: jax.Array, rhs_scales: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """See `api.fp8_grouped_matmul`. Products are of bfloat16: not FP8's speed, but FP8's matrices in memory.

    tokamax takes one scale for all FP8 rows, or draws its own for 512 elements; and matrices as (G, K, N). So the rows
    are made bfloat16 in memory, scales applied, and the matrices transposed there as they are, one byte an element; a
    caller's own layout can save that (README.md). The kernel makes each tile of a matrix bfloat16, scales applied, in
    vector memory.
    """
    # tokamax applies a matrix's scales before the product if their blocks are smaller than the matrix units, else after
    # it: then E4M3 itself would go to matrix units that don't know it (v5p's).
    block = min(BLOCK, pltpu.get_tpu_info().mxu_column_size // 2)
    scales = jnp.repeat(jnp.repeat(jnp.swapaxes(rhs_scales, 1, 2), BLOCK // block, 1), BLOCK, 2)
    return library.product(_bfloat16(lhs, lhs_scales), jnp.swapaxes(rhs, 1, 2), group_sizes, scales=scales)


def _bfloat16(lhs: jax.Array, scales: jax.Array) -> jax.Array:
    """The rows with their scales applied; block by block, or else XLA writes out a scale for every element."""

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        block = lax.dynamic_slice_in_dim(lhs, i * BLOCK, BLOCK, 1).astype(jnp.float32)
        scaled = block * lax.dynamic_slice_in_dim(scales, i, 1, 1)
        return lax.dynamic_update_slice_in_dim(out, scaled.astype(jnp.bfloat16), i * BLOCK, 1)

    rows: jax.Array = lax.fori_loop(0, scales.shape[1], one, lax.empty(lhs.shape, jnp.bfloat16))
    return rows
