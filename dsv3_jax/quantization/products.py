"""The three matmuls of a layer in FP8, Fprop, Dgrad and Wgrad, by the recipe's implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dsv3_jax.quantization import emulation
from dsv3_jax.quantization.fp8 import TILE
from dsv3_jax.quantization.recipe import Recipe
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_weight_gradient

type Quantised = tuple[jax.Array, jax.Array]
"""E4m3 values and their float32 scales."""


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
    if group_sizes is None:
        values, scales, group_sizes = values[None], scales[None], jnp.full((1,), len(x[0]), jnp.int32)
    fill = tuple((0, -n % TILE) for n in values.shape[1:])
    rows = jnp.pad(x[0], ((0, 0), fill[1]))
    values = jnp.pad(values, ((0, 0), *fill))
    return fp8_grouped_matmul(rows, x[1], values, scales, group_sizes, implementation="gpu")[:, :columns]


def weight_gradient(
    recipe: Recipe,
    x: jax.Array,
    dy: jax.Array,
    group_sizes: jax.Array | None = None,
    *,
    power_of_two: bool = False,
) -> jax.Array:
    """Sums x^T dy over rows (Wgrad): x (M, K), dy (M, N) of any float dtype -> (K, N), or (G, K, N), float32.

    Both are quantised here in tiles of 128 rows x 1, which start anew for each group, so that the scales of a group
    don't depend on other rows.
    """
    group_steps = None
    if group_sizes is not None:
        source, group_steps = _align(group_sizes, len(x))
        x, dy = (a.at[source].get(mode="fill", fill_value=0) for a in (x, dy))
    fill = ((0, -len(x) % TILE), (0, 0))
    x, dy = jnp.pad(x, fill), jnp.pad(dy, fill)
    of_x, of_dy = recipe.columns(x, power_of_two=power_of_two), recipe.columns(dy, gradient=True)
    if recipe.implementation == "emulation":
        return emulation.weight_gradient(*of_x, *of_dy, group_steps)
    steps = jnp.full((1,), len(x) // TILE, jnp.int32) if group_steps is None else group_steps
    operands = [(_whole(values.T, 0), _whole(scales, 1)) for values, scales in (of_x, of_dy)]
    out = fp8_grouped_weight_gradient(*operands[0], *operands[1], steps, implementation="gpu")
    out = out[:, : x.shape[1], : dy.shape[1]]
    return out[0] if group_steps is None else out


def _align(group_sizes: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Aligns groups to multiples of 128 rows: the row of each place (`rows` for none), and units of 128 per group."""
    steps = (group_sizes + TILE - 1) // TILE
    last, ends = jnp.cumsum(steps), jnp.cumsum(group_sizes)
    step = jnp.arange(rows // TILE + len(group_sizes))
    group = jnp.minimum(jnp.searchsorted(last, step, "right"), len(group_sizes) - 1)
    first = (ends - group_sizes)[group] + (step - (last - steps)[group]) * TILE
    row = first[:, None] + jnp.arange(TILE)
    return jnp.where((row < ends[group][:, None]) & (step < last[-1])[:, None], row, rows).ravel(), steps


def _whole(a: jax.Array, axis: int) -> jax.Array:
    """Pads an axis with zeros to a multiple of 128."""
    return jnp.pad(a, [(0, -n % TILE if i == axis else 0) for i, n in enumerate(a.shape)])
