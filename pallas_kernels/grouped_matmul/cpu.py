"""Grouped matmul for CPUs: a loop over tiles of rows, each one dense matmul with the matrix of its group.

XLA lowers `ragged_dot` on a CPU to one masked product a group, G times the work. Here a tile starts at its
group's first row or a multiple of `TILE` after it and always reads `TILE` rows. The rows of a tile that lie past
its group's end come out wrong, but they belong to later groups, whose tiles are computed later and overwrite them.
So the forward pass needs no mask; the sum over rows of the weight gradient does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

TILE = 128


def _tiles(group_sizes: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Each tile's group, first row and end of valid rows, (rows // TILE + G,) int32 each; and how many tiles."""
    groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    counts = (group_sizes + TILE - 1) // TILE
    last = jnp.cumsum(counts)
    tile = jnp.arange(rows // TILE + groups)
    group = jnp.minimum(jnp.searchsorted(last, tile, side="right"), groups - 1)
    start = (ends - group_sizes)[group] + (tile - (last - counts)[group]) * TILE
    return group, start, ends[group], last[-1]


def _pad(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, TILE), (0, 0)))  # the last tile may read and write past the end


@jax.custom_vjp
def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`."""
    return _forward(lhs, rhs, group_sizes, transpose_rhs=False)


def _forward(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, transpose_rhs: bool) -> jax.Array:
    rows = lhs.shape[0]
    group, start, _, count = _tiles(group_sizes, rows)
    padded = _pad(lhs)
    contract = (((1,), (1 if transpose_rhs else 0,)), ((), ()))

    def tile(i: jax.Array, out: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(padded, start[i], TILE)
        y = lax.dot_general(x, rhs[group[i]], contract)
        return lax.dynamic_update_slice_in_dim(out, y, start[i], 0)

    out = jnp.zeros((rows + TILE, rhs.shape[1 if transpose_rhs else 2]), lhs.dtype)
    out = lax.fori_loop(0, count, tile, out)[:rows]
    return jnp.where(jnp.arange(rows)[:, None] < jnp.sum(group_sizes), out, 0)


def _weight_gradient(lhs: jax.Array, dout: jax.Array, group_sizes: jax.Array) -> jax.Array:
    group, start, end, count = _tiles(group_sizes, lhs.shape[0])
    lhs, dout = _pad(lhs), _pad(dout)
    offset = jnp.arange(TILE)[:, None]

    def tile(i: jax.Array, drhs: jax.Array) -> jax.Array:
        valid = start[i] + offset < end[i]
        x = jnp.where(valid, lax.dynamic_slice_in_dim(lhs, start[i], TILE), 0)
        dy = lax.dynamic_slice_in_dim(dout, start[i], TILE)
        return drhs.at[group[i]].add(x.T @ dy)

    return lax.fori_loop(0, count, tile, jnp.zeros((group_sizes.shape[0], lhs.shape[1], dout.shape[1]), lhs.dtype))


def _vjp_forward(lhs, rhs, group_sizes):
    return grouped_matmul(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _vjp_backward(residuals, dout):
    lhs, rhs, group_sizes = residuals
    dlhs = _forward(dout, rhs, group_sizes, transpose_rhs=True)
    return dlhs, _weight_gradient(lhs, dout, group_sizes), None


grouped_matmul.defvjp(_vjp_forward, _vjp_backward)
