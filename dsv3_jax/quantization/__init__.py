"""Numbers of few bits: FP8 in tiles and blocks."""

from dsv3_jax.quantization.fp8 import (
    FP8_MAX,
    dequantise_blocks,
    dequantise_tiles,
    quantise_blocks,
    quantise_tiles,
)

__all__ = ["FP8_MAX", "dequantise_blocks", "dequantise_tiles", "quantise_blocks", "quantise_tiles"]
