"""Quantisation to FP8 in one pass: tiles along rows and, transposed, along columns; blocks, both ways as well."""

from pallas_kernels.fp8_quantise.api import (
    ALIGNMENT,
    Scaling,
    aligned,
    fp8_quantise,
    fp8_quantise_blocks,
    takes,
    takes_blocks,
    tiles_of,
)

__all__ = [
    "ALIGNMENT",
    "Scaling",
    "aligned",
    "fp8_quantise",
    "fp8_quantise_blocks",
    "takes",
    "takes_blocks",
    "tiles_of",
]
