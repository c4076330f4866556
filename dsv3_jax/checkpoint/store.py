"""Converted checkpoints: the model's own tree as orbax arrays (zarr3 through tensorstore), read slice by slice.

Beside the arrays are config.json, orbax's `_METADATA`, and `manifest.json` with hashes of each tensor of the source and
of each file here, which readers check. A file of an array (a zarr shard) contains a few tensors or a band of one;
chunks of at most a megabyte in it can be read independently.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import operator
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import tensorstore as ts
import xxhash

from dsv3_jax.checkpoint import hf_config, names
from dsv3_jax.checkpoint.files import DTYPES, CheckpointError
from dsv3_jax.checkpoint.hashes import FileHashes, Unchecked, file_hashes
from dsv3_jax.checkpoint.jobs import JOURNAL
from dsv3_jax.checkpoint.layout import (
    FP8,
    Region,
    block_rows,
    copy_matrix,
    decode_scales,
    file_axes,
    from_file_axes,
    full_region,
    region_shape,
    tensor_box,
)
from dsv3_jax.checkpoint.names import Kind, Leaf, TreePath
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import Tokenizer
from dsv3_jax.integrity import unseal
from dsv3_jax.json_input import field, read_json, show

MANIFEST = "manifest.json"
FORMAT = "dsv3_jax checkpoint 2"
_FORMAT_WITHOUT_HASHES = "dsv3_jax checkpoint 1"

Target = Literal["keep", "fp8", "bf16", "float32"]
CASTS = {"bf16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
"""Target dtypes of a conversion other than the source's."""

_SHARD_BYTES = 32 << 20
"""Largest part of an array per file, and so per worker, unless a matrix can't be split evenly."""
_CHUNK_BYTES = 1 << 20

ARRAY_METADATA = "zarr.json"

_DICT_KEY = 2
"""orbax's marker for dictionary keys in `_METADATA`."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """An array to write.

    shard: the box in one file. stack: number of stack axes.
    order: its axes in the order of the bytes on disk, that of the source files (zarr's transpose codec). Conversion
    copies and readers transpose, which is free on a device.
    """

    path: TreePath
    shape: tuple[int, ...]
    dtype: np.dtype
    shard: tuple[int, ...]
    stack: int
    order: tuple[int, ...]

    @property
    def chunk(self) -> tuple[int, ...]:
        """The box that can be read independently: the shard with its widest axes divided until it is small enough."""
        chunk = [1] * self.stack + list(self.shard[self.stack :])
        while math.prod(chunk) * self.dtype.itemsize > _CHUNK_BYTES:
            for axis in sorted(range(len(chunk)), key=lambda a: -chunk[a]):
                if (factor := _smallest_factor(chunk[axis])) > 1:
                    chunk[axis] //= factor
                    break
        return tuple(chunk)

    def shards(self, stack: Region) -> Iterator[Region]:
        """Returns the boxes of the files with the entries `stack` of the stack axes, which must be whole shards."""
        inner = list(zip(self.shape[self.stack :], self.shard[self.stack :], strict=True))
        for index in np.ndindex(*(-(-size // step) for size, step in inner)):
            yield (*stack, *(slice(i * b, min(n, (i + 1) * b)) for i, (n, b) in zip(index, inner, strict=True)))


def leaf_arrays(leaves: tuple[Leaf, ...], dtype: np.dtype) -> list[ArraySpec]:
    """Plans the storage of the parts of one kind: their files contain as many whole tensors as fit, or bands of one."""
    inner = max(math.prod(leaf.shape[leaf.stack :]) for leaf in leaves) * dtype.itemsize
    return [
        ArraySpec(
            leaf.path,
            leaf.shape,
            dtype,
            (*_group(leaf.shape[: leaf.stack], inner), *_band(leaf, inner)),
            leaf.stack,
            file_axes(leaf),
        )
        for leaf in leaves
    ]


def scale_array(leaf: Leaf, block: tuple[int, int], dtype: np.dtype) -> ArraySpec:
    """Plans the storage of a leaf's scale grids: stacked, each as in the files."""
    rows, columns = leaf.tensor_shape
    grid, stack = names.scale_shape((rows, columns), block), leaf.shape[: leaf.stack]
    group = _group(stack, math.prod(grid) * dtype.itemsize)
    shape = (*stack, *grid)
    return ArraySpec(leaf.scale_path, shape, dtype, (*group, *grid), leaf.stack, tuple(range(len(shape))))


def _group(stack: tuple[int, ...], nbytes: int) -> tuple[int, ...]:
    """Returns how many entries of each stack axis share a file, if each takes `nbytes`, from the last axis on."""
    room, group = max(1, _SHARD_BYTES // max(1, nbytes)), []
    for size in reversed(stack):
        group.append(min(size, room))
        room = room // size if group[-1] == size else 1
        room = max(1, room)
    return tuple(reversed(group))


def _band(leaf: Leaf, nbytes: int) -> tuple[int, ...]:
    """Returns the part of an entry in one file: all of it, or an even part along the tensor's first output axis."""
    inner = list(leaf.shape[leaf.stack :])
    axis = 0 if leaf.kind.keep_layout else len(leaf.tensor_in)
    parts = next((n for n in range(1, inner[axis] + 1) if inner[axis] % n == 0 and nbytes / n <= _SHARD_BYTES), 1)
    inner[axis] //= parts
    return tuple(inner)


def _smallest_factor(n: int) -> int:
    return next((f for f in range(2, math.isqrt(n) + 1) if n % f == 0), n)


# Arrays on disk ------------------------------------------------------------------------------------------


def array_directory(path: TreePath) -> str:
    """Returns orbax's name for the directory of an array."""
    return ".".join(path)


def shard_file(path: TreePath, index: Iterable[int]) -> str:
    """Returns the relative path of an array's shard: zarr3's default key of a chunk."""
    return "/".join((array_directory(path), "c", *map(str, index)))


def create_array(directory: Path, spec: ArraySpec) -> ts.TensorStore:
    """Creates an array, with shards from an interrupted conversion if there are any."""
    plain: list[dict[str, Any]] = [
        {"name": "bytes"} | ({"configuration": {"endian": "little"}} if spec.dtype.itemsize > 1 else {})
    ]
    if spec.order != tuple(range(len(spec.order))):
        plain = [{"name": "transpose", "configuration": {"order": spec.order}}, *plain]
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": spec.chunk, "codecs": plain, "index_codecs": index}
    metadata = {
        "shape": spec.shape,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": spec.shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "data_type": spec.dtype.name,
        "fill_value": 0,
    }
    # What an interruption left of the description isn't trusted; the shards stay.
    (directory / array_directory(spec.path) / ARRAY_METADATA).unlink(missing_ok=True)
    return _open(directory, spec.path, metadata=metadata, create=True)


def open_array(directory: Path, path: TreePath) -> ts.TensorStore:
    """Opens an array of a checkpoint. Raises CheckpointError if it can't be read."""
    try:
        return _open(directory, path, open=True)
    except ValueError as error:
        raise CheckpointError(f"{directory / array_directory(path)} can't be read: {str(error)[:200]}") from None


def _open(directory: Path, path: TreePath, metadata: dict[str, Any] | None = None, **options: Any) -> ts.TensorStore:
    store = {"driver": "file", "path": f"{directory.absolute() / array_directory(path)}/"}
    spec = {"driver": "zarr3", "kvstore": store} | ({"metadata": metadata} if metadata else {})
    return ts.open(spec, **options).result()


def write_orbax_metadata(directory: Path, specs: Iterable[ArraySpec]) -> None:
    """Returns the description of the tree for orbax."""
    tree = {
        str(spec.path): {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in spec.path],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": spec.shape},
        }
        for spec in specs
    }
    described = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (directory / "_METADATA").write_text(json.dumps(described))


# Reading -------------------------------------------------------------------------------------------------


def _read_manifest(directory: Path, check_hashes: bool) -> tuple[dict[str, Any], FileHashes]:
    """Reads the manifest, with type-checked fields, and the hashes in it."""
    file = directory / MANIFEST
    manifest = read_json(file, CheckpointError)
    kept = field(manifest, "format", str, str(file), CheckpointError)
    if kept == FORMAT:
        manifest = unseal(manifest, file, CheckpointError)
    elif kept != _FORMAT_WITHOUT_HASHES:
        raise CheckpointError(f"{file} has format {show(kept)}: it must be {FORMAT!r}")
    field(manifest, "dtype", Target, str(file), CheckpointError)
    field(manifest, "block", tuple[int, int] | None, str(file), CheckpointError)
    if manifest["block"] and min(manifest["block"]) < 1:
        raise CheckpointError(f"{file}: block is {manifest['block']}: it must be two positive numbers")
    tensors = field(manifest, "tensors", dict[str, tuple[str, str | None]], str(file), CheckpointError)
    for name, (dtype, _) in tensors.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{file}: {name} is of {show(dtype)}: it must be one of {', '.join(DTYPES)}")
    if not check_hashes:
        return manifest, Unchecked(directory, "asked for")
    if kept != FORMAT:
        return manifest, Unchecked(directory, "it was converted before files had hashes; convert it again to have them")
    return manifest, file_hashes(directory, manifest, MANIFEST)


class Store:
    """A converted checkpoint, as the model's arrays and as the tensors of the source.

    Attributes: `config`, `fields`, `leaves`, `copies` and `block` as in `HFCheckpoint`; `manifest`; `hashes`.

    Raises, on opening and when arrays are read:
      FileNotFoundError: the directory or a file in it is missing.
      CheckpointError: it isn't such a checkpoint, its parts contradict each other, or a file has changed.
    """

    def __init__(self, directory: Path, *, check_hashes: bool = True) -> None:
        """check_hashes: compare each file with its hash in the manifest on first use."""
        self.directory = directory
        for needed in (MANIFEST, "config.json"):
            if not (directory / needed).exists():
                raise FileNotFoundError(f"{directory / needed} doesn't exist: {directory} is no converted checkpoint")
        self.manifest, self.hashes = _read_manifest(directory, check_hashes)
        self.hashes.check(n for n in self.hashes.expected if "/" not in n or n.endswith(f"/{ARRAY_METADATA}"))
        self.fields = read_json(directory / "config.json", CheckpointError)
        self.block: tuple[int, int] | None = tuple(self.manifest["block"]) if self.manifest["block"] else None
        self._describe(ModelConfig.from_hf(directory))
        self._arrays = {leaf.path: self._open(leaf.path, leaf.shape) for leaf in self.leaves.values()}
        for leaf in self.leaves.values():
            if self.dtype(leaf) != FP8:
                continue
            if self.block is None:
                raise CheckpointError(
                    f"{directory / array_directory(leaf.path)} is in FP8: {MANIFEST} must have a block"
                )
            rows, columns = leaf.tensor_shape
            shape = (*leaf.shape[: leaf.stack], *names.scale_shape((rows, columns), self.block))
            self._arrays[leaf.scale_path] = self._open(leaf.scale_path, shape)

    def _open(self, path: TreePath, shape: tuple[int, ...]) -> ts.TensorStore:
        array = open_array(self.directory, path)
        if tuple(array.shape) != shape:
            raise CheckpointError(
                f"{self.directory / array_directory(path)} has shape {tuple(array.shape)}: the config makes it {shape}"
            )
        if array.dtype.numpy_dtype not in DTYPES.values():
            raise CheckpointError(
                f"{self.directory / array_directory(path)} is of {array.dtype.name}, which no tensor is"
            )
        return array

    def _describe(self, config: ModelConfig) -> None:
        """Returns the leaves for a config, independent of the storage."""
        self.config, self.leaves, self.copies = config, names.leaves(config), names.copies(config)
        # The first leaf that each tensor is part of, and which of its tensors it is.
        self._by_name = {
            name: (leaf, i) for leaf in self.leaves.values() if not leaf.start for i, name in enumerate(leaf.names)
        }

    @property
    def power_of_two(self) -> bool:
        """Whether config.json says that scales of FP8 blocks are powers of two."""
        return hf_config.power_of_two_scales(self.fields)

    def dtype(self, leaf: Leaf) -> np.dtype:
        """Returns the dtype of the leaf's array."""
        return self._arrays[leaf.path].dtype.numpy_dtype

    def read(self, leaf: Leaf, region: Region, dtype: np.dtype | None = None) -> np.ndarray:
        """A box of a leaf, with the model's axes, in the file's order in memory.

        dtype: cast to it, FP8 decoded first; by default as stored.
        """
        return from_file_axes(leaf, self._read(leaf, region, dtype))

    def _read(self, leaf: Leaf, region: Region, dtype: np.dtype | None) -> np.ndarray:
        """Reads a box of a leaf as a stack of tensors, (*stack, *out, *in)."""
        view = self._arrays[leaf.path][region].transpose(file_axes(leaf))
        stored = np.empty(view.shape, view.dtype.numpy_dtype)
        reading = ts.array(stored).write(view)  # NumPy's memory comes in huge pages, that of `read` in small ones
        self._check(leaf.path, region)  # meanwhile
        self._finish(reading, leaf.path)
        dtype = dtype or stored.dtype
        if stored.dtype == dtype:
            return stored
        out = np.empty(stored.shape, dtype)
        if stored.dtype != FP8:
            copy_matrix(stored.reshape(len(stored), -1), out.reshape(len(stored), -1))
            return out
        assert self.block is not None
        stack = region[: leaf.stack]
        rows, columns = block_rows(leaf, tensor_box(leaf, region[leaf.stack :]), self.block)
        grids = decode_scales(self._read_scales(leaf, stack))
        for index in np.ndindex(*region_shape(stack)):
            shape = (len(rows), len(columns))
            copy_matrix(stored[index].reshape(shape), out[index].reshape(shape), (grids[index], rows, columns))
        return out

    def _read_scales(self, leaf: Leaf, stack: Region) -> np.ndarray:
        array = self._arrays[leaf.scale_path]
        self._check(leaf.scale_path, (*stack, *full_region(array.shape[leaf.stack :])))
        scales: np.ndarray = self._finish(array[stack].read(), leaf.scale_path)
        return scales

    def _check(self, path: TreePath, region: Region) -> None:
        """Checks the hashes of the files that contain a box of an array, unless already done."""
        shard: Any = self._arrays[path].chunk_layout.write_chunk.shape
        boxes = (range(s.start // n, -(-s.stop // n)) for s, n in zip(region, shard, strict=True))
        self.hashes.check(shard_file(path, index) for index in itertools.product(*boxes))

    def _finish(self, reading: Any, path: TreePath) -> Any:
        try:
            return reading.result()
        except ValueError as error:
            where = self.directory / array_directory(path)
            raise CheckpointError(f"{where} can't be read: {str(error)[:200]}") from None

    def file_dtype(self, name: str) -> str:
        """Returns the dtype of a tensor or scale grid in a lossless export: that of the source.

        A cast store has its own dtype; one that kept the source's may store a narrower bias as float32.
        """
        if name in self.manifest["tensors"] and self.manifest["dtype"] not in CASTS:
            return str(self.manifest["tensors"][name][0])
        return next(n for n, dtype in DTYPES.items() if dtype == self.dtype_of(name))

    def identity(self) -> str:
        """Returns the identity of the checkpoint, to recognise an interrupted export."""
        return xxhash.xxh3_128_hexdigest((self.directory / MANIFEST).read_bytes())

    def write_small_files(self, directory: Path) -> None:
        """Copies the small files of the source, such as its tokenizer."""
        own = {MANIFEST, "config.json", "_METADATA", JOURNAL}
        for file in sorted(self.directory.iterdir()):
            if file.is_file() and file.name not in own:
                shutil.copyfile(file, directory / file.name)

    def kind(self, name: str) -> Kind:
        """Returns the row of the table for a tensor or, for MTP's copies, for the original."""
        return self._leaf(name)[0].kind

    def tensor_out(self, name: str) -> tuple[int, ...]:
        """Returns the output axes of a tensor; `matrix` takes rows of the first."""
        return self._leaf(name)[0].tensor_out

    def dtype_of(self, name: str) -> np.dtype:
        """Returns the dtype that a tensor is stored in."""
        return self.dtype(self._leaf(name)[0])

    def is_fp8(self, name: str) -> bool:
        """Whether a tensor is stored in FP8."""
        return bool(self.dtype_of(name) == FP8)

    def _leaf(self, name: str) -> tuple[Leaf, int]:
        """Returns the first leaf that contains a tensor, and the index of the tensor in it."""
        return self._by_name[self.copies.get(name, name)]

    def scales(self, name: str) -> np.ndarray:
        """Reads the scale grid of an FP8 tensor, as stored and in the file's orientation."""
        leaf, i = self._leaf(name)
        place = np.unravel_index(i, leaf.shape[: leaf.stack]) if leaf.stack else ()
        grids = self._read_scales(leaf, tuple(slice(int(n), int(n) + 1) for n in place))
        return np.asarray(grids[(0,) * leaf.stack])

    def matrix(self, name: str, rows: slice | None = None, dtype: np.dtype | None = None) -> np.ndarray:
        """Reads a tensor in the file's layout, or some of its rows: entries of its first output axis."""
        leaf, i = self._leaf(name)
        place = np.unravel_index(i, leaf.shape[: leaf.stack]) if leaf.stack else ()
        stack = tuple(slice(int(n), int(n) + 1) for n in place)
        rows = rows or slice(0, leaf.tensor_out[0])
        parts = []
        for part in self._parts(leaf):
            region = list(full_region(part.shape[part.stack :]))
            region[0 if part.kind.keep_layout else len(part.tensor_in)] = rows
            parts.append(self._read(part, (*stack, *region), dtype)[(0,) * part.stack])
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=len(leaf.tensor_out) - 1)
        return whole.reshape(-1, math.prod(leaf.tensor_in)) if leaf.tensor_in else whole

    def bands(self, name: str, limit: int = _SHARD_BYTES) -> list[slice]:
        """Yields `rows` for `matrix` such that each band takes at most about `limit` bytes as stored."""
        leaf, _ = self._leaf(name)
        count, size = leaf.tensor_out[0], math.prod(leaf.tensor_shape) * self.dtype(leaf).itemsize
        step = max(1, math.ceil(count / max(1, math.ceil(size / limit))))
        return [slice(i, min(count, i + step)) for i in range(0, count, step)]

    def _parts(self, leaf: Leaf) -> list[Leaf]:
        if len(leaf.kind.parts) == 1:
            return [leaf]
        return [x for x in self.leaves.values() if x.names == leaf.names]


class Variables(Store):
    """Variables in memory, such as those of a training run, as tensors for export.

    config: of the model. variables: its two collections; arrays of float32 or bfloat16.
    directory: their origin, for the export's name and, with `version`, its identity.
    tokenizer: exported beside the weights, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        variables: Mapping[str, Any],
        directory: Path,
        version: str = "",
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.directory, self._version, self._tokenizer = directory, version, tokenizer
        self.fields, self.block, self.manifest = config.to_hf(), None, {"dtype": "memory", "tensors": {}}
        self._describe(config)
        self._values = {path: np.asarray(functools.reduce(operator.getitem, path, variables)) for path in self.leaves}
        dtype = self._values["params", "norm"].dtype.name
        self.fields["torch_dtype"] = dtype

    def dtype(self, leaf: Leaf) -> np.dtype:
        return self._values[leaf.path].dtype

    def _read(self, leaf: Leaf, region: Region, dtype: np.dtype | None) -> np.ndarray:
        seen = self._values[leaf.path][region].transpose(file_axes(leaf))
        return np.ascontiguousarray(seen, dtype or seen.dtype)

    def identity(self) -> str:
        return self._version

    def write_small_files(self, directory: Path) -> None:
        if self._tokenizer is not None:
            self._tokenizer.save(directory)
