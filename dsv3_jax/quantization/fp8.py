"""FP8 (e4m3) with float32 scales: per 1x128 tile of activations, per 128x128 block of weights (report section 3.3.2).

Every function takes NumPy or JAX arrays (also under `jit`) and returns the same kind. The original number is the
quantised number times its scale; `weight_scale_inv` in the released files is this scale, despite its name.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

type Array = np.ndarray | jax.Array

FP8_MAX = 448.0
"""Largest finite e4m3 number. The format has no infinity: larger numbers would become NaN."""

TILE = 128
BLOCK = (128, 128)

_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""Smallest normal float32. Smaller scales would be divisions by zero on processors that flush denormals."""
ACTIVATION_FLOOR = 1e-4
"""Minimum for the largest magnitude of an activation tile, as in the released kernels."""


def quantise_blocks[A: (np.ndarray, jax.Array)](
    weight: A, block: tuple[int, int] = BLOCK, *, power_of_two: bool = False, floor: float = 0.0
) -> tuple[A, A]:
    """Matrices in FP8 blocks, each scaled by its largest magnitude (online, report section 3.3.2).

    Args:
      weight: (..., M, N) of any float dtype; M and N need not be multiples of the block.
      block: rows and columns of a block.
      power_of_two: round scales up to powers of two ("ue8m0", DeepSeek-V3.1), so that scaling doesn't round.
      floor: minimum for the largest magnitude of a block.

    Returns:
      values (..., M, N) float8_e4m3fn, scales (..., ceil(M / rows), ceil(N / columns)) float32. A block of zeros has
      the smallest normal float32 as its scale, if there is no floor.

    Raises:
      ValueError: NumPy input isn't finite in float32. With JAX input, a block that contains NaN or infinity gets a
        scale of NaN instead.
    """
    xp = _module(weight)
    with np.errstate(over="ignore"):  # which the check finds
        wide = weight.astype(np.float32)
    _check_finite(wide)
    (*batch, m, n), (rows, columns) = wide.shape, block
    whole = xp.pad(wide, [(0, 0)] * len(batch) + [(0, -m % rows), (0, -n % columns)])
    blocks = xp.abs(whole).reshape(*batch, -(-m // rows), rows, -(-n // columns), columns)
    scales = _scale(xp, xp.maximum(blocks.max((-3, -1)), np.float32(floor)), power_of_two)
    return _encode(xp, wide / _expand(xp, scales, wide.shape, block)), scales


def dequantise_blocks[A: (np.ndarray, jax.Array)](
    values: A, scales: A, block: tuple[int, int] = BLOCK, dtype: np.dtype | type = np.float32
) -> A:
    """Dequantises matrices (..., M, N): FP8 values times scale grids, in float32, then cast to `dtype`.

    Raises ValueError if a grid isn't (ceil(M / rows), ceil(N / columns)): it never determines the block size.
    """
    grid = values.shape[:-2] + tuple(-(-size // b) for size, b in zip(values.shape[-2:], block, strict=True))
    if scales.shape != grid:
        raise ValueError(f"scales have shape {scales.shape}: a {values.shape} matrix in {block} blocks has {grid}")
    wide = _expand(_module(values), scales.astype(np.float32), values.shape, block)
    return cast(A, (values.astype(np.float32) * wide).astype(dtype))


def quantise_tiles[A: (np.ndarray, jax.Array)](
    x: A, tile: int = TILE, *, power_of_two: bool = False, floor: float = ACTIVATION_FLOOR
) -> tuple[A, A]:
    """Quantises activations in FP8 tiles of 1 x `tile` along the last axis (report section 3.3.2).

    Args:
      x: (..., N) of any float dtype. `power_of_two` as in `quantise_blocks`.
      floor: minimum for the largest magnitude of a tile, by default as in the released kernels. Use 0 for gradients,
        all of which may be smaller.

    Returns: values (..., N) float8_e4m3fn, scales (..., ceil(N / tile)) float32: max(largest, floor) / 448.
    Raises: as `quantise_blocks`.
    """
    values, scales = quantise_blocks(x[..., None, :], (1, tile), power_of_two=power_of_two, floor=floor)
    return values[..., 0, :], scales[..., 0, :]


def dequantise_tiles[A: (np.ndarray, jax.Array)](
    values: A, scales: A, tile: int = TILE, dtype: np.dtype | type = np.float32
) -> A:
    """Dequantises what `quantise_tiles` returned: values (..., N), scales (..., ceil(N / tile)) -> (..., N)."""
    xp, n = _module(values), values.shape[-1]
    wide = xp.repeat(scales, tile, axis=-1)[..., :n]
    return cast(A, (values.astype(np.float32) * wide).astype(dtype))


def _module(x: Array) -> ModuleType:
    return np if isinstance(x, np.ndarray) else jnp


def _scale(xp: ModuleType, largest: Array, power_of_two: bool) -> Any:
    # XLA multiplies with the rounded inverse of a constant, which gives another scale in half of the cases: so, to it,
    # the divisor isn't one. It also carries a NaN on, and makes one of an infinity, which would hide what it divides.
    divisor = np.float32(FP8_MAX) if xp is np else jnp.where(jnp.isfinite(largest), jnp.float32(FP8_MAX), jnp.nan)
    scale = xp.maximum(largest / divisor, np.float32(_SMALLEST_SCALE))
    if power_of_two:
        mantissa, exponent = xp.frexp(scale)  # exact, where 2^ceil(log2(scale)) depends on the logarithm's rounding
        rounded = xp.ldexp(xp.ones_like(scale), exponent - (mantissa == 0.5))
        scale = rounded if xp is np else jnp.where(jnp.isnan(scale), scale, rounded)
    return scale


def _encode(xp: ModuleType, x: Any) -> Any:
    """Rounds to the nearest e4m3, ties to even. Clips, since a division may round to more than the largest number."""
    return xp.clip(x, np.float32(-FP8_MAX), np.float32(FP8_MAX)).astype(ml_dtypes.float8_e4m3fn)


def _expand(xp: ModuleType, scales: Array, shape: tuple[int, ...], block: tuple[int, int]) -> Any:
    return xp.repeat(xp.repeat(scales, block[0], axis=-2), block[1], axis=-1)[..., : shape[-2], : shape[-1]]


def _check_finite(x: Array) -> None:
    if isinstance(x, np.ndarray) and not np.isfinite(x).all():
        raise ValueError("the numbers to quantise aren't all finite: FP8 blocks can't hold a NaN or an infinity")
