"""Quantisation to FP8 in one pass: tiles of 1 x 128 along rows, and of 128 x 1, transposed, along columns."""

from pallas_kernels.fp8_quantise.api import Scaling, aligned, fp8_quantise, takes, tiles_of

__all__ = ["Scaling", "aligned", "fp8_quantise", "takes", "tiles_of"]
