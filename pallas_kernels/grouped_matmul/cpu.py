"""Grouped matmul, and the experts made of it, for CPUs: for each group, a loop over tiles of its rows.

XLA lowers `ragged_dot` on a CPU to one masked product a group, G times the work. Here a tile starts at its group's
first row or a multiple of its size after it, and rows of it that are another group's are left alone. Tiles have one
size: near the end of the rows, where one wouldn't fit, it is moved up. A matrix's gradient is summed over the tiles in
float32 or wider, whatever the dtype of the operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.reference import swiglu


def _tile(rows: int, groups: int) -> int:
    """Rows of a tile: few where groups have few, as in decoding, whose tiles would be mostly other groups' rows.

    Measured in float32 with AVX2, matrices of 128 x 96 to 1024 x 704: 24 takes a fifth less time than 32.
    """
    usual = rows // groups
    return min(rows, 4 if usual < 16 else 24 if usual < 256 else 48)


def _rows(x: jax.Array, at: jax.Array, mine: jax.Array) -> jax.Array:
    """The rows from `at` on, as many as `mine` has."""
    return lax.dynamic_slice_in_dim(x, at, len(mine))


def _write(out: jax.Array, rows: jax.Array, at: jax.Array, mine: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, rows, _rows(out, at, mine)), at, 0)


def _wide_product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _wide_zeros(w: jax.Array) -> jax.Array:
    return jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32))


def _over_groups(group_sizes: jax.Array, group: Callable[[jax.Array, Any], Any], start: Any) -> Any:
    """Folds `group(g, so far)` over the groups that have rows: in decoding few, and no other matrix is read."""
    order = jnp.argsort(group_sizes == 0)
    return lax.fori_loop(0, jnp.count_nonzero(group_sizes), lambda i, so_far: group(order[i], so_far), start)


def _over_tiles(
    g: jax.Array, rows: int, group_sizes: jax.Array, tile: Callable[[jax.Array, jax.Array, Any], Any], start: Any
) -> Any:
    """Folds `tile(first row, which of its rows are new ones of the group (tile, 1), so far)` over group g's tiles."""
    size = _tile(rows, len(group_sizes))
    end = jnp.cumsum(group_sizes)[g]
    if size == rows:  # a loop of one turn would cost more than it does
        row = jnp.arange(rows)[:, None]
        return tile(jnp.int32(0), (row >= end - group_sizes[g]) & (row < end), start)

    def step(i: jax.Array, so_far: Any) -> Any:
        first = end - group_sizes[g] + i * size
        at = jnp.minimum(first, rows - size)
        row = at + jnp.arange(size)[:, None]
        return tile(at, (row >= first) & (row < end), so_far)

    return lax.fori_loop(0, (group_sizes[g] + size - 1) // size, step, start)


@jax.custom_vjp
def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`."""
    return _forward(lhs, rhs, group_sizes, transpose_rhs=False)


def _forward(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, transpose_rhs: bool) -> jax.Array:
    contract = (((1,), (1 if transpose_rhs else 0,)), ((), ()))

    def group(g: jax.Array, out: jax.Array) -> jax.Array:
        matrix = rhs[g]

        def tile(at: jax.Array, mine: jax.Array, out: jax.Array) -> jax.Array:
            return _write(out, lax.dot_general(_rows(lhs, at, mine), matrix, contract), at, mine)

        written: jax.Array = _over_tiles(g, len(lhs), group_sizes, tile, out)
        return written

    empty = jnp.zeros((len(lhs), rhs.shape[1 if transpose_rhs else 2]), lhs.dtype)
    out: jax.Array = _over_groups(group_sizes, group, empty)
    return out


def _weight_gradient(lhs: jax.Array, dout: jax.Array, group_sizes: jax.Array) -> jax.Array:
    def group(g: jax.Array, drhs: jax.Array) -> jax.Array:
        def tile(at: jax.Array, mine: jax.Array, total: jax.Array) -> jax.Array:
            return total + _wide_product(jnp.where(mine, _rows(lhs, at, mine), 0).T, _rows(dout, at, mine))

        total = _over_tiles(g, len(lhs), group_sizes, tile, _wide_zeros(drhs[0]))
        updated: jax.Array = lax.dynamic_update_index_in_dim(drhs, total.astype(drhs.dtype), g, 0)
        return updated

    empty = jnp.zeros((len(group_sizes), lhs.shape[1], dout.shape[1]), lhs.dtype)
    drhs: jax.Array = _over_groups(group_sizes, group, empty)
    return drhs


def _vjp_forward(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return grouped_matmul(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _vjp_backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array], dout: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    lhs, rhs, group_sizes = residuals
    dlhs = _forward(dout, rhs, group_sizes, transpose_rhs=True)
    return dlhs, _weight_gradient(lhs, dout, group_sizes), None


grouped_matmul.defvjp(_vjp_forward, _vjp_backward)


@jax.custom_vjp
def grouped_swiglu(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    factors: jax.Array,
    group_sizes: jax.Array,
    first: jax.Array | int = 0,
) -> jax.Array:
    """See `api.grouped_swiglu`: here a tile goes through all three products while it is in the cache."""
    return _swiglu_forward(x, gate, up, down, factors, group_sizes, first, for_gradient=False)[0]


def _swiglu_forward(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    factors: jax.Array,
    group_sizes: jax.Array,
    first: jax.Array | int,
    *,
    for_gradient: bool,
) -> tuple[jax.Array, ...]:
    """The result (M, D) and, for a gradient, what gate and up made of each row, (M, F) each."""

    def group(g: jax.Array, out: Any) -> Any:
        def tile(at: jax.Array, mine: jax.Array, out: Any) -> Any:
            w_gate, w_up, w_down, rows = gate[first + g], up[first + g], down[first + g], _rows(x, at, mine)
            a, b = rows @ w_gate, rows @ w_up
            made = (swiglu(a, b, _rows(factors, at, mine)) @ w_down, a, b)[: len(out)]
            return tuple(_write(o, m, at, mine) for o, m in zip(out, made, strict=True))

        return _over_tiles(g, len(x), group_sizes, tile, out)

    widths = (down.shape[2], gate.shape[2], gate.shape[2]) if for_gradient else (down.shape[2],)
    empty = tuple(jnp.zeros((len(x), width), x.dtype) for width in widths)
    out: tuple[jax.Array, ...] = _over_groups(group_sizes, group, empty)
    return out


def _swiglu_vjp_forward(*operands: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    y, a, b = _swiglu_forward(*operands, for_gradient=True)
    return y, (*operands, a, b)


def _swiglu_vjp_backward(residuals: tuple[Any, ...], dy: jax.Array) -> tuple[jax.Array | None, ...]:
    x, gate, up, down, factors, group_sizes, first, a, b = residuals

    def group(g: jax.Array, out: Any) -> Any:
        dx, dfactors, weights = out
        matrix = first + g
        w_gate, w_up, w_down = gate[matrix], up[matrix], down[matrix]

        def tile(at: jax.Array, mine: jax.Array, out: Any) -> Any:
            dx, dfactors, dw_gate, dw_up, dw_down = out
            dy_rows = jnp.where(mine, _rows(dy, at, mine), 0)
            h, swiglu_vjp = jax.vjp(swiglu, *(_rows(z, at, mine) for z in (a, b, factors)))
            da, db, df = swiglu_vjp(dy_rows @ w_down.T)
            rows = _rows(x, at, mine)
            dx = _write(dx, da @ w_gate.T + db @ w_up.T, at, mine)
            new = (_wide_product(rows.T, da), _wide_product(rows.T, db), _wide_product(h.T, dy_rows))
            return dx, _write(dfactors, df, at, mine), dw_gate + new[0], dw_up + new[1], dw_down + new[2]

        start = (dx, dfactors, *map(_wide_zeros, (w_gate, w_up, w_down)))
        dx, dfactors, *sums = _over_tiles(g, len(x), group_sizes, tile, start)
        store = lambda w, s: lax.dynamic_update_index_in_dim(w, s.astype(w.dtype), matrix, 0)
        return dx, dfactors, tuple(map(store, weights, sums))

    empty = (jnp.zeros_like(x), jnp.zeros_like(factors), tuple(jnp.zeros_like(w) for w in (gate, up, down)))
    dx, dfactors, weights = _over_groups(group_sizes, group, empty)
    return dx, *weights, dfactors, None, None


grouped_swiglu.defvjp(_swiglu_vjp_forward, _swiglu_vjp_backward)
