"""Safetensors files as memory maps: a header is parsed and checked, a tensor is a view that costs no memory.

The format: 8 bytes with the header's length, a JSON header, then the tensors' bytes, row by row, little-endian.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import struct
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U8": np.dtype(np.uint8),
}
"""What a tensor may be stored as; U8 and F8_E8M0 only as power-of-two scales."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_LONGEST_HEADER = 100_000_000


class CheckpointError(ValueError):
    """A checkpoint that can't be: the message names the file or tensor, and what would be right."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is: bytes `start` to `stop` of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class TensorFiles:
    """The tensors of a Hugging Face directory, in one file or in shards with an index.

    Raises, on opening:
      FileNotFoundError: there are no safetensors files, or one that the index names is missing.
      CheckpointError: a file is truncated or damaged, or index and files contradict each other.
    """

    def __init__(self, directory: Path, *, headers_only: bool = False) -> None:
        """headers_only: the files may end after their headers, which is enough for a plan."""
        self.directory = directory
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        listed = _list(directory)
        for name, file in (listed or {}).items():
            if not (directory / file).exists():
                raise FileNotFoundError(f"{directory / file} doesn't exist, where {INDEX} puts {name}: fetch it again")
        self.tensors: dict[str, TensorInfo] = {}
        for file in dict.fromkeys(listed.values()) if listed else [SINGLE]:
            for name, info in read_header(directory / file, headers_only=headers_only).items():
                if name in self.tensors:
                    other = self.tensors[name].file.name
                    raise CheckpointError(f"{name} is both in {other} and in {file}: it must be in one file only")
                if listed and listed.get(name) != file:
                    where = f"says {listed[name]}" if name in listed else "doesn't list it"
                    raise CheckpointError(f"{name} is in {file}, but {INDEX} {where}")
                self.tensors[name] = info
        for name, file in (listed or {}).items():
            if name not in self.tensors:
                raise CheckpointError(f"{INDEX} says that {name} is in {file}, which doesn't hold it")

    def array(self, name: str) -> np.ndarray:
        """A read-only view of a tensor, of the file's dtype and shape. Its bytes are read when they are used."""
        info = self.tensors[name]
        raw = np.frombuffer(self._map(info.file), np.uint8, info.nbytes, info.start)
        return raw.view(DTYPES[info.dtype]).reshape(info.shape)

    def prefetch(self, name: str) -> None:
        """Asks for a tensor's bytes in one go: a map read page by page leaves a disk idle in between."""
        info = self.tensors[name]
        start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
        self._map(info.file).madvise(mmap.MADV_WILLNEED, start, info.stop - start)

    def release(self, name: str) -> None:
        """Gives back the memory that a view's bytes took once they were read; they can be read again."""
        info, page = self.tensors[name], mmap.PAGESIZE
        start = info.start // page * page
        if info.nbytes > 4 * page:  # less isn't worth a system call
            self._map(info.file).madvise(mmap.MADV_DONTNEED, start, info.stop - start)

    def _map(self, file: Path) -> mmap.mmap:
        with self._lock:
            if file not in self._maps:
                with file.open("rb") as opened:
                    self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            return self._maps[file]


def read_header(file: Path, *, headers_only: bool = False) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, without their bytes. Raises as `TensorFiles`."""
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            text = opened.read(length) if 2 <= length <= min(size - 8, _LONGEST_HEADER) else b""
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} doesn't exist: the checkpoint is missing this file ({file.name})") from None
    if not text:
        raise CheckpointError(f"{file} is truncated or no safetensors file: it ends within its header")
    header = load_json(text, str(file))
    header.pop("__metadata__", None)
    return {
        name: _tensor_info(name, entry, file, 8 + length, None if headers_only else size)
        for name, entry in header.items()
    }


def _tensor_info(name: str, entry: Any, file: Path, data: int, size: int | None) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        start, stop = (data + int(offset) for offset in entry["data_offsets"])
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{file}: the header's entry of {name} is damaged: it must have dtype, shape, data_offsets"
        ) from None
    if dtype not in DTYPES:
        raise CheckpointError(f"{name} in {file} has dtype {dtype}: it must be one of {', '.join(DTYPES)}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - start != expected or start < data:
        raise CheckpointError(f"{name} in {file} takes {stop - start} bytes: {dtype} of shape {shape} takes {expected}")
    if size is not None and stop > size:
        raise CheckpointError(
            f"{file} is truncated: it has {size} bytes, and {name} ends at byte {stop}; copy or download it again"
        )
    return TensorInfo(name, file, dtype, shape, start, stop)


def load_json(text: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object in which no name comes twice, which Python's own reader would pass over. Raises CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{what} names {key!r} twice: it must name it once")
            found[key] = value
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{what} isn't valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a {type(value).__name__}: it must hold a JSON object")
    return value


def _list(directory: Path) -> dict[str, str] | None:
    """The file of each tensor as the index says, or None if there is one file and no index."""
    index, single = directory / INDEX, directory / SINGLE
    if not index.exists():
        if not single.exists():
            raise FileNotFoundError(
                f"{directory} holds no safetensors checkpoint: it must hold {SINGLE}, or {INDEX} and the files it names"
            )
        return None
    listed = load_json(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} has no weight_map: it must be an object from tensor names to file names")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} puts {name} in {file!r}: it must be the name of a file beside it")
    if single.exists() and SINGLE not in listed.values():
        raise CheckpointError(f"{directory} holds both {SINGLE} and {INDEX}, which doesn't name it: remove one of them")
    return listed
