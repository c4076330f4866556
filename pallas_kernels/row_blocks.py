"""Groups of rows of any size on hardware that works on blocks: shared by the grouped matmuls for Hopper.

Their thread blocks have three warpgroups: two multiply, and the third fetches what they need by TMA, a few steps
ahead. Two thread blocks whose matrix is the same form a cluster and fetch half of it each, for both: without that,
feeding the matrix units would take more bytes from L2 than it gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

BLOCK = 128
"""Rows of a block; blocks start at its multiples, as the copy engine wants."""
MULTIPROCESSORS = 132
SWATH = 8
"""Row blocks that run side by side, so that they share the columns' matrix blocks in L2."""
TILE_ROWS = 8
"""An array that is stored from shared memory must have a multiple of these rows."""
FEW_ROWS = 64
"""Rows of a tile in the forms for few rows."""
TILED = (plgpu.TilingTransform((TILE_ROWS, 64)), plgpu.SwizzleTransform(128))
"""How bfloat16 lies in shared memory for the matrix units."""


def visits(group_sizes: jax.Array, count: int) -> jax.Array:
    """Visits of row blocks by groups. A block of several groups' rows is visited once by each.

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


def staging(rows: int, columns: int, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> list[plgpu.RefUnion]:
    """Shared memory in which each warpgroup's results wait to be stored: see `store_rows`."""
    array = functools.partial(plgpu.SMEM, (rows, columns), dtype)
    tiled = plgpu.TilingTransform((TILE_ROWS, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)
    return [plgpu.RefUnion(array(transforms=tiled), array()) for _ in range(2)]


def store_rows(staged, values: jax.Array, target: Callable, span: tuple[jax.Array, jax.Array] | None = None) -> None:
    """Starts storing a warpgroup's values, (rows, columns), or the rows of a span [lower, upper), by way of `staging`.

    `target` is a function of a slice of rows. All rows go at once, from an arrangement without bank conflicts. That one
    can't be cut between rows: a part of them goes from a plain one, in runs of 32, 16, ... 1, as copies have fixed
    lengths.
    """
    rows = values.shape[0]
    lower, upper = span or (0, rows)
    length = upper - lower
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # for what was stored before

    def store_all(tiled):
        tiled[...] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tiled, target(pl.ds(0, rows)))

    def store_some(plain):
        plain[...] = values
        plgpu.commit_smem()
        done = lower
        for bit in reversed(range((rows - 1).bit_length())):
            run = 1 << bit

            @pl.when((length & run) != 0)
            def _(run=run, done=done):
                plgpu.copy_smem_to_gmem(plain.at[pl.ds(done, run)], target(pl.ds(done, run)))

            done += length & run

    for w, (tiled, plain) in enumerate(staged):
        mine = lax.axis_index("warpgroup") == w
        if span is None:
            pl.when(mine)(functools.partial(store_all, tiled))
        else:
            pl.when(mine & (length == rows))(functools.partial(store_all, tiled))
            pl.when(mine & (length < rows))(functools.partial(store_some, plain))


def launch(
    tiles: int, cluster: int, interpret: plgpu.InterpretGPUParams | None, workers: int = MULTIPROCESSORS
) -> dict:
    """How the kernels are launched: by default with as many thread blocks as the device holds at a time.

    Each cluster then has its share of the tiles, and a tile is written while the next is fetched.
    """
    return dict(
        grid=(min(tiles, workers // cluster),),
        grid_names=("worker",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        interpret=interpret,
    )


def stage_barriers(stages: int, copies: int, cluster: int) -> dict:
    """Per stage: `copies` have arrived; both multiplying warpgroups have used them; so they have in both blocks."""
    return dict(
        ready=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        cluster_free=plgpu.ClusterBarrier(collective_axes=("cluster",), num_barriers=stages) if cluster > 1 else None,
    )


def each_tile(tiles: int, body: Callable, carry=None):
    """`carry = body(tile, carry)` for this cluster's share of the tiles."""
    first, workers = lax.axis_index("worker"), lax.axis_size("worker")
    count = (tiles - first + workers - 1) // workers
    return lax.fori_loop(0, count, lambda i, carry: body(first + i * workers, carry), carry)


def visit_of(tile: jax.Array, work_gmem, column_blocks: int, cluster: int):
    """A tile's column block, its group, block, lower and upper as in `visits`, and whether the cluster shares a matrix.

    Tiles run through a swath of row blocks, then through the column blocks, then through the swaths.
    """
    per_swath = SWATH // cluster
    peer = lax.axis_index("cluster")
    swath, rest = tile // (per_swath * column_blocks), lax.rem(tile, per_swath * column_blocks)
    visit = swath * SWATH + lax.rem(rest, per_swath) * cluster + peer
    group, block, lower, upper = (work_gmem[visit, i] for i in range(4))
    shared: jax.Array | bool = False
    if cluster > 1:
        other = visit + 1 - 2 * peer
        shared = (lower < upper) & (work_gmem[other, 0] == group) & (work_gmem[other, 2] < work_gmem[other, 3])
    return rest // per_swath, group, block, lower, upper, shared


def fetch_shared(source, target, ready, shared: jax.Array | bool) -> None:
    """Starts copying `source` to shared memory; if the cluster's blocks share it, each half of it for both."""
    copy = functools.partial(plgpu.copy_gmem_to_smem, source, target, ready)
    if isinstance(shared, bool):
        copy(collective_axes="cluster" if shared else None)
        return
    pl.when(shared)(lambda: copy(collective_axes="cluster"))
    pl.when(~shared)(copy)


def fetch_tiles(tiles: int, stages: int, prepare: Callable, ready, free, cluster_free) -> None:
    """The fetching warpgroup. It runs ahead into the next tile while the others write the last one's result.

    `prepare(tile)` gives the number of steps, whether the cluster's blocks share what is fetched, and a function
    `(step, stage, barrier)` that starts the copies of a step.
    """
    plgpu.set_max_registers(40, action="decrease")

    def one(tile, used):
        steps, shared, fetch = prepare(tile)

        def step(i, used):
            stage = lax.rem(i, stages)
            pl.when(stage < used)(lambda: plgpu.barrier_wait(free.at[stage]))
            if shared is not False:  # what is fetched lands in both blocks of the cluster

                @pl.when(shared)
                def _():
                    plgpu.barrier_arrive(cluster_free.at[stage])
                    plgpu.barrier_wait(cluster_free.at[stage])

            fetch(i, stage, ready.at[stage])
            return jnp.maximum(used, stage + 1)

        return lax.fori_loop(0, steps, step, used)

    used = each_tile(tiles, one, jnp.int32(0))  # stages that have been filled before
    for stage in range(stages):
        pl.when(stage < used)(functools.partial(plgpu.barrier_wait, free.at[stage]))


def walk_tiles(size_gmem, rows: int, groups: int, columns: int, width: int, body: Callable, carry):
    """For few rows: `carry = body(group, first, lower, upper, column, carry)` for each of this thread block's tiles.

    A tile's rows are [first + lower, first + upper), of a block that starts at `first`, a multiple of 8 as the copy
    engine wants; its columns start at `column`. Rows past the last group are a group without a matrix, number `groups`.
    """
    strips = -(-columns // width)
    worker, workers = lax.axis_index("worker"), lax.axis_size("worker")

    def one(group, state):
        begin, turn, carry = state  # `turn`: whose the group's first tile is
        end = jnp.where(group < groups, begin + size_gmem[jnp.minimum(group, groups - 1)], rows)
        first = begin // TILE_ROWS * TILE_ROWS
        blocks = jnp.where(begin < end, (end - first + FEW_ROWS - 1) // FEW_ROWS, 0)
        start = lax.rem(worker - turn + workers, workers)
        count = jnp.maximum(blocks * strips - start + workers - 1, 0) // workers

        def tile(i, carry):
            number = start + i * workers
            # Blocks of rows side by side: they share a matrix's strip.
            origin = first + lax.rem(number, blocks) * FEW_ROWS
            lower, upper = (jnp.clip(x - origin, 0, FEW_ROWS) for x in (begin, end))
            return body(group, origin, lower, upper, number // blocks * width, carry)

        carry = lax.fori_loop(0, count, tile, carry)
        return end, lax.rem(turn + blocks * strips, workers), carry

    return lax.fori_loop(0, groups + 1, one, (jnp.int32(0), jnp.int32(0), carry))[2]


def fetch_rows(x_gmem, x_smem, first, upper, along, stage, ready) -> None:
    """Starts copying the first `upper` rows, or a few more, in one of four sizes."""
    sizes = (8, 16, 32, FEW_ROWS)
    for smaller, size in zip((0, *sizes), sizes, strict=False):

        @pl.when((smaller < upper) & (upper <= size))
        def _(size=size):
            source = x_gmem.at[pl.ds(first, size), along]
            plgpu.copy_gmem_to_smem(source, x_smem.at[stage, pl.ds(0, size)], ready.at[stage])
