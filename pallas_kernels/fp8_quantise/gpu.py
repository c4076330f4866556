"""Quantisation on Hopper (Mosaic GPU): a thread block of one warpgroup for each 128 x 128 of the matrix.

A tile is fetched once. Its rows are quantised from shared memory, and so are its columns, by the same code: the second
time the tile is read transposed. Thread blocks are small, so that several of them share a multiprocessor, some waiting
for memory while others compute.

Tiles along columns belong to a group each: they begin where it does, but at a multiple of 8 rows, as the copy engine
wants. Rows of other groups are zeros in them. Along rows these are quantised as well, by the block of the other group
once more, to the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fp8_quantise.reference import ALIGNMENT, TILE, Scaling, encode, spans

HALF = TILE // 2
"""Rows of a tile in registers at a time."""
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
LAYOUT = plgpu.Layout.WGMMA


@functools.partial(jax.jit, static_argnames=("rows", "columns", "interpret"))
def fp8_quantise(
    x: jax.Array,
    scales: jax.Array | None,
    group_sizes: jax.Array | None,
    rows: Scaling | None,
    columns: Scaling | None,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[tuple[jax.Array, jax.Array] | None, tuple[jax.Array, jax.Array] | None]:
    """See `api.fp8_quantise`. `interpret` runs it on a CPU, slowly."""
    m, k = x.shape
    fill = ((0, -m % ALIGNMENT), (0, 0))
    x = jnp.pad(x, fill)
    blocks, tiles = -(-m // TILE), -(-k // TILE)
    inputs = {"x": x}
    if scales is not None:
        inputs["scales"] = jnp.pad(scales, fill).T  # a tile's together
    if group_sizes is not None:
        inputs["spans"] = spans(group_sizes, m)
        blocks = len(inputs["spans"])
    shape, fp8, f32 = jax.ShapeDtypeStruct, jnp.float8_e4m3fn, jnp.float32
    outputs = {}
    if rows:
        # Unlike a tile of values, a run of scales isn't cut off at the end of its row, but at the array's: without room
        # past the last of M, it would go on in the next row. Few rows have a shorter run, and so nothing to cut away.
        room = 0 if group_sizes is None and (len(x) < TILE or len(x) % TILE == 0) else TILE
        outputs |= {"rows": shape(x.shape, fp8), "rows_scales": shape((tiles, len(x) + room), f32)}
    if columns:
        outputs["columns"] = shape((tiles * TILE, blocks * TILE), fp8)
        outputs["columns_scales"] = shape((blocks, tiles * TILE), f32)
    staged = {name: [shared_tile(fp8), plgpu.SMEM((TILE,), f32)] for name in ("rows", "columns") if name in outputs}

    def kernel(*refs, **scratch):
        _kernel(dict(zip((*inputs, *outputs), refs, strict=True)), scratch, rows, columns)

    out = plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        scratch_types=dict(
            x=shared_tile(x.dtype),
            **staged,
            given=plgpu.SMEM((TILE,), f32),
            arrived=plgpu.Barrier(num_arrivals=1 if scales is None else 2),
        ),
        grid=(blocks, tiles),
        grid_names=("block", "tile"),
        interpret=interpret,
    )(*inputs.values())
    out = dict(zip(outputs, out, strict=True))
    return (
        (out["rows"][:m], out["rows_scales"].T[:m]) if rows else None,
        (out["columns"], out["columns_scales"]) if columns else None,
    )


def shared_tile(dtype: jax.typing.DTypeLike) -> plgpu.SMEM:
    width = min(HALF, 128 // jnp.dtype(dtype).itemsize)
    swizzle = plgpu.SwizzleTransform(width * jnp.dtype(dtype).itemsize)
    transforms = (plgpu.TilingTransform((8, width)), swizzle)
    return plgpu.SMEM((TILE, TILE), dtype, transforms=transforms)


def _kernel(gmem: dict, smem: dict, rows: Scaling | None, columns: Scaling | None) -> None:
    block, tile = lax.axis_index("block"), lax.axis_index("tile")
    x, given, arrived = smem["x"], smem["given"], smem["arrived"]
    first, lower, upper = block * TILE, 0, TILE
    if "spans" in gmem:
        first, lower, upper = (gmem["spans"][block, i] for i in range(3))
        first = pl.multiple_of(first, ALIGNMENT)
    down, along, across = pl.ds(first, TILE), pl.ds(block * TILE, TILE), pl.ds(tile * TILE, TILE)

    def put(name: str, how: Scaling, halves: Callable, values_at: tuple, scales_at: tuple) -> None:
        """Quantises halves of a tile, (64, 128) float32 each, and starts storing them."""
        values, scales = smem[name]
        for i in range(1 if name == "rows" and gmem["x"].shape[0] <= HALF else 2):
            half, mine = halves(i), pl.ds(i * HALF, HALF)
            scale = how.of(jnp.max(jnp.abs(half), axis=1))
            values[mine] = encode(half, lax.broadcast_in_dim(scale, half.shape, [0]))
            scales[mine] = scale
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(values, gmem[name].at[*values_at])
        plgpu.copy_smem_to_gmem(scales.at[pl.ds(0, scales_at[1].size)], gmem[f"{name}_scales"].at[*scales_at])

    def of_rows(i: int) -> jax.Array:
        return plgpu.load(x.at[pl.ds(i * HALF, HALF)], layout=LAYOUT).astype(jnp.float32)

    def of_columns(i: int) -> jax.Array:
        half = x.at[:, pl.ds(i * HALF, HALF)].transpose((1, 0))
        if "scales" not in gmem:
            out = plgpu.load(half, layout=LAYOUT).astype(jnp.float32)
        else:  # single bytes can't be exchanged between threads
            out = plgpu.load(half, layout=plgpu.Layout.WGMMA_TRANSPOSED).astype(jnp.float16)
            out = plgpu.layout_cast(out, LAYOUT).astype(jnp.float32)
            of_tile = plgpu.load(given, layout=LAYOUT.reduce(0), optimized=False)
            out = out * lax.broadcast_in_dim(of_tile, out.shape, [1])
        if "spans" in gmem:
            row = plgpu.broadcasted_iota(jnp.int32, out.shape, 1, layout=LAYOUT)
            out = jnp.where((row >= lower) & (row < upper), out, 0)
        return out

    @pl.when(lower < upper)
    def _():
        plgpu.copy_gmem_to_smem(gmem["x"].at[down, across], x, arrived)
        if "scales" in gmem:
            plgpu.copy_gmem_to_smem(gmem["scales"].at[tile, down], given, arrived)
        plgpu.barrier_wait(arrived)
        if rows:
            run = pl.ds(first, min(TILE, gmem["rows_scales"].shape[1]))
            put("rows", rows, of_rows, (down, across), (tile, run))
        if columns:
            put("columns", columns, of_columns, (across, along), (block, across))
        plgpu.wait_smem_to_gmem(0)
