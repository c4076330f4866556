"""FP8 grouped matmul on Hopper (Mosaic GPU) for few rows, as in decoding: bound by the matrices' bytes, read once.

A thread block computes up to 64 rows of one group times a strip of columns. One warpgroup fetches, in steps of 128
along the contraction, as far ahead as shared memory reaches; the other multiplies, promotes each step's sums as
`gpu.py` does, and stores. As in `grouped_matmul.gpu_few_rows` thread blocks stay and walk through the groups by
themselves.

A single matrix may have too few strips to keep all multiprocessors busy, or too few for even shares. There, for up to
64 rows, each thread block has an equal share of all strips' steps, in order. It may end within a strip, whose sums then
come in parts, each in a plane of a float32 array; XLA adds the planes.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.row_blocks import (
    BLOCK,
    FEW_ROWS,
    MULTIPROCESSORS,
    TILE_ROWS,
    fetch_rows,
    staging,
    store_rows,
    walk_tiles,
)

COLUMNS = 128
"""Columns of the matrices that a step fetches: of one, or half of each of two."""
STAGES = 7

type Matrices = tuple[jax.Array, jax.Array]
"""Values and scales, as in `api.fp8_grouped_matmul`."""


@functools.partial(jax.jit, static_argnames="interpret")
def product(
    lhs: jax.Array,
    lhs_scales: jax.Array,
    rhs: jax.Array,
    rhs_scales: jax.Array,
    group_sizes: jax.Array,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """See `api.fp8_grouped_matmul`. `interpret` runs it on a CPU, slowly."""
    return _call(lhs, lhs_scales, ((rhs, rhs_scales),), group_sizes, interpret)


@functools.partial(jax.jit, static_argnames="interpret")
def swiglu(
    lhs: jax.Array,
    lhs_scales: jax.Array,
    gate: Matrices,
    up: Matrices,
    group_sizes: jax.Array,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """silu(lhs gate) * (lhs up), rounded once. Otherwise as `product`."""
    return _call(lhs, lhs_scales, (gate, up), group_sizes, interpret)


def _call(
    lhs: jax.Array,
    lhs_scales: jax.Array,
    matrices: tuple[Matrices, ...],
    group_sizes: jax.Array,
    interpret: plgpu.InterpretGPUParams | None,
) -> jax.Array:
    rows, depth = lhs.shape
    groups, columns, _ = matrices[0][0].shape
    fill = ((0, -rows % TILE_ROWS), (0, 0))
    lhs, lhs_scales = jnp.pad(lhs, fill), jnp.pad(lhs_scales, fill).T  # a step's scales are fetched together
    # Runs of single rows are cut off at the end of an array, not of its rows: there, all strips must be whole.
    width = COLUMNS // 2 if columns % COLUMNS else COLUMNS // len(matrices)
    # The matrix units keep 14 bits of a sum: as much of a step as they add up, the rest in float32. Halves cost some
    # time, and a SwiGLU needs them: its error would be 1.1e-3.
    piece = BLOCK // len(matrices)
    tiled = plgpu.TilingTransform((TILE_ROWS, piece)), plgpu.SwizzleTransform(piece)
    workers = 2 if interpret else MULTIPROCESSORS
    shared = groups == 1 and len(lhs) <= FEW_ROWS
    parts = Parts(-(-columns // width), depth // BLOCK, workers) if shared else None
    planes = 1 if parts is None else parts.planes * len(matrices)
    dtype = jnp.bfloat16 if parts is None else jnp.float32
    out = plgpu.kernel(
        functools.partial(_kernel, rows=rows, width=width, piece=piece, parts=parts),
        out_type=jax.ShapeDtypeStruct((planes, len(lhs), columns), dtype),
        scratch_types=dict(
            x_smem=plgpu.SMEM((STAGES, FEW_ROWS, BLOCK), lhs.dtype, transforms=tiled),
            w_smem=plgpu.SMEM((STAGES, len(matrices), width, BLOCK), lhs.dtype, transforms=tiled),
            scale_smem=plgpu.SMEM((STAGES, FEW_ROWS), jnp.float32),
            out_smem=staging(FEW_ROWS, width, dtype)[:1],
            ready=plgpu.Barrier(num_arrivals=2 + len(matrices), num_barriers=STAGES),
            free=plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
        ),
        grid=(workers if parts is None else parts.workers,),
        grid_names=("worker",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0, approx_math=True),
        interpret=interpret,
    )(lhs, lhs_scales, *[a for m in matrices for a in m], group_sizes.astype(jnp.int32))
    if parts is None:
        return out[0, :rows]
    written = np.repeat(parts.written(), width, axis=1)[:, None, :columns]  # (planes, 1, N)
    mine = written & (jnp.arange(rows) < group_sizes[0])[:, None]
    sums = [jnp.sum(jnp.where(mine, p[:, :rows], 0), 0) for p in jnp.split(out, len(matrices))]
    return sums[0].astype(jnp.bfloat16) if len(sums) == 1 else _swiglu(*sums).astype(jnp.bfloat16)


def _swiglu(g: jax.Array, u: jax.Array) -> jax.Array:
    """float32 -> float32."""
    return g / (1 + jnp.exp(-g)) * u


class Parts:
    """Equal shares of the steps of all strips of one matrix. Thread block w has steps [w T / W, (w + 1) T / W) of T."""

    def __init__(self, strips: int, steps: int, workers: int) -> None:
        self.strips, self.steps, self.total = strips, steps, strips * steps
        self.workers = min(workers, self.total)
        self.planes = max(self._parts_of(strip) for strip in range(strips))

    def first_of(self, strip):
        """The thread block that has the strip's first step; the next part of the strip is the next block's."""
        return ((strip * self.steps + 1) * self.workers - 1) // self.total

    def _parts_of(self, strip: int) -> int:
        return ((strip + 1) * self.steps * self.workers - 1) // self.total - self.first_of(strip) + 1

    def written(self) -> np.ndarray:
        """Which planes have a part of which strips: (planes, strips) bool."""
        return np.array([[plane < self._parts_of(s) for s in range(self.strips)] for plane in range(self.planes)])

    def walk(self, rows: int, width: int, body, carry):
        """`carry = body(...)` as `_walk` says, for this thread block's share."""
        worker = lax.axis_index("worker")
        begin, end = worker * self.total // self.workers, (worker + 1) * self.total // self.workers
        first = begin // self.steps

        def one(i, carry):
            strip = first + i
            start = strip * self.steps
            span = jnp.maximum(begin - start, 0), jnp.minimum(end - start, self.steps)
            return body(0, 0, 0, rows, strip * width, span, worker - self.first_of(strip), carry)

        return lax.fori_loop(0, (end - 1) // self.steps - first + 1, one, carry)


def _kernel(x_gmem, scale_gmem, *refs, x_smem, w_smem, scale_smem, out_smem, ready, free, rows, width, piece, parts):
    *matrices, size_gmem, out_gmem = refs
    w_gmems, w_scale_gmems = matrices[::2], matrices[1::2]
    groups, columns, depth = w_gmems[0].shape
    run = min(FEW_ROWS, x_gmem.shape[0])  # of scales
    warpgroup = lax.axis_index("warpgroup")

    def walk(body, carry):
        """`carry = body(group, first, lower, upper, column, (begin, end), plane, carry)`: as in `walk_tiles`, with the
        steps of a tile and the plane that they go to."""
        if parts is not None:
            return parts.walk(rows, width, body, carry)

        def tile(group, first, lower, upper, column, carry):
            span = jnp.int32(0), jnp.where(group < groups, depth // BLOCK, 0)
            return body(group, first, lower, upper, column, span, 0, carry)

        return walk_tiles(size_gmem, rows, groups, columns, width, tile, carry)

    @pl.when(warpgroup == 1)
    def _fetch():
        def tile(group, first, _, upper, column, span, __, before):
            def step(i, n):
                stage = lax.rem(n, STAGES)
                pl.when(n >= STAGES)(lambda: plgpu.barrier_wait(free.at[stage]))
                along = pl.ds(i * BLOCK, BLOCK)
                for w, w_gmem in enumerate(w_gmems):
                    strip = w_gmem.at[group, pl.ds(column, width), along]
                    plgpu.copy_gmem_to_smem(strip, w_smem.at[stage, w], ready.at[stage])
                fetch_rows(x_gmem, x_smem, first, upper, along, stage, ready)
                of_rows = scale_gmem.at[i, pl.ds(first, run)]
                plgpu.copy_gmem_to_smem(of_rows, scale_smem.at[stage, pl.ds(0, run)], ready.at[stage])
                return n + 1

            return lax.fori_loop(*span, step, before)

        used = walk(tile, jnp.int32(0))
        for stage in range(STAGES):
            pl.when(stage < used)(functools.partial(plgpu.barrier_wait, free.at[stage]))

    @pl.when(warpgroup == 0)
    def _multiply():
        def tile(group, first, lower, upper, column, span, plane, before):
            begin, end = span
            matrix, block = 0 if groups == 1 else jnp.minimum(group, groups - 1), column // BLOCK

            def scales(step):  # of the matrices; a step ahead, to hide the latency
                return [ref[matrix, block, jnp.minimum(step, depth // BLOCK - 1)] for ref in w_scale_gmems]

            def body(i, carry):
                accs, of_matrices = carry
                stage = lax.rem(before + i - begin, STAGES)
                following = scales(i + 1)
                plgpu.barrier_wait(ready.at[stage])
                row = plgpu.load(scale_smem.at[stage], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

                def products(*refs):
                    for w, of_matrix in enumerate(refs):
                        for n, ref in enumerate(of_matrix):
                            along = pl.ds(n * piece, piece)
                            matrix = w_smem.at[stage, w, :, along].transpose((1, 0))
                            plgpu.wgmma(ref, x_smem.at[stage, :, along], matrix)
                    return [functools.reduce(operator.add, [r[...] for r in of_matrix]) for of_matrix in refs]

                acc = plgpu.ACC((FEW_ROWS, width), jnp.float32)
                sums = pl.run_scoped(products, *[(acc,) * (BLOCK // piece)] * len(accs))
                plgpu.commit_smem()  # the rows' scales have been read, before copies overwrite them
                plgpu.barrier_arrive(free.at[stage])
                scaled = [
                    acc + part * lax.broadcast_in_dim(row * of_matrix, part.shape, [0])
                    for acc, part, of_matrix in zip(accs, sums, of_matrices, strict=True)
                ]
                return scaled, following

            zero = plgpu.layout_cast(jnp.zeros((FEW_ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
            accs, _ = lax.fori_loop(begin, end, body, ([zero] * len(w_gmems), scales(begin)))
            if parts is not None:
                values = accs
            else:
                values = [(accs[0] if len(accs) == 1 else _swiglu(*accs)).astype(jnp.bfloat16)]
            for w, out in enumerate(values):
                at = w * parts.planes + plane if parts is not None else 0
                target = lambda r, at=at: out_gmem.at[at, pl.ds(first + r.start, r.size), pl.ds(column, width)]
                store_rows(out_smem, out, target, (lower, upper))
            return before + end - begin

        walk(tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
