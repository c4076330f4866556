"""E5M6, a float of 12 bits, in which the report saves the input of the layer after attention (section 3.3.2).

Emulated: numbers of the format are carried in bfloat16, which holds all of them. As in IEEE formats the largest
exponent is reserved: E5M6 is float16 with 4 bits fewer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv3_jax.quantization.fp8 import ACTIVATION_FLOOR, TILE

E5M6_MAX = 65024.0
"""Largest finite number, 2^15 x (1 + 63 / 64)."""
_MANTISSA, _SMALLEST_EXPONENT = 6, -14


def round_to_e5m6(x: jax.Array) -> jax.Array:
    """Rounds to the nearest E5M6, ties to even: bfloat16 of the same shape. Larger numbers saturate; NaN stays."""
    wide = x.astype(jnp.float32)
    _, exponent = jnp.frexp(wide)  # of a mantissa in [0.5, 1)
    step = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - 1, _SMALLEST_EXPONENT) - _MANTISSA)
    return jnp.clip(jnp.round(wide / step) * step, -E5M6_MAX, E5M6_MAX).astype(jnp.bfloat16)


def quantise_e5m6(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises rows in tiles of 1 x 128, whose scales are powers of two.

    Args:
      x: (M, K) of any float dtype.

    Returns: values (M, K) bfloat16, each an E5M6 number, scales (M, ceil(K / 128)) float32: max(largest, 1e-4) / 65024,
      rounded up; NaN where a tile isn't all finite. `dequantise_tiles` undoes it.
    """
    rows, depth = x.shape
    tiles = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -depth % TILE))).reshape(rows, -1, TILE)
    largest = jnp.maximum(jnp.max(jnp.abs(tiles), axis=-1), ACTIVATION_FLOOR)
    mantissa, exponent = jnp.frexp(largest)  # 65024 is 127/128 x 2^16: no mantissa above that fits below 2^16
    scales = jnp.ldexp(jnp.float32(1), exponent - 16 + (mantissa > E5M6_MAX / 2**16))
    scales = jnp.where(jnp.isfinite(largest), scales, jnp.nan)
    return round_to_e5m6(tiles / scales[..., None]).reshape(rows, -1)[:, :depth], scales
