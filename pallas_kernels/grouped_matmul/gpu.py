"""Grouped matmul on Hopper (Mosaic GPU), bfloat16: wgmma, TMA, two multiplying warpgroups and one that fetches.

A thread block computes 128 rows times 256 columns of a product, 64 rows a warpgroup, in steps of 64 along the
contraction. Two blocks that need the same right-hand side form a cluster and fetch half of it each, for both: without
that, feeding the matrix units would take more bytes from L2 than it gives.

In the product, a block of 128 rows may belong to several groups: each visits it, computes all of it and stores its own
rows. The gradient of the rows reads the matrices as they lie: the matrix units take them contiguous along either axis,
so that nothing is transposed in memory. Nor is it in the gradient of the matrices, a product of transposed rows.

Widths needn't be multiples of a tile: what the copy engine reads beyond an array's edge is zero, what it would write
there is dropped. Only its boxes of 64 columns must be whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import gpu_few_rows
from pallas_kernels.row_blocks import (
    BLOCK,
    SWATH,
    TILE_ROWS,
    TILED,
    each_tile,
    fetch_shared,
    fetch_tiles,
    launch,
    stage_barriers,
    staging,
    store_rows,
    visit_of,
    visits,
)

ROWS, COLUMNS, DEPTH = 64, 256, 64  # of a warpgroup's product in one step
STAGES = 4
FEW = 96
"""Rows per group, on average, up to which `gpu_few_rows` is taken: measured faster up to there."""
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


@functools.partial(jax.jit, static_argnames=("transposed", "interpret"))
def product(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    transposed: bool = False,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """See `api.grouped_matmul`; `transposed` takes matrices (G, N, K).

    Raises:
      ValueError: not bfloat16, or K and N no multiples of 64.
    """
    rows, depth = lhs.shape
    columns = rhs.shape[1] if transposed else rhs.shape[2]
    _check(lhs, rhs, depth, columns)
    cluster = 1 if interpret else 2  # the interpreter knows no clusters
    # Rows past the last group are a group without a matrix.
    group_sizes = jnp.append(group_sizes, rows - jnp.sum(group_sizes))
    count = -(-(-(-rows // BLOCK) + len(group_sizes)) // SWATH) * SWATH
    w_shape = (COLUMNS, DEPTH) if transposed else (DEPTH, COLUMNS)
    tiles = count // cluster * (-(-columns // COLUMNS))
    return plgpu.kernel(
        functools.partial(_product, tiles=tiles, steps=depth // DEPTH, transposed=transposed, cluster=cluster),
        out_type=jax.ShapeDtypeStruct((rows + -rows % TILE_ROWS, columns), lhs.dtype),
        scratch_types=_scratch((BLOCK, DEPTH), w_shape, cluster, copies=2),
        **launch(tiles, cluster, interpret),
    )(_whole(lhs), rhs, visits(group_sizes, count))[:rows]


def _product(
    x_gmem, w_gmem, work_gmem, out_gmem, *, x_smem, w_smem, out_smem, tiles, steps, transposed, cluster, **barriers
):
    warpgroup = lax.axis_index("warpgroup")
    groups, column_blocks = w_gmem.shape[0], -(-out_gmem.shape[1] // COLUMNS)
    mine = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)

    def prepare(tile):
        column_block, group, block, lower, upper, shared = visit_of(tile, work_gmem, column_blocks, cluster)

        def fetch(step, stage, ready):
            depth, columns = pl.ds(step * DEPTH, DEPTH), pl.ds(column_block * COLUMNS, COLUMNS)
            w = w_gmem.at[group, columns, depth] if transposed else w_gmem.at[group, depth, columns]
            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(block * BLOCK, BLOCK), depth], x_smem.at[stage], ready)
            fetch_shared(w, w_smem.at[stage], ready, shared)

        return jnp.where((lower < upper) & (group < groups), steps, 0), shared, fetch

    def multiply(tile):
        column_block, group, block, lower, upper, _ = visit_of(tile, work_gmem, column_blocks, cluster)

        def step(acc, _, stage):
            w = w_smem.at[stage].transpose((1, 0)) if transposed else w_smem.at[stage]
            plgpu.wgmma(acc, x_smem.at[stage, mine], w)

        def store(values, columns):
            span = jnp.clip(lower - warpgroup * ROWS, 0, ROWS), jnp.clip(upper - warpgroup * ROWS, 0, ROWS)
            first, columns = (
                block * BLOCK + warpgroup * ROWS,
                pl.ds(column_block * COLUMNS + columns.start, columns.size),
            )
            target = lambda rows: out_gmem.at[pl.ds(first + rows.start, rows.size), columns]
            store_rows(out_smem, values, target, span)

        return jnp.where(group < groups, steps, 0), lower < upper, step, store

    _run(tiles, prepare, multiply, **barriers)


@functools.partial(jax.jit, static_argnames="interpret")
def matrix_gradient(
    lhs: jax.Array,
    dout: jax.Array,
    group_sizes: jax.Array,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """The gradient of the matrices: for each group, its rows of `lhs` (M, K) transposed times those of `dout` (M, N).

    Returns (G, K, N) of their dtype, zero for groups without rows.

    Raises:
      ValueError: not bfloat16, or K and N no multiples of 64.
    """
    depth, columns, groups = lhs.shape[1], dout.shape[1], len(group_sizes)
    _check(lhs, dout, depth, columns)
    cluster = 1 if interpret else 2
    ends = jnp.cumsum(group_sizes)
    spans = jnp.stack([ends - group_sizes, ends], axis=1).astype(jnp.int32)
    tiles = groups * (-(-columns // COLUMNS)) * (-(-depth // (BLOCK * cluster)))
    return plgpu.kernel(
        functools.partial(_matrix_gradient, tiles=tiles, cluster=cluster),
        out_type=jax.ShapeDtypeStruct((groups, depth, columns), lhs.dtype),
        scratch_types=_scratch((2, DEPTH, ROWS), (DEPTH, COLUMNS), cluster, copies=3),
        **launch(tiles, cluster, interpret),
    )(_whole(lhs), _whole(dout), spans)


def _check(lhs: jax.Array, other: jax.Array, depth: int, columns: int) -> None:
    if depth % DEPTH or columns % DEPTH or {lhs.dtype, other.dtype} != {jnp.dtype(jnp.bfloat16)}:
        raise ValueError(
            f"grouped_matmul on Hopper takes bfloat16 and matrices of multiples of {DEPTH}, but got {lhs.dtype} and "
            f"{other.dtype}, {depth} x {columns}"
        )


def _whole(rows: jax.Array) -> jax.Array:
    """Filled up to a number of rows that the copy engine takes."""
    return jnp.pad(rows, ((0, -len(rows) % TILE_ROWS), (0, 0))) if len(rows) % TILE_ROWS else rows


def _matrix_gradient(x_gmem, dy_gmem, span_gmem, out_gmem, *, x_smem, w_smem, out_smem, tiles, cluster, **barriers):
    warpgroup = lax.axis_index("warpgroup")
    _, depth, columns = out_gmem.shape
    row_blocks, column_blocks = -(-depth // (BLOCK * cluster)), -(-columns // COLUMNS)

    def place(tile):
        group, rest = tile // (row_blocks * column_blocks), lax.rem(tile, row_blocks * column_blocks)
        row = (lax.rem(rest, row_blocks) * cluster + lax.axis_index("cluster")) * BLOCK
        begin, end = span_gmem[group, 0], span_gmem[group, 1]
        first = begin // DEPTH  # of the blocks of rows, each a step of the contraction
        steps = jnp.where(begin < end, (end + DEPTH - 1) // DEPTH - first, 0)
        return group, row, rest // row_blocks * COLUMNS, begin, end, first, steps

    def prepare(tile):
        _, row, column, _, _, first, steps = place(tile)

        def fetch(step, stage, ready):
            depth = pl.ds((first + step) * DEPTH, DEPTH)
            for w in range(2):
                plgpu.copy_gmem_to_smem(x_gmem.at[depth, pl.ds(row + w * ROWS, ROWS)], x_smem.at[stage, w], ready)
            fetch_shared(dy_gmem.at[depth, pl.ds(column, COLUMNS)], w_smem.at[stage], ready, cluster > 1)

        return steps, cluster > 1, fetch

    def multiply(tile):
        group, row, column, begin, end, first, steps = place(tile)

        def step(acc, i, stage):
            x = x_smem.at[stage, warpgroup]
            position = (first + i) * DEPTH

            @pl.when((position < begin) | (position + DEPTH > end))
            def _():  # rows of other groups add nothing
                index = position + plgpu.broadcasted_iota(jnp.int32, (DEPTH, ROWS), 0, layout=plgpu.Layout.WGMMA)
                x[...] = jnp.where((index >= begin) & (index < end), plgpu.load(x, layout=plgpu.Layout.WGMMA), 0)
                plgpu.commit_smem()

            plgpu.wgmma(acc, x.transpose((1, 0)), w_smem.at[stage])

        def store(values, columns):
            columns = pl.ds(column + columns.start, columns.size)
            target = lambda rows: out_gmem.at[group, pl.ds(row + warpgroup * ROWS + rows.start, rows.size), columns]
            store_rows(out_smem, values, target)

        return steps, True, step, store

    _run(tiles, prepare, multiply, **barriers)


def _scratch(x_shape: tuple[int, ...], w_shape: tuple[int, ...], cluster: int, copies: int) -> dict:
    return dict(
        x_smem=plgpu.SMEM((STAGES, *x_shape), jnp.bfloat16, transforms=TILED),
        w_smem=plgpu.SMEM((STAGES, *w_shape), jnp.bfloat16, transforms=TILED),
        out_smem=staging(ROWS, COLUMNS // 2),
        **stage_barriers(STAGES, copies, cluster),
    )


def _run(tiles: int, prepare: Callable, multiply: Callable, *, ready, free, cluster_free) -> None:
    """A thread block's tiles.

    `prepare` is as in `fetch_tiles`. `multiply(tile)` gives the number of steps, whether there is anything to store, a
    function `(acc, step, stage)` that multiplies what has been fetched, and one that stores values as a slice of the
    tile's columns.
    """
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == 2)(lambda: fetch_tiles(tiles, STAGES, prepare, ready, free, cluster_free))

    def one(tile, _):
        steps, busy, step, store = multiply(tile)

        def accumulate(acc):
            @pl.loop(0, steps)
            def _(i):
                stage = lax.rem(i, STAGES)
                plgpu.barrier_wait(ready.at[stage])
                step(acc, i, stage)
                plgpu.wgmma_wait(1)  # the step before is done, this one runs on
                pl.when(i > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(i - 1, STAGES)]))

            return acc[...]

        def result():
            acc = pl.run_scoped(accumulate, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
            pl.when(steps > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(steps - 1, STAGES)]))
            half = COLUMNS // 2
            for start in (0, half):
                store(acc[:, start : start + half].astype(jnp.bfloat16), pl.ds(start, half))

        pl.when(busy)(result)

    @pl.when(warpgroup < 2)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        each_tile(tiles, one)
        plgpu.wait_smem_to_gmem(0)


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`. Widths are filled up with zeros to multiples of 64: a copy, if there are any to add.

    Raises:
      ValueError: not bfloat16.
    """
    columns = rhs.shape[2]
    out = _grouped_matmul(_fill(lhs), _fill(rhs, rhs.ndim - 2), group_sizes)[:, :columns]
    # A result that is also stored into an array of all layers, for the gradient, XLA would compute twice: it fuses the
    # kernel with that store, in a copy of its own (jax 0.11.2).
    kept: jax.Array = lax.optimization_barrier(out)
    return kept


def grouped_swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_swiglu`: gate and up in one pass, for few rows. Differentiable.

    Raises:
      ValueError: not bfloat16.
    """
    columns = down.shape[2]
    x, gate, up, down = _fill(x), _fill(gate, 1), _fill(up, 1), _fill(down, 1)
    return _few_swiglu(x, gate, up, down, group_sizes)[:, :columns]


def few(rows: int, groups: int) -> bool:
    """Whether rows are so few that the bytes of the matrices bind."""
    return rows <= FEW * groups


def _fill(a: jax.Array, first: int = 1) -> jax.Array:
    """With its axes from `first` on filled up with zeros to multiples of `DEPTH`."""
    extra = [(0, -n % DEPTH if axis >= first else 0) for axis, n in enumerate(a.shape)]
    return jnp.pad(a, extra) if any(n for _, n in extra) else a


@jax.custom_vjp
def _few_swiglu(x, gate, up, down, group_sizes):
    return gpu_few_rows.product(gpu_few_rows.swiglu(x, gate, up, group_sizes), down, group_sizes)


def _few_swiglu_forward(*a):
    return _few_swiglu(*a), a


def _few_swiglu_backward(a, dout):
    *a, group_sizes = a
    product = functools.partial(_grouped_matmul, group_sizes=group_sizes)
    three = lambda x, gate, up, down: product(jax.nn.silu(product(x, gate)) * product(x, up), down)
    return *jax.vjp(three, *a)[1](dout), None


_few_swiglu.defvjp(_few_swiglu_forward, _few_swiglu_backward)


@jax.custom_vjp
def _grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    forward = gpu_few_rows.product if few(len(lhs), len(rhs)) else product
    return forward(lhs, rhs, group_sizes)


def _vjp_forward(lhs, rhs, group_sizes):
    return _grouped_matmul(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _vjp_backward(residuals, dout):
    lhs, rhs, group_sizes = residuals
    dlhs = product(dout, rhs, group_sizes, transposed=True)
    return dlhs, matrix_gradient(lhs, dout, group_sizes), None


_grouped_matmul.defvjp(_vjp_forward, _vjp_backward)
