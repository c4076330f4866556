"""Reference of the quantisation: plain `jnp`, a pass for each form."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

TILE = 128
ALIGNMENT = 8
"""Tiles along columns begin at multiples of these rows."""
FP8_MAX = 448.0


class Scaling(NamedTuple):
    """How the scale of a tile follows from its largest magnitude: max(largest, floor) / 448.

    power_of_two: it is rounded up to a power of two, so that scaling doesn't round.
    """

    floor: float = 0.0
    power_of_two: bool = False

    def of(self, largest: jax.Array) -> jax.Array:
        """Scales, float32, of magnitudes, float32; NaN where they aren't finite. At least the smallest normal."""
        # To XLA the divisor must not be a constant, with whose rounded inverse it would multiply.
        divisor = jnp.where(largest < jnp.inf, jnp.float32(FP8_MAX), jnp.nan)
        scale = jnp.maximum(jnp.maximum(largest, self.floor) / divisor, jnp.finfo(jnp.float32).tiny)
        if not self.power_of_two:
            return scale
        bits = lax.bitcast_convert_type(scale, jnp.int32)
        rounded = lax.bitcast_convert_type((bits + 0x7FFFFF) & -0x800000, jnp.float32)  # the mantissa carries
        return jnp.where(scale == scale, rounded, scale)


def encode(x: jax.Array, scales: jax.Array) -> jax.Array:
    """Divides by scales of the same shape and rounds to E4M3; clips, as a quotient may round to more than 448."""
    return jnp.clip(x / scales, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)


def spans(group_sizes: jax.Array, rows: int) -> jax.Array:
    """Cuts groups of rows into tiles of 128, which begin at multiples of 8: first, lower and upper, (tiles, 3) int32.

    Of the 128 rows from `first` on, those in [lower, upper) are in the tile. Rows of no group are a last group; further
    tiles are empty.
    """
    sizes = jnp.append(group_sizes, rows - jnp.sum(group_sizes))
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    counts = tiles_of(sizes)
    last = jnp.cumsum(counts)
    tile = jnp.arange((rows + (ALIGNMENT + TILE - 2) * len(sizes)) // TILE)  # the most that there can be
    group = jnp.minimum(jnp.sum(tile[:, None] >= last, axis=1), len(sizes) - 1)
    first = starts[group] // ALIGNMENT * ALIGNMENT + (tile - (last - counts)[group]) * TILE
    lower, upper = (jnp.clip(edge[group] - first, 0, TILE) for edge in (starts, ends))
    return jnp.stack([first, lower, jnp.where(tile < last[-1], upper, 0)], axis=1).astype(jnp.int32)


def tiles_of(sizes: jax.Array) -> jax.Array:
    """The number of tiles of each of consecutive groups of rows, (G,) int32."""
    starts = jnp.cumsum(sizes) - sizes
    return jnp.where(sizes > 0, (starts % ALIGNMENT + sizes + TILE - 1) // TILE, 0)


def fp8_quantise(
    x: jax.Array, scales: jax.Array | None, group_sizes: jax.Array | None, rows: Scaling | None, columns: Scaling | None
) -> tuple[tuple[jax.Array, jax.Array] | None, tuple[jax.Array, jax.Array] | None]:
    """See `api.fp8_quantise`."""
    wide = x.astype(jnp.float32)
    if scales is not None:
        wide = wide * jnp.repeat(scales, TILE, 1)[:, : x.shape[1]]
    return (rows and _tiles(wide, rows)), (columns and _columns(wide, group_sizes, columns))


def fp8_quantise_blocks(w: jax.Array, how: Scaling) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """See `api.fp8_quantise_blocks`."""
    groups, depth, columns = w.shape
    wide = w.astype(jnp.float32)
    whole = jnp.pad(wide, ((0, 0), (0, -depth % TILE), (0, -columns % TILE)))
    scales = how.of(jnp.max(jnp.abs(whole.reshape(groups, -(-depth // TILE), TILE, -1, TILE)), axis=(2, 4)))
    each = jnp.repeat(jnp.repeat(scales, TILE, 1), TILE, 2)[:, :depth, :columns]
    values = encode(wide, each)
    return (values, scales), (values.mT, scales.mT)


def _tiles(x: jax.Array, how: Scaling) -> tuple[jax.Array, jax.Array]:
    m, k = x.shape
    tiles = jnp.pad(x, ((0, 0), (0, -k % TILE))).reshape(m, -1, TILE)
    scales = how.of(jnp.max(jnp.abs(tiles), axis=2))
    return encode(tiles, jnp.broadcast_to(scales[..., None], tiles.shape)).reshape(m, -1)[:, :k], scales


def _columns(x: jax.Array, group_sizes: jax.Array | None, how: Scaling) -> tuple[jax.Array, jax.Array]:
    values, scales = _tiles(aligned(x, group_sizes).T, how)
    return values, scales.T


def aligned(x: jax.Array, group_sizes: jax.Array | None) -> jax.Array:
    """Rows (M, K) where the tiles along columns have them: (M', K'), filled up with zeros; see `api.fp8_quantise`."""
    m, k = x.shape
    if group_sizes is not None:
        first, lower, upper = spans(group_sizes, m).T[..., None]
        row = jnp.arange(TILE)
        source = jnp.where((row >= lower) & (row < upper), first + row, m).ravel()
        x = x.at[source].get(mode="fill", fill_value=0)
    return jnp.pad(x, ((0, -len(x) % TILE), (0, -k % TILE)))
