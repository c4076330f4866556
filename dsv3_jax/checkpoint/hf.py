"""A Hugging Face checkpoint seen as the model's arrays: opened, checked against its config, read slice by slice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint import names
from dsv3_jax.checkpoint.files import DTYPES, CheckpointError, TensorFiles
from dsv3_jax.checkpoint.layout import (
    FP8,
    Region,
    block_rows,
    copy_matrix,
    decode_scales,
    from_file_axes,
    region_shape,
    tensor_box,
)
from dsv3_jax.checkpoint.names import SCALE, Layers, Leaf
from dsv3_jax.config import ModelConfig
from dsv3_jax.json_input import read_json, show

_FLOATS = ("F32", "BF16", "F16")
_SCALES = ("F32", "BF16", "F8_E8M0", "U8")


class HFCheckpoint:
    """A directory with config.json and safetensors files.

    Attributes:
      config: of the model that the chosen layers make.
      fields: config.json as it is.
      leaves: the model's arrays, by path.
      block: rows and columns of an FP8 block, from `quantization_config`; None without one.

    Raises, on opening:
      FileNotFoundError: config.json or a safetensors file is missing.
      ConfigError: config.json describes no model of this family, or contradicts itself.
      CheckpointError: a tensor is missing, unknown, or of a wrong shape or dtype; a file is truncated or damaged.
    """

    def __init__(
        self, directory: Path, *, layers: str | None = None, mtp: bool = True, headers_only: bool = False
    ) -> None:
        """layers: which to take, as "0-3,10": numbers of the files; all by default. mtp: with the MTP modules."""
        self.directory = directory
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is no directory: give one with config.json and safetensors files")
        config = ModelConfig.from_hf(directory)
        self.fields = read_json(directory / "config.json", CheckpointError)
        self.block = _block_size(self.fields, directory)
        self.files = TensorFiles(directory, headers_only=headers_only)
        tensors = self.files.tensors
        whole = Layers.all(config)
        if not any((names.layer_number(n) or 0) >= config.num_hidden_layers for n in tensors):
            whole = Layers(whole.main, ())  # the config announces MTP, but nobody saved it, as transformers doesn't
        self.whole = whole.select(config)
        self.layers = _choose(whole, layers, mtp)
        self.config = self.layers.select(config)
        self.leaves = names.leaves(self.config, self.layers)
        self.copies = names.copies(self.config, self.layers)
        self._check_tensors(whole)

    @property
    def scale_leaves(self) -> dict[names.TreePath, Leaf]:
        """The leaves that are in FP8, by the path of their scale grids; kv_b_proj's once for both its halves."""
        return {leaf.scale_path: leaf for leaf in self.leaves.values() if self.dtype(leaf) == FP8 and not leaf.start}

    def dtype(self, leaf: Leaf) -> np.dtype:
        """Of the leaf's tensors in the files. Raises CheckpointError if they differ among each other."""
        found = {self.files.tensors[name].dtype for name in leaf.names}
        if len(found) > 1:
            one = {d: next(n for n in leaf.names if self.files.tensors[n].dtype == d) for d in sorted(found)}
            examples = ", ".join(f"{n} is {d}" for d, n in one.items())
            raise CheckpointError(f"tensors of one kind have several dtypes ({examples}): choose a target dtype")
        return np.dtype(np.float32) if leaf.kind.float32 else DTYPES[found.pop()]

    def scale_dtype(self, leaf: Leaf) -> np.dtype:
        """Of the leaf's scale grids in the files."""
        return DTYPES[self.files.tensors[leaf.names[0] + SCALE].dtype]

    def read(self, leaf: Leaf, region: Region, dtype: np.dtype | None = None) -> np.ndarray:
        """A box of a leaf, with the model's axes, in the file's order in memory.

        dtype: cast to it, FP8 decoded first; by default as stored.
        """
        dtype = dtype or self.dtype(leaf)
        stack = region[: leaf.stack]
        box = tensor_box(leaf, region[leaf.stack :])
        out = np.empty((*region_shape(stack), *region_shape(box)), dtype)
        for index in np.ndindex(*region_shape(stack)):
            place = tuple(s.start + i for s, i in zip(stack, index, strict=True))
            name = leaf.names[int(np.ravel_multi_index(place, leaf.shape[: leaf.stack])) if place else 0]
            self._read_tensor(name, leaf, box, out[index])
        return from_file_axes(leaf, out)

    def _read_tensor(self, name: str, leaf: Leaf, box: Region, out: np.ndarray) -> None:
        view = self.files.array(name).reshape(*leaf.tensor_out, *leaf.tensor_in)[box]
        rows = math.prod(view.shape[: len(leaf.tensor_out)])
        scales = None
        if view.dtype == FP8 and out.dtype != FP8:
            assert self.block is not None
            scales = (self.scales(name), *block_rows(leaf, box, self.block))
        copy_matrix(view.reshape(rows, -1), out.reshape(rows, -1), scales)
        self.files.release(name)

    def matrix(self, name: str, rows: slice, dtype: np.dtype) -> np.ndarray:
        """Rows of a tensor in the file's layout, cast as `read` casts."""
        whole = self.files.array(name)
        view = whole[rows].reshape(rows.stop - rows.start, -1)
        scales = None
        if view.dtype == FP8 and dtype != FP8:
            assert self.block is not None
            columns = np.arange(view.shape[1]) // self.block[1]
            scales = (self.scales(name), np.arange(rows.start, rows.stop) // self.block[0], columns)
        out = np.empty(view.shape, dtype)
        copy_matrix(view, out, scales)
        self.files.release(name)
        return out.reshape(len(view), *whole.shape[1:])

    def scales(self, name: str) -> np.ndarray:
        """The float32 scale grid of an FP8 tensor. Raises CheckpointError if a scale isn't a finite number."""
        scales = decode_scales(self.files.array(name + SCALE))
        if not np.isfinite(scales).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(scales))[0])
            raise CheckpointError(
                f"{name + SCALE} in {self.files.tensors[name + SCALE].file.name} is {scales[at]} at {at}: "
                "every scale must be a finite number"
            )
        return scales

    def check_scales(self) -> None:
        """Reads every scale. Raises CheckpointError if one isn't a finite number."""
        for leaf in self.scale_leaves.values():
            for name in leaf.names:
                self.scales(name)

    def check_copies(self) -> None:
        """Raises CheckpointError if MTP's embedding or head isn't the model's, bit for bit: they are stored once."""
        for name, original in self.copies.items():
            a, b = self.files.array(name), self.files.array(original)
            step = max(1, (16 << 20) // max(1, a[:1].nbytes))
            same = a.dtype == b.dtype and all(
                np.array_equal(a[i : i + step].view(np.uint8), b[i : i + step].view(np.uint8))
                for i in range(0, len(a), step)
            )
            self.files.release(name)
            self.files.release(original)
            if not same:
                raise CheckpointError(f"{name} differs from {original}: the released format repeats it unchanged")

    # Checks on opening ---------------------------------------------------------------------------------

    def _check_tensors(self, whole: Layers) -> None:
        tensors, shapes = self.files.tensors, names.tensor_shapes(self.whole, whole)
        for name, shape in shapes.items():
            if name not in tensors:
                raise CheckpointError(
                    f"{name} is missing from {self.directory}: the config asks for it, of shape {shape}"
                )
            info = tensors[name]
            if info.shape != shape:
                raise CheckpointError(f"{name} in {info.file.name} has shape {info.shape}: the config makes it {shape}")
            self._check_dtype(name)
        for name, info in tensors.items():
            if name in shapes:
                continue
            if not name.endswith(SCALE) or name.removesuffix(SCALE) not in shapes:
                raise CheckpointError(
                    f"{name} in {info.file.name} is unknown: a model of this config has no such tensor"
                )
            if tensors[name.removesuffix(SCALE)].dtype != "F8_E4M3":
                raise CheckpointError(
                    f"{name} in {info.file.name} scales a tensor of dtype "
                    f"{tensors[name.removesuffix(SCALE)].dtype}: only F8_E4M3 has scales"
                )

    def _check_dtype(self, name: str) -> None:
        tensors, info = self.files.tensors, self.files.tensors[name]
        if info.dtype in _FLOATS:
            return
        if info.dtype != "F8_E4M3" or len(info.shape) != 2:
            valid = (*_FLOATS, "F8_E4M3") if len(info.shape) == 2 else _FLOATS
            raise CheckpointError(
                f"{name} in {info.file.name} has dtype {info.dtype}: it must be one of {', '.join(valid)}"
            )
        if self.block is None:
            raise CheckpointError(
                f"{name} is in FP8, but {self.directory / 'config.json'} has no quantization_config: "
                "its weight_block_size must say how large a block is"
            )
        if name + SCALE not in tensors:
            raise CheckpointError(
                f"{name + SCALE} is missing: {name} in {info.file.name} is in FP8 and needs its scales"
            )
        scale, grid = tensors[name + SCALE], names.scale_shape((info.shape[0], info.shape[1]), self.block)
        if scale.shape != grid:
            raise CheckpointError(
                f"{scale.name} in {scale.file.name} has shape {scale.shape}: "
                f"a {info.shape} matrix in {self.block} blocks has {grid}"
            )
        if scale.dtype not in _SCALES:
            raise CheckpointError(
                f"{scale.name} in {scale.file.name} has dtype {scale.dtype}: it must be one of {', '.join(_SCALES)}"
            )


def _block_size(fields: dict[str, Any], directory: Path) -> tuple[int, int] | None:
    quantised = fields.get("quantization_config")
    if quantised is None:
        return None
    where = f"{directory / 'config.json'}: quantization_config"
    if not isinstance(quantised, dict) or quantised.get("quant_method") != "fp8":
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(f"{where}.quant_method is {method!r}: it must be 'fp8'")
    if quantised.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"{where}.fmt is {quantised['fmt']!r}: it must be 'e4m3'")
    block = quantised.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise CheckpointError(f"{where}.weight_block_size is {block!r}: it must be two positive numbers, as [128, 128]")
    return block[0], block[1]


def _choose(whole: Layers, text: str | None, mtp: bool) -> Layers:
    """The layers that `text` names ("0-3,61"), in order, with or without MTP. Raises CheckpointError."""
    available = [*whole.main, *whole.mtp]
    chosen = set(available) if text is None else _numbers(text, available)
    main = tuple(n for n in whole.main if n in chosen)
    if not main:
        raise CheckpointError(f"layers {text!r} leave the model without a layer: name one of 0 to {whole.main[-1]}")
    return Layers(main, tuple(n for n in whole.mtp if n in chosen) if mtp else ())


def _numbers(text: str, available: list[int]) -> set[int]:
    found: set[int] = set()
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not (first.isascii() and first.isdecimal()) or (dash and not (last.isascii() and last.isdecimal())):
            raise CheckpointError(f"layers is {show(text)}: it must be numbers and ranges, as '0-3,10'")
        try:
            start, stop = int(first), int(last if dash else first)
        except ValueError:  # thousands of digits
            start, stop = 0, available[-1] + 1
        if start > stop or start < available[0] or stop > available[-1]:
            raise CheckpointError(
                f"layers {show(text)} names {show(piece.strip())}: "
                f"the checkpoint has layers {available[0]} to {available[-1]}"
            )
        found |= set(range(start, stop + 1))
    return found


def converted_fields(
    fields: dict[str, Any], config: ModelConfig, dtype: str | None, block: tuple[int, int] | None
) -> dict[str, Any]:
    """config.json of a converted checkpoint: as it was, but for what the conversion changed.

    fields: config.json of the source. config: of the layers taken. dtype: "bfloat16" or "float32" of a cast, or None.
    block: of the FP8 blocks, or None.
    """
    written = dict(fields)
    for name in ("num_hidden_layers", "first_k_dense_replace", "num_nextn_predict_layers"):
        if written.get(name, getattr(ModelConfig, name)) != getattr(config, name):
            written[name] = getattr(config, name)
    if dtype is not None:
        written["dtype" if "dtype" in written else "torch_dtype"] = dtype
    if block is None:
        written.pop("quantization_config", None)
    elif "quantization_config" not in written:
        written["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(block),
        }
    return written
