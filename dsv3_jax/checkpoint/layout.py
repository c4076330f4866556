"""Mapping between a file's matrices (out, in) and the model's arrays (in, out): boxes, dequantisation, casts.

Transposing is left to the caller: arrays read here have the file's order in memory and the model's axes. Matrices are
processed in bands of rows, so that only the result is as large as the matrix.
"""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np

from dsv3_jax.checkpoint.names import Leaf
from dsv3_jax.quantization.fp8 import quantise_blocks

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)

_E4M3 = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
"""All e4m3 numbers, indexed by byte."""

_BAND_ROWS = 128

Region = tuple[slice, ...]
"""A box of an array: a slice with start and stop for each axis."""


def full_region(shape: tuple[int, ...]) -> Region:
    return tuple(slice(0, n) for n in shape)


def region_shape(region: Region) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in region)


def tensor_box(leaf: Leaf, inner: Region) -> Region:
    """Returns the box of a tensor, as (*out, *in), that contains the box `inner` of a leaf without its stack axes."""
    split = len(inner) - len(leaf.tensor_out)
    outs, ins = (inner[:-split], inner[-split:]) if leaf.kind.keep_layout and split else (inner[split:], inner[:split])
    last = slice(outs[-1].start + leaf.start, outs[-1].stop + leaf.start)
    return (*outs[:-1], last, *ins)


def file_axes(leaf: Leaf) -> tuple[int, ...]:
    """Returns a leaf's axes in the order of its tensors in files: the stack's, then (out, in).

    `array.transpose(file_axes(leaf))` is a stack of tensors; `from_file_axes` is the inverse. Neither copies.
    """
    ins = leaf.stack + len(leaf.tensor_in)
    axes = range(len(leaf.shape))
    return tuple(axes) if leaf.kind.keep_layout else (*axes[: leaf.stack], *axes[ins:], *axes[leaf.stack : ins])


def from_file_axes(leaf: Leaf, tensors: np.ndarray) -> np.ndarray:
    """Views a stack of tensors, (*stack, *out, *in), with the leaf's axes."""
    return tensors.transpose(np.argsort(file_axes(leaf)))


def block_rows(leaf: Leaf, box: Region, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows and columns in the scale grid of the rows and columns of a box."""
    n = len(leaf.tensor_out)
    rows = np.arange(math.prod(leaf.tensor_out)).reshape(leaf.tensor_out)[box[:n]].ravel()
    columns = np.arange(math.prod(leaf.tensor_in)).reshape(leaf.tensor_in)[box[n:]].ravel()
    return rows // block[0], columns // block[1]


def copy_matrix(
    source: np.ndarray, target: np.ndarray, scales: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
) -> None:
    """Writes `source` (M, N) into `target` (M, N), dequantising if there are scales, and casting.

    scales: the float32 grid, and the grid rows and columns of the rows and columns of `source`.
    """
    if scales is None and source.dtype == target.dtype:
        _as_bits(target)[...] = _as_bits(source)
        return
    for start, stop in _bands(len(source), scales[1] if scales else None):
        band = source[start:stop]
        if scales is not None:
            grid, rows, columns = scales
            band = _E4M3[band.view(np.uint8)] * grid[rows[start], columns]
        target[start:stop] = band.astype(target.dtype, copy=False)


def quantise_matrix(matrix: np.ndarray, block: tuple[int, int], *, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """`quantise_blocks` for a matrix of any float dtype, one row of blocks at a time to save memory."""
    values = np.empty(matrix.shape, FP8)
    rows = range(0, len(matrix), block[0])
    scales = np.empty((len(rows), -(-matrix.shape[1] // block[1])), np.float32)
    for i, start in enumerate(rows):
        band = slice(start, start + block[0])
        values[band], scales[i : i + 1] = quantise_blocks(
            matrix[band].astype(np.float32), block, power_of_two=power_of_two
        )
    return values, scales


def decode_scales(scales: np.ndarray) -> np.ndarray:
    """Decodes scales to float32. Bytes are exponents of two, biased by 127 ("ue8m0"; 255 is NaN)."""
    if scales.dtype.itemsize > 1:
        return scales.astype(np.float32)
    exponents = scales.view(np.uint8).astype(np.int32)
    return np.where(exponents == 255, np.float32(np.nan), np.ldexp(np.float32(1), exponents - 127))


def _bands(rows: int, grid_rows: np.ndarray | None) -> list[tuple[int, int]]:
    """Yields bands of at most `_BAND_ROWS` rows, each within one row of the scale grid, if there is one."""
    edges = set(range(0, rows, _BAND_ROWS)) | {rows}
    if grid_rows is not None:
        edges |= set((np.flatnonzero(np.diff(grid_rows)) + 1).tolist())
    ordered = sorted(edges)
    return list(itertools.pairwise(ordered))


def _as_bits(x: np.ndarray) -> np.ndarray:
    """Views the same bytes as unsigned integers, which NumPy copies faster than extension types."""
    return x.view(f"u{x.dtype.itemsize}")
