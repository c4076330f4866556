"""Writes fp8.npz beside this file: FP8 tiles, blocks and products as DeepSeek's released Triton kernels define them.

It needs PyTorch, which the project itself never does:

    python -m pip install torch numpy
    python tests/golden/make_fp8.py

The kernels (`inference/kernel.py` of DeepSeek-V3 and V3.1: `act_quant`, `weight_dequant`, `fp8_gemm`) need a GPU. Here
they are said again in PyTorch on the CPU, element by element as the kernels do it; rounding to e4m3 is PyTorch's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

TILE = 128
FP8 = torch.float8_e4m3fn


def act_quant(x: torch.Tensor, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (M, K) in tiles of 1 x 128: values, and scales (M, K / 128)."""
    values, scales = torch.empty_like(x, dtype=FP8), torch.empty(x.shape[0], x.shape[1] // TILE)
    for i in range(x.shape[0]):
        for j in range(scales.shape[1]):
            tile = x[i, j * TILE : (j + 1) * TILE].float()
            s = torch.clamp(tile.abs().max(), min=1e-4) / 448.0
            if scale_fmt == "ue8m0":
                s = torch.exp2(torch.ceil(torch.log2(s)))
            values[i, j * TILE : (j + 1) * TILE] = (tile / s).to(FP8)
            scales[i, j] = s
    return values, scales


def weight_quant(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (N, K) in blocks of 128 x 128; those at the edges may be smaller."""
    rows, columns = -(-w.shape[0] // TILE), -(-w.shape[1] // TILE)
    values, scales = torch.empty_like(w, dtype=FP8), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            at = slice(i * TILE, (i + 1) * TILE), slice(j * TILE, (j + 1) * TILE)
            scales[i, j] = w[at].float().abs().max() / 448.0
            values[at] = (w[at].float() / scales[i, j]).to(FP8)
    return values, scales


def fp8_gemm(a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor) -> torch.Tensor:
    """(M, K) times (N, K) transposed: a float32 accumulator to which each 128 along K adds its scaled product."""
    total = torch.zeros(a.shape[0], b.shape[0])
    of_column = torch.arange(b.shape[0]) // TILE
    for k in range(a.shape[1] // TILE):
        at = slice(k * TILE, (k + 1) * TILE)
        part = a[:, at].float() @ b[:, at].float().T
        total += part * a_s[:, k, None] * b_s[of_column, k][None, :]
    return total


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    x = normal(24, 256) * torch.exp(3 * normal(24, 1))
    x[3, :TILE] = 0
    x[4] = 0
    x[5, 7], x[6, 200] = 1e4, -1e4  # spikes
    x[7] *= 1e-6  # below the kernels' least maximum
    x[8, :TILE] = 448.0 * 2.0 ** -torch.arange(TILE).float()
    x[9, :TILE] = torch.arange(TILE) * 0.125 - 8
    x[10, :16] = torch.tensor([232.0, 248, 1.0625, 1.1875, 2**-10, 3 * 2**-10, 448, -448] * 2)  # ties
    w = 0.02 * normal(160, 256) * torch.exp(normal(160, 1))
    x, w = x.bfloat16(), w.bfloat16()
    bits = lambda t: t.view(torch.uint8).numpy()
    arrays = {"x": x.view(torch.uint16).numpy(), "w": w.view(torch.uint16).numpy()}
    w_values, w_scales = weight_quant(w)
    arrays |= {"w_values": bits(w_values), "w_scales": w_scales.numpy()}
    for name, scale_fmt in (("", None), ("_ue8m0", "ue8m0")):
        values, scales = act_quant(x, scale_fmt)
        y = fp8_gemm(values, scales, w_values, w_scales)
        arrays |= {"values" + name: bits(values), "scales" + name: scales.numpy(), "y" + name: y.numpy()}
    np.savez_compressed(Path(__file__).with_name("fp8.npz"), **arrays)


if __name__ == "__main__":
    main()
