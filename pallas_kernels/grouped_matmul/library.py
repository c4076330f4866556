"""Grouped matmul by tokamax: for TPUs, and a peer on Hopper GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128
ROWS, LAST_ROWS = 256, 128
"""Rows of a tile on TPUs, and of the last one of a group where they suffice."""
DEPTH, COLUMNS = 1024, 2048
"""The most of K of a tile of the matrices' gradient on TPUs, and of N of any tile."""
VMEM_SHARE = 5 / 8
"""Vector memory that a product's tiles may take on TPUs. tokamax's own choice takes nine tenths by an estimate
that leaves out what the compiler adds: with it V3's matrices didn't compile for v5p."""
ZEROS = 2 << 20
"""Bytes of the vector memory that tokamax keeps for writing zeros."""
TILE = 64
"""tokamax's kernels for Hopper copy tiles of 64 columns of each operand, and of each operand's transpose."""


def tpu(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`: tokamax's second kernels for TPUs, with our tiles. Differentiable.

    We call them below tokamax's `ragged_dot`: that takes no tiles, and its gradients ask the device at hand whether it
    is a TPU, also to compile for one that isn't there. The gradient of the rows reads the matrices as they lie.

    Raises:
      ValueError: not bfloat16.
    """
    if lhs.dtype != jnp.bfloat16:
        raise ValueError(f"grouped_matmul by tokamax takes bfloat16, but got {lhs.dtype}")
    out: jax.Array = _tpu(lhs, rhs, group_sizes)
    return out


@jax.custom_vjp
def _tpu(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return product(lhs, rhs, group_sizes)


def _tpu_forward(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return product(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _tpu_backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array], dout: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    lhs, rhs, group_sizes = residuals
    return product(dout, rhs, group_sizes, transposed=True), matrix_gradient(lhs, dout, group_sizes), None


_tpu.defvjp(_tpu_forward, _tpu_backward)


def product(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    transposed: bool = False,
    scales: jax.Array | None = None,
) -> jax.Array:
    """Each group's rows (M, K) times its matrix (G, K, N), or (G, N, K) if `transposed`, on a TPU.

    Args:
      scales: (G, K / B, N) float32, what blocks of B elements along a matrix's K are to be multiplied by: for FP8
        matrices, and not if `transposed`.

    Returns:
      (M, N) of `lhs`'s dtype, zero past the last group.
    """
    from tokamax._src.ops.gmm_v2 import gmm_v2  # a dependency of this choice only

    depth, columns = (rhs.shape[2], rhs.shape[1]) if transposed else rhs.shape[1:]
    lhs, count = _whole_rows(lhs)
    depth = -(-depth // LANES) * LANES  # all of it at once: a matrix's tile then stays for all rows of its group
    # Where a tile of rows has the matrix's tile converted first, fewer rows save little.
    heights = _heights(len(lhs), LAST_ROWS if scales is None else ROWS)
    tiles = gmm_v2.TileSizes(tile_k=depth, tile_n=_width(depth, columns, rhs.dtype), **heights)
    with jax.default_matmul_precision("default"):  # exact for bfloat16, and Mosaic compiles no other for it
        out: jax.Array = gmm_v2.gmm_v2(
            lhs,
            rhs,
            group_sizes,
            None if scales is None else scales[:, :, None],
            tile_info=tiles,
            preferred_element_type=lhs.dtype,
            maybe_quantize_lhs=False,
            zero_initialize=True,
            transpose_rhs=transposed,
        )
    return out[:count]


def matrix_gradient(lhs: jax.Array, dout: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The gradient of the matrices on a TPU: a group's rows of `lhs` (M, K), transposed, times those of `dout` (M, N).

    Returns (G, K, N) of their dtype, zero for groups without rows.
    """
    from tokamax._src.ops.gmm_v2 import gmm_v2, tgmm_v2

    (lhs, _), (dout, _) = _whole_rows(lhs), _whole_rows(dout)
    depth, columns = _split(lhs.shape[1], DEPTH), _split(dout.shape[1], COLUMNS)
    tiles = gmm_v2.TileSizes(tile_k=depth, tile_n=columns, **_heights(len(lhs), LAST_ROWS))
    with jax.default_matmul_precision("default"):
        out: jax.Array = tgmm_v2.tgmm_v2(
            lhs, dout, group_sizes, len(group_sizes), tile_info=tiles, preferred_element_type=lhs.dtype
        )
    return out


def _whole_rows(a: jax.Array) -> tuple[jax.Array, int]:
    """Filled up to whole registers of bfloat16, 16 rows, and how many rows there were."""
    return jnp.pad(a, ((0, -len(a) % 16), (0, 0))), len(a)


def _heights(rows: int, last: int) -> dict[str, int]:
    """Rows of a tile, and of the last one of a group where they suffice."""
    height = min(ROWS, rows)
    return dict(tile_m=height, bucket_base=height if height % last else last)


def _width(depth: int, columns: int, dtype: jnp.dtype) -> int:
    """Columns of a product's tile: as many as fit."""
    size = jnp.dtype(dtype).itemsize
    matrix = 3 * size + (2 if size == 1 else 0)  # fetched two ahead; FP8 is made bfloat16 in vector memory
    fixed = 2 * ROWS * depth * 2 + ZEROS
    room = int(VMEM_SHARE * pltpu.get_tpu_info().vmem_capacity_bytes) - fixed
    fits = room // (depth * matrix + ROWS * (2 * 2 + 4))  # results in bfloat16, sums in float32
    return _split(columns, min(fits, COLUMNS))


def _split(size: int, most: int) -> int:
    """The widest equal parts of a size, in whole lanes and of at most `most`, without a rest if there are such."""
    blocks, most = -(-size // LANES), max(most // LANES, 1)
    without_rest = [b for b in range(most // 2 + 1, most + 1) if blocks % b == 0]
    return LANES * (max(without_rest) if without_rest else -(-blocks // -(-blocks // most)))


def tokamax(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """tokamax's kernel for Hopper, its block shapes from its tables: a peer for our own, in measurements only.

    In tokamax 0.0.17 its gradient of the matrices was about 4% off wherever groups weren't whole tiles.

    Raises:
      ValueError: not bfloat16, or K and N no multiples of 64.
    """
    rows, depth = lhs.shape
    columns = rhs.shape[2]
    if depth % TILE or columns % TILE or lhs.dtype != jnp.bfloat16:
        raise ValueError(
            f"grouped_matmul by tokamax on Hopper takes bfloat16, a contraction and columns of multiples of {TILE}, "
            f"but got {lhs.dtype}, {depth} and {columns}"
        )
    from tokamax import ragged_dot

    # The gradient of the matrices reads the rows' transpose, whose width is the number of rows.
    out = ragged_dot(jnp.pad(lhs, ((0, -rows % TILE), (0, 0))), rhs, group_sizes, implementation="mosaic_gpu")[:rows]
    row = jnp.arange(rows)[:, None]
    return jnp.where(row < jnp.sum(group_sizes), out, 0)  # rows past the last group are left unwritten
