"""Groups of rows of any size on hardware that works on blocks: shared by the grouped matmuls for Hopper."""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

BLOCK = 128
"""Rows of a block; blocks start at its multiples, as the copy engine wants."""


def visits(group_sizes: jax.Array, count: int) -> jax.Array:
    """Which group visits which block of rows. A block of several groups' rows is visited once by each.

    Args:
      group_sizes: (G,) int32.
      count: how many visits to make room for; rows / BLOCK + G always suffices.

    Returns:
      (count, 4) int32: a visit's group, its block, and from where to where the block's rows are the group's
      (an empty range where there is no visit).
    """
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    first = starts // BLOCK
    counts = jnp.where(group_sizes > 0, (ends + BLOCK - 1) // BLOCK - first, 0)
    last = jnp.cumsum(counts)
    visit = jnp.arange(count)
    real = visit < last[-1]
    group = jnp.minimum(jnp.sum(visit[:, None] >= last, axis=1), group_sizes.shape[0] - 1)
    block = jnp.where(real, first[group] + visit - (last - counts)[group], 0)
    lower = jnp.clip(starts[group] - block * BLOCK, 0, BLOCK)
    upper = jnp.where(real, jnp.clip(ends[group] - block * BLOCK, 0, BLOCK), lower)
    return jnp.stack([group, block, lower, upper], axis=1).astype(jnp.int32)


def store_range(source, target, lower: jax.Array, upper: jax.Array) -> None:
    """Starts copying rows [lower, upper) of `source` (shared memory) to the same rows of `target`.

    Copies have fixed lengths: they go in runs of 64, 32, ... 1 rows. `target` is a function of a slice of rows.
    """
    length, done = upper - lower, lower
    for bit in reversed(range(source.shape[0].bit_length())):
        run = 1 << bit

        @pl.when((length & run) != 0)
        def _(run=run, done=done):
            plgpu.copy_smem_to_gmem(source.at[pl.ds(done, run)], target(pl.ds(done, run)))

        done += length & run
