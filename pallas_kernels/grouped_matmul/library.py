"""Grouped matmul by tokamax: for TPUs, and a peer on GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

TILE = 64
"""tokamax's kernels for Hopper copy tiles of 64 columns of each operand, and of each operand's transpose."""


def tokamax(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`: tokamax's Mosaic kernels, their block shapes from its tables. Differentiable on TPUs.

    On Hopper (tokamax 0.0.17) the gradient of the matrices was about 4% off wherever groups weren't whole tiles.

    Raises:
      ValueError: not bfloat16, or K and N no multiples of 64.
    """
    rows, depth = lhs.shape
    columns = rhs.shape[2]
    if depth % TILE or columns % TILE or lhs.dtype != jnp.bfloat16:
        raise ValueError(
            f"grouped_matmul by tokamax takes bfloat16, and a contraction and columns of multiples of {TILE}, but got "
            f"{lhs.dtype}, {depth} and {columns}"
        )
    from tokamax import ragged_dot  # a dependency of this choice only

    # The gradient of the matrices reads the rows' transpose, whose width is the number of rows.
    out = ragged_dot(jnp.pad(lhs, ((0, -rows % TILE), (0, 0))), rhs, group_sizes, implementation="mosaic")[:rows]
    row = jnp.arange(rows)[:, None]
    return jnp.where(row < jnp.sum(group_sizes), out, 0)  # rows past the last group are left unwritten
