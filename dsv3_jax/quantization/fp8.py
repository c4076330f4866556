"""FP8 (e4m3) with one float32 scale a group: 1x128 tiles of activations, 128x128 blocks of weights (report, 3.3.2).

Every function takes NumPy arrays or JAX arrays (also under `jit`) and returns the same. A quantised number times its
scale is the number; `weight_scale_inv` of the released files is this scale, whatever its name says.
"""

from __future__ import annotations

from types import ModuleType

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

type Array = np.ndarray | jax.Array

FP8_MAX = 448.0
"""Largest finite e4m3 number. The format has no infinity: what doesn't fit would become NaN."""

TILE = 128
BLOCK = (128, 128)

_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""A float32 below it is denormal, and processors that flush denormals to zero would divide by zero."""
ACTIVATION_FLOOR = 1e-4
"""Least maximum of an activation tile, as in the released kernels."""


def quantise_blocks(
    weight: Array, block: tuple[int, int] = BLOCK, *, power_of_two: bool = False
) -> tuple[Array, Array]:
    """A matrix in FP8 blocks, each scaled by its largest magnitude (online, report section 3.3.2).

    Args:
      weight: (M, N) of any float dtype; M and N need not be multiples of the block.
      block: rows and columns of a block.
      power_of_two: round scales up to powers of two ("ue8m0", DeepSeek-V3.1), so that scaling rounds nothing.

    Returns:
      values (M, N) float8_e4m3fn, scales (ceil(M / rows), ceil(N / columns)) float32. A block of zeros has the
      smallest normal float32 as its scale.

    Raises:
      ValueError: NumPy input isn't finite. JAX input can't be looked at: there, a block with a NaN or an infinity
        comes out as NaN in every number.
    """
    xp = _module(weight)
    _check_finite(weight)
    wide = weight.astype(np.float32)
    (m, n), (rows, columns) = wide.shape, block
    padded = xp.pad(wide, ((0, -m % rows), (0, -n % columns)))
    largest = xp.abs(padded).reshape(-(-m // rows), rows, -(-n // columns), columns).max((1, 3))
    scales = _scale(xp, largest, power_of_two)
    return _encode(xp, wide / _expand(xp, scales, wide.shape, block)), scales


def dequantise_blocks(
    values: Array, scales: Array, block: tuple[int, int] = BLOCK, dtype: np.dtype | type = np.float32
) -> Array:
    """The matrix (M, N) that FP8 values (M, N) and a scale grid stand for: the product in float32, then `dtype`.

    Raises ValueError if the grid isn't (ceil(M / rows), ceil(N / columns)): its size never decides the block's.
    """
    grid = tuple(-(-size // b) for size, b in zip(values.shape, block, strict=True))
    if scales.shape != grid:
        raise ValueError(f"scales have shape {scales.shape}: a {values.shape} matrix in {block} blocks has {grid}")
    wide = _expand(_module(values), scales.astype(np.float32), values.shape, block)
    return (values.astype(np.float32) * wide).astype(dtype)


def quantise_tiles(x: Array, tile: int = TILE, *, power_of_two: bool = False) -> tuple[Array, Array]:
    """Activations in FP8 tiles of 1 x `tile` along the last axis (report section 3.3.2).

    Args: x (..., N) of any float dtype. `power_of_two` as in `quantise_blocks`.
    Returns: values (..., N) float8_e4m3fn, scales (..., ceil(N / tile)) float32: max(largest, 1e-4) / 448, as in the
      released kernels.
    Raises: as `quantise_blocks`.
    """
    xp = _module(x)
    _check_finite(x)
    wide = x.astype(np.float32)
    n = wide.shape[-1]
    padded = xp.pad(wide, [(0, 0)] * (wide.ndim - 1) + [(0, -n % tile)])
    largest = xp.abs(padded).reshape(*wide.shape[:-1], -(-n // tile), tile).max(-1)
    scales = _scale(xp, xp.maximum(largest, np.float32(ACTIVATION_FLOOR)), power_of_two)
    return _encode(xp, wide / xp.repeat(scales, tile, axis=-1)[..., :n]), scales


def dequantise_tiles(values: Array, scales: Array, tile: int = TILE, dtype: np.dtype | type = np.float32) -> Array:
    """Dequantises what `quantise_tiles` returned: values (..., N), scales (..., ceil(N / tile)) -> (..., N)."""
    xp, n = _module(values), values.shape[-1]
    wide = xp.repeat(scales, tile, axis=-1)[..., :n]
    return (values.astype(np.float32) * wide).astype(dtype)


def _module(x: Array) -> ModuleType:
    return np if isinstance(x, np.ndarray) else jnp


def _scale(xp: ModuleType, largest: Array, power_of_two: bool) -> Array:
    scale = xp.maximum(largest / np.float32(FP8_MAX), np.float32(_SMALLEST_SCALE))
    if power_of_two:
        mantissa, exponent = xp.frexp(scale)  # exact, where 2^ceil(log2(scale)) depends on the logarithm's rounding
        scale = xp.ldexp(xp.ones_like(scale), exponent - (mantissa == 0.5))
    return scale


def _encode(xp: ModuleType, x: Array) -> Array:
    """To the nearest e4m3, ties to even. Division may end one rounding above the largest number: hence the clip."""
    return xp.clip(x, np.float32(-FP8_MAX), np.float32(FP8_MAX)).astype(ml_dtypes.float8_e4m3fn)


def _expand(xp: ModuleType, scales: Array, shape: tuple[int, ...], block: tuple[int, int]) -> Array:
    return xp.repeat(xp.repeat(scales, block[0], axis=0), block[1], axis=1)[: shape[0], : shape[1]]


def _check_finite(x: Array) -> None:
    if isinstance(x, np.ndarray) and not np.isfinite(x).all():
        raise ValueError("the numbers to quantise aren't all finite: FP8 blocks can't hold a NaN or an infinity")
