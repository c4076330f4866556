"""The three matmuls of a layer in FP8, Fprop, Dgrad and Wgrad, by the recipe's implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dsv3_jax.quantization import emulation
from dsv3_jax.quantization.fp8 import TILE
from dsv3_jax.quantization.recipe import Quantised, Recipe
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_swiglu, fp8_grouped_weight_gradient
from pallas_kernels.fp8_quantise import tiles_of


def multiply(
    recipe: Recipe, x: Quantised, w: Quantised, group_sizes: jax.Array | None = None, *, transposed: bool = False
) -> jax.Array:
    """Multiplies rows with a matrix, or each group of rows with its own (Fprop; transposed, Dgrad).

    Args:
      x: rows (M, K) in tiles along K, from `Recipe.rows`.
      w: matrices (K, N), or (G, K, N) with groups, from `Recipe.matrices`; transposed, (..., N, K).
      group_sizes: (G,) int32, rows of each group. Rows after the last group give zero.

    Returns (M, N), float32 (the emulation) or bfloat16 (the kernels).
    """
    (values, scales), swap = w, functools.partial(jnp.swapaxes, axis1=-2, axis2=-1)
    if recipe.implementation == "emulation":
        w = (swap(values), swap(scales)) if transposed else w
        return emulation.multiply(*x, *w, group_sizes)
    if not transposed:  # the kernel's matrices are contiguous along K
        values, scales = swap(values), swap(scales)
    columns = values.shape[-2]
    rows, w, group_sizes = _for_kernel(x, (values, scales), group_sizes)
    return fp8_grouped_matmul(*rows, *w, group_sizes, implementation="gpu")[:, :columns]


def gate_and_up(
    recipe: Recipe, x: Quantised, gate: Quantised, up: Quantised, group_sizes: jax.Array | None = None
) -> jax.Array:
    """Computes silu(x gate) * (x up) by kernels, in one pass for few rows: (M, N) bfloat16, see `fp8_grouped_swiglu`.

    Args: as in `multiply`, with both matrices transposed, (..., N, K).
    """
    columns = gate[0].shape[-2]
    _, gate, _ = _for_kernel(x, gate, group_sizes)
    rows, up, group_sizes = _for_kernel(x, up, group_sizes)
    return fp8_grouped_swiglu(*rows, gate, up, group_sizes, implementation="gpu")[:, :columns]


def _for_kernel(x: Quantised, w: Quantised, group_sizes: jax.Array | None) -> tuple[Quantised, Quantised, jax.Array]:
    """Rows, matrices (..., N, K) and sizes as kernels take them: with groups, and filled up to whole tiles."""
    values, scales = w
    if group_sizes is None:
        values, scales, group_sizes = values[None], scales[None], jnp.full((1,), len(x[0]), jnp.int32)
    along = (0, -values.shape[-1] % TILE)
    rows = jnp.pad(x[0], ((0, 0), along)), x[1]
    return rows, (jnp.pad(values, ((0, 0), (0, -values.shape[1] % (TILE // 2)), along)), scales), group_sizes


def weight_gradient(
    recipe: Recipe, x: Quantised, dy: Quantised, shape: tuple[int, int], group_sizes: jax.Array | None = None
) -> jax.Array:
    """Sums x^T dy over rows (Wgrad): (K, N), or (G, K, N) with groups, float32.

    Args:
      x, dy: from `Recipe.columns`, of rows (M, K) and (M, N). shape: (K, N).
      group_sizes: (G,) int32, rows of each group.
    """
    depth, columns = shape
    steps = None if group_sizes is None else tiles_of(group_sizes)
    if recipe.implementation == "emulation":
        return emulation.weight_gradient(x[0].T, x[1], dy[0].T, dy[1], steps)[..., :depth, :columns]
    one = jnp.full((1,), len(x[1]), jnp.int32)
    out = fp8_grouped_weight_gradient(*x, *dy, one if steps is None else steps, implementation="gpu")
    out = out[:, :depth, :columns]
    return out[0] if steps is None else out
