"""Rows packed for communication: e4m3 numbers and the scales of their tiles in one array of bytes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.quantization.fp8 import ACTIVATION_FLOOR, TILE, dequantise_tiles, quantise_tiles

_SCALE_BYTES = 4


@dataclasses.dataclass(frozen=True)
class PackedTiles:
    """Tokens sent to experts, and the gradients sent the same way (report section 3.3.3).

    The scales of tokens are powers of two, so that quantising them again is exact.
    """

    def pack(self, x: jax.Array, *, gradient: bool = False) -> jax.Array:
        """Quantises (N, D) in tiles of 1 x 128: (N, D + 4 ceil(D / 128)) uint8."""
        values, scales = quantise_tiles(x, power_of_two=not gradient, floor=0.0 if gradient else ACTIVATION_FLOOR)
        as_bytes = [lax.bitcast_convert_type(a, jnp.uint8).reshape(len(x), -1) for a in (values, scales)]
        return jnp.concatenate(as_bytes, axis=1)

    def unpack(self, packed: jax.Array, width: int, dtype: jnp.dtype) -> jax.Array:
        """Unpacks rows (M, `width`) of `dtype`. Zero bytes are zero rows."""
        values = lax.bitcast_convert_type(packed[:, :width], jnp.float8_e4m3fn)
        scales = packed[:, width:].reshape(len(packed), -(-width // TILE), _SCALE_BYTES)
        return dequantise_tiles(values, lax.bitcast_convert_type(scales, jnp.float32), dtype=dtype)
