"""Random checkpoints of any size in the released format, for tests and benchmarks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from dsv3_jax.checkpoint import names
from dsv3_jax.checkpoint.files import DTYPES, INDEX, SINGLE
from dsv3_jax.checkpoint.names import SCALE
from dsv3_jax.config import ModelConfig

Entry = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


def write_random_checkpoint(
    directory: Path,
    config: ModelConfig,
    *,
    block: tuple[int, int] | None = (128, 128),
    scale_dtype: str = "F32",
    scales_apart: bool = False,
    file_bytes: int = 1_000_000_000,
    headers_only: bool = False,
    seed: int = 0,
) -> None:
    """Writes config.json, an index, and safetensors files with random numbers.

    Args:
      block: size of FP8 blocks; if None, all matrices are bfloat16. Router biases are always float32.
      scale_dtype: "F32"; or "F8_E8M0" or "U8", powers of two.
      scales_apart: write all scales after all weights, mostly in other files.
      file_bytes: maximum size of a file.
      headers_only: truncate files after their headers.
    """
    directory.mkdir(parents=True)
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in _entries(config, block, scale_dtype, scales_apart):
        nbytes = _nbytes(entry)
        if size + nbytes > file_bytes and files[-1]:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += nbytes
    copies, rng = names.copies(config), np.random.default_rng(seed)
    index: dict[str, str] = {}
    for i, entries in enumerate(files, 1):
        file = f"model-{i:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else SINGLE
        index |= dict.fromkeys((name for name, _, _ in entries), file)
        with (directory / file).open("wb") as out:
            out.write(_header(entries))
            for name, dtype, shape in () if headers_only else entries:
                # A tensor that another repeats has a seed of its own, by which the copy is made again.
                original = copies.get(name, name)
                own = np.random.default_rng([seed, len(original)]) if original in copies.values() else rng
                _write_random(out, own, dtype, shape)
    if len(files) > 1:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    fields = config.to_hf()
    if block is not None:
        fields["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(block),
        }
    (directory / "config.json").write_text(json.dumps(fields, indent=2))


def _entries(config: ModelConfig, block: tuple[int, int] | None, scale_dtype: str, scales_apart: bool) -> list[Entry]:
    kinds = {name: leaf.kind for leaf in names.leaves(config).values() for name in leaf.names}
    weights: list[Entry] = []
    scales: list[Entry] = []
    for name, shape in names.tensor_shapes(config).items():
        kind = kinds.get(name)
        quantised = block is not None and kind is not None and kind.fp8
        dtype = "F8_E4M3" if quantised else "F32" if kind is not None and kind.float32 else "BF16"
        weights.append((name, dtype, shape))
        if quantised:
            assert block is not None
            grid = (name + SCALE, scale_dtype, names.scale_shape((shape[0], shape[1]), block))
            (scales if scales_apart else weights).append(grid)
    return weights + scales


def _nbytes(entry: Entry) -> int:
    return math.prod(entry[2]) * DTYPES[entry[1]].itemsize


def _header(entries: list[Entry]) -> bytes:
    header, offset = {}, 0
    for name, dtype, shape in entries:
        stop = offset + _nbytes((name, dtype, shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def _write_random(out: BinaryIO, rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> None:
    count, step = math.prod(shape), 1 << 24
    for start in range(0, count, step):
        n = min(step, count - start)
        if dtype == "F8_E4M3":  # any byte but the two NaN
            out.write((rng.integers(0, 0x7F, n, np.uint8) | (rng.integers(0, 2, n, np.uint8) << 7)).tobytes())
        elif dtype in ("F8_E8M0", "U8"):  # 2^-14 to 2^-7
            out.write(rng.integers(113, 121, n, np.uint8).tobytes())
        elif dtype == "BF16":
            out.write(rng.standard_normal(n, np.float32).astype(ml_dtypes.bfloat16).tobytes())
        else:
            out.write(((rng.random(n, np.float32) + 0.5) * 1e-3).tobytes())
