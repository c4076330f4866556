"""FP8 matmuls in plain `jnp`, exact in rounding, scales and order of summation: used on CPUs, and as reference in
tests.

The matrix units multiply e4m3 numbers and sum 128 products, which are then scaled and added to a float32 accumulator
(report section 3.3.2). Since e4m3 numbers are exact in every wider dtype, only sums round here. Groups are consecutive
rows, each with its own matrix, as for experts; without groups there is a single matrix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.quantization.fp8 import TILE
from pallas_kernels.devices import platform
from pallas_kernels.grouped_matmul import grouped_matmul


def multiply(
    x: jax.Array, x_scales: jax.Array, w: jax.Array, w_scales: jax.Array, group_sizes: jax.Array | None = None
) -> jax.Array:
    """Multiplies FP8 rows with FP8 matrices: (M, N) float32. Rows after the last group are zero.

    Args:
      x: (M, K) e4m3. x_scales: (M, ceil(K / 128)) float32.
      w: (K, N) e4m3, or (G, K, N) with groups. w_scales: (..., ceil(K / 128), ceil(N / 128)) float32.
      group_sizes: (G,) int32, rows of each group.
    """
    rows, depth, columns = *x.shape, w.shape[-1]
    steps = x_scales.shape[1]
    fill = (0, steps * TILE - depth)
    x, w = jnp.pad(x, ((0, 0), fill)), jnp.pad(w, ((0, 0),) * (w.ndim - 2) + (fill, (0, 0)))
    if group_sizes is not None:
        w_scales = w_scales[_group_of_row(group_sizes, rows)]  # (M, K / 128, N / 128)

    def step(k: jax.Array, total: jax.Array) -> jax.Array:
        x_k = lax.dynamic_slice_in_dim(x, k * TILE, TILE, 1).astype(jnp.float32)
        w_k = lax.dynamic_slice_in_dim(w, k * TILE, TILE, w.ndim - 2).astype(jnp.float32)
        part = x_k @ w_k if group_sizes is None else _grouped(x_k, w_k, group_sizes)
        of_w = jnp.repeat(jnp.take(w_scales, k, axis=-2), TILE, axis=-1)[..., :columns]
        return total + part * (jnp.take(x_scales, k, axis=1)[:, None] * of_w)

    total: jax.Array = lax.fori_loop(0, steps, step, jnp.zeros((rows, columns), jnp.float32))
    return total


def weight_gradient(
    x: jax.Array, x_scales: jax.Array, dy: jax.Array, dy_scales: jax.Array, group_steps: jax.Array | None = None
) -> jax.Array:
    """Multiplies transposed rows with rows: (K, N) float32, or (G, K, N) with groups.

    Args:
      x: (M, K) e4m3, M a multiple of 128. x_scales: (M / 128, K): of tiles of 128 rows x 1.
      dy: (M, N). dy_scales: (M / 128, N).
      group_steps: (G,) int32: rows of each group, in units of 128. Rows after the last group are ignored.
    """
    shape = (x.shape[1], dy.shape[1])
    group = (
        None if group_steps is None else jnp.searchsorted(jnp.cumsum(group_steps), jnp.arange(len(x_scales)), "right")
    )

    def step(m: jax.Array, total: jax.Array) -> jax.Array:
        x_m, dy_m = (lax.dynamic_slice_in_dim(a, m * TILE, TILE, 0).astype(jnp.float32) for a in (x, dy))
        part = (x_m.T @ dy_m) * (x_scales[m][:, None] * dy_scales[m])
        return total + part if group is None else total.at[group[m]].add(part, mode="drop")

    start = jnp.zeros(shape if group_steps is None else (len(group_steps), *shape), jnp.float32)
    total: jax.Array = lax.fori_loop(0, len(x_scales), step, start)
    return total


def _group_of_row(group_sizes: jax.Array, rows: int) -> jax.Array:
    ends = jnp.cumsum(group_sizes)
    return jnp.minimum(jnp.searchsorted(ends, jnp.arange(rows), side="right"), len(group_sizes) - 1)


def _grouped(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return grouped_matmul(x, w, group_sizes, implementation="blocked" if platform() == "cpu" else "ragged")
