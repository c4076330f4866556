"""A Hugging Face checkpoint as the model's arrays: validated against its config, and read slice by slice."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint import hf_config, names
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
from dsv3_jax.json_input import is_type, show

_FLOATS = ("F32", "BF16", "F16")
_SCALES = ("F32", "BF16", "F8_E8M0", "U8")

_TEXT = "language_model."
"""Prefix of the language model's tensors inside a vision model, and prefixes of the other tensors."""
_VISION = ("vision_tower.", "mm_projector.")
_MTP_OWN = re.compile(r"^model\.layers\.\d+\.(embed_tokens|enorm|hnorm|eh_proj|shared_head)\.")
"""Tensors that only MTP modules have, outside of the block."""
_NO_MTP = "; without MTP (--no-mtp, mtp=False) it isn't needed"


class HFCheckpoint:
    """A directory with config.json and safetensors files.

    Attributes:
      config: of the model made of the chosen layers.
      fields: of config.json or, if it wraps a language model, of that model.
      leaves: the model's arrays, by path.
      block: rows and columns of an FP8 block, from `quantization_config`; None without one.
      power_of_two: whether `quantization_config` says that scales are powers of two.

    Raises, on opening:
      FileNotFoundError: config.json or a safetensors file is missing.
      ConfigError: config.json isn't of this family of models, or contradicts itself.
      CheckpointError: a tensor is missing, unknown, or has the wrong shape or dtype; a file is truncated or damaged.

    Tensors that don't affect the result are left out of `files`, with a notice: RoPE's frequencies, scales of weights
    that aren't FP8, a vision model around the language model.
    """

    def __init__(
        self, directory: Path, *, layers: str | None = None, mtp: bool = True, headers_only: bool = False
    ) -> None:
        """layers: the layers to load, numbered as in the files, such as "0-3,10"; all by default.

        mtp: whether to load MTP modules, if config.json and files have them; otherwise their tensors are ignored.
        """
        self.directory = directory
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is no directory: give one with config.json and safetensors files")
        config = ModelConfig.from_hf(directory)
        fields = hf_config.read_fields(directory / "config.json")
        self.fields = hf_config.text_fields(fields)
        self.block = _block_size(self.fields, directory)
        self.power_of_two = hf_config.power_of_two_scales(self.fields)
        self.files = TensorFiles(directory, headers_only=headers_only)
        self._layers_end = config.num_hidden_layers
        self._set_aside(config, mtp, wrapped=fields["model_type"] == hf_config.WRAPPER)
        tensors = self.files.tensors
        whole = Layers.all(config)
        if not any(self._is_mtp(n) for n in tensors):
            whole = Layers(whole.main, ())  # the config announces MTP, but nobody saved it, as transformers doesn't
        experts = config.n_routed_experts * (config.num_moe_layers + len(whole.mtp))
        if experts > 2 * len(tensors) + 10_000:
            raise CheckpointError(
                f"{directory} holds {len(tensors)} tensors, too few for {config.num_hidden_layers} layers with "
                f"{config.n_routed_experts} experts each, of which config.json speaks"
            )
        self.whole = whole.select(config)
        self.layers = _choose(whole, layers)
        self.config = self.layers.select(config)
        self.leaves = names.leaves(self.config, self.layers)
        self.copies = names.copies(self.config, self.layers)
        self._check_tensors(whole)

    def dtype(self, leaf: Leaf) -> np.dtype:
        """Returns the dtype of the leaf's tensors in the files. Raises CheckpointError if they differ."""
        found = self._common_dtype(leaf.names)
        return np.dtype(np.float32) if leaf.kind.float32 else found

    def scale_dtype(self, leaf: Leaf) -> np.dtype:
        """Returns the dtype of the leaf's scale grids in the files. Raises CheckpointError if they differ."""
        return self._common_dtype([name + SCALE for name in leaf.names])

    def _common_dtype(self, of: Sequence[str]) -> np.dtype:
        found = {self.files.tensors[name].dtype for name in of}
        if len(found) > 1:
            one = {d: next(n for n in of if self.files.tensors[n].dtype == d) for d in sorted(found)}
            examples = ", ".join(f"{n} is {d}" for d, n in one.items())
            raise CheckpointError(f"tensors of one kind have several dtypes ({examples}): cast them (--dtype bf16)")
        return DTYPES[found.pop()]

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
        """Reads rows of a tensor in the file's layout, cast as in `read`."""
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
        """Reads the float32 scale grid of an FP8 tensor. Raises CheckpointError if a scale isn't finite."""
        scales = decode_scales(self.files.array(name + SCALE))
        if not np.isfinite(scales).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(scales))[0])
            raise CheckpointError(
                f"{name + SCALE} in {self.files.tensors[name + SCALE].file.name} is {scales[at]} at {at}: "
                "every scale must be a finite number"
            )
        return scales

    def check_scales(self) -> None:
        """Reads every scale. Raises CheckpointError if one isn't finite."""
        for name in {name for leaf in self.leaves.values() for name in leaf.names}:
            if self.files.tensors[name].dtype == "F8_E4M3":
                self.scales(name)

    def check_copies(self) -> None:
        """Raises CheckpointError unless the embedding and head of MTP equal the model's, since they are stored once."""
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
                raise CheckpointError(
                    f"{name} differs from {original}: the released format repeats it unchanged{_NO_MTP}"
                )

    # What says nothing about the model ------------------------------------------------------------------

    def _set_aside(self, config: ModelConfig, mtp: bool, wrapped: bool) -> None:
        """Removes tensors from `files` that don't affect the result, and unwraps those of the language model."""
        tensors, vision = self.files.tensors, 0
        if wrapped:
            text = {n.removeprefix(_TEXT): i for n, i in tensors.items() if n.startswith(_TEXT)}
            other = [n for n in tensors if not n.startswith((_TEXT, *_VISION))]
            if other:
                raise CheckpointError(
                    f"{other[0]} in {tensors[other[0]].file.name} is unknown: tensors of a {hf_config.WRAPPER} begin "
                    f"with one of {', '.join((_TEXT, *_VISION))}"
                )
            vision = len(tensors) - len(text)
            tensors = {n: dataclasses.replace(i, name=n) for n, i in text.items()}
        own = {names.layer_number(n) for n in tensors if self._is_mtp(n) and _MTP_OWN.search(n)}
        modules = own | set(Layers.all(config).mtp)
        kept, ignored = {}, collections.Counter({"tensors of the vision model": vision})
        for name, info in tensors.items():
            weight = tensors.get(name.removesuffix(SCALE))
            if name.endswith(".rotary_emb.inv_freq"):
                ignored["RoPE's frequencies (rotary_emb.inv_freq), which follow from config.json"] += 1
            elif name.endswith(SCALE) and weight is not None and weight.dtype in _FLOATS:
                ignored[f"scales ({SCALE}) of weights that aren't in FP8"] += 1
            elif mtp or names.layer_number(name) not in modules:
                kept[name] = info
        self.files.tensors = kept
        for what, count in (+ignored).items():
            hf_config.say_once(f"{self.directory}: left out {count:,} {what}")

    def _is_mtp(self, name: str) -> bool:
        """Whether a tensor belongs to a layer after the model's own."""
        return (names.layer_number(name) or 0) >= self._layers_end

    def _way_out(self, name: str) -> str:
        return _NO_MTP if self._is_mtp(name) else ""

    # Checks on opening ---------------------------------------------------------------------------------

    def _check_tensors(self, whole: Layers) -> None:
        tensors, shapes = self.files.tensors, names.tensor_shapes(self.whole, whole)
        for name, shape in shapes.items():
            if name not in tensors:
                raise CheckpointError(
                    f"{name} is missing from {self.directory}: the config asks for it, of shape {shape}"
                    f"{self._way_out(name)}"
                )
            info = tensors[name]
            if info.shape != shape:
                raise CheckpointError(
                    f"{name} in {info.file.name} has shape {info.shape}: the config makes it {shape}"
                    f"{self._way_out(name)}"
                )
            self._check_dtype(name)
        for name, info in tensors.items():
            if name in shapes:
                continue
            if not name.endswith(SCALE) or name.removesuffix(SCALE) not in shapes:
                raise CheckpointError(
                    f"{name} in {info.file.name} is unknown: a model of this config has no such tensor"
                    f"{self._way_out(name)}"
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
        raise CheckpointError(f"{where}.quant_method is {show(method)}: it must be 'fp8'")
    if quantised.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"{where}.fmt is {show(quantised['fmt'])}: it must be 'e4m3'")
    block = quantised.get("weight_block_size")
    if quantised.get("scale_fmt") not in (None, "ue8m0"):
        raise CheckpointError(f"{where}.scale_fmt is {show(quantised['scale_fmt'])}: it must be 'ue8m0', or left out")
    if not isinstance(block, list) or not is_type(block, tuple[int, int]) or not all(0 < n < 2**31 for n in block):
        raise CheckpointError(
            f"{where}.weight_block_size is {show(block)}: it must be two positive numbers, as [128, 128]"
        )
    return block[0], block[1]


def _choose(whole: Layers, text: str | None) -> Layers:
    """Parses layers, such as "0-3,61". Raises CheckpointError."""
    available = [*whole.main, *whole.mtp]
    chosen = set(available) if text is None else _numbers(text, available)
    main = tuple(n for n in whole.main if n in chosen)
    if not main:
        raise CheckpointError(f"layers {text!r} leave the model without a layer: name one of 0 to {whole.main[-1]}")
    return Layers(main, tuple(n for n in whole.mtp if n in chosen))


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
    """Returns the config.json of a converted checkpoint: the source's, with the changes that the conversion made.

    fields: of the source's config.json. config: of the layers taken. dtype: "bfloat16" or "float32" of a cast, or None.
    block: of the FP8 blocks, or None.
    """
    written = hf_config.with_layers(fields, config)
    if dtype is not None:
        written |= dict.fromkeys([n for n in ("dtype", "torch_dtype") if n in written] or ["torch_dtype"], dtype)
    if block is None:
        written.pop("quantization_config", None)
    elif written.get("quantization_config") is None:
        written["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(block),
        }
    return written
