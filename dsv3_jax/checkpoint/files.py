"""Safetensors files as memory maps: headers are validated, and tensors are views that take no memory.

The format: the length of the header in 8 bytes, a JSON header, then the bytes of the tensors, row by row,
little-endian.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import struct
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax.json_input import check_type, field, one_line, parse_json, read_json, show

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U8": np.dtype(np.uint8),
}
"""Supported dtypes of tensors; U8 and F8_E8M0 only for power-of-two scales."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_LONGEST_HEADER, _LONGEST_NAME = 100_000_000, 255


class CheckpointError(ValueError):
    """An invalid checkpoint. The message, in one line, names the file or tensor and what would be valid."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))  # names in it are those of a file that others wrote


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The location of a tensor: bytes `start` to `stop` of `file`."""

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
      FileNotFoundError: there are no safetensors files, or a file in the index is missing.
      CheckpointError: a file is truncated or damaged, or contradicts the index.
    """

    def __init__(self, directory: Path, *, headers_only: bool = False) -> None:
        """headers_only: accept files that are truncated after their headers, which is enough for a plan."""
        self.directory = directory
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        listed = _list(directory)
        for name, file in (listed or {}).items():
            if not (directory / file).exists():
                raise FileNotFoundError(
                    one_line(f"{directory / file} doesn't exist, where {INDEX} puts {name}: fetch it again")
                )
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
        """Returns a read-only view of a tensor, with the file's dtype and shape. Bytes are read on use."""
        info = self.tensors[name]
        raw = np.frombuffer(self._map(info.file), np.uint8, info.nbytes, info.start)
        return raw.view(DTYPES[info.dtype]).reshape(info.shape)

    def prefetch(self, name: str) -> None:
        """Prefetches the bytes of a tensor: reading a map page by page would leave the disk idle in between."""
        info = self.tensors[name]
        start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
        self._map(info.file).madvise(mmap.MADV_WILLNEED, start, info.stop - start)

    def release(self, name: str) -> None:
        """Releases the memory of a view that has been read. It can be read again."""
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
    """Parses the header of a safetensors file. Raises as `TensorFiles`.

    Validates the format as the safetensors library does: tensors have no gaps or overlaps, and the file ends with the
    last one.
    """
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            text = opened.read(length) if 2 <= length <= min(size - 8, _LONGEST_HEADER) else b""
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} doesn't exist: the checkpoint is missing this file ({file.name})") from None
    except IsADirectoryError:
        raise CheckpointError(f"{file} is a directory: it must be a safetensors file") from None
    if not text:
        raise CheckpointError(f"{file} is truncated or no safetensors file: it ends within its header")
    header = parse_json(text, str(file), CheckpointError)
    check_type(header.pop("__metadata__", None), dict[str, str] | None, f"{file}: __metadata__", CheckpointError)
    tensors = {name: _tensor_info(name, entry, file, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            raise CheckpointError(
                f"{file}: data_offsets of {name} begin at {info.start - 8 - length}: they must begin at "
                f"{end - 8 - length}, where the tensor before it ends"
            )
        end = info.stop
    if not headers_only and end > size:
        raise CheckpointError(
            f"{file} is truncated: it has {size} bytes, and its tensors end at byte {end}; copy or download it again"
        )
    if not headers_only and end < size:
        raise CheckpointError(f"{file} has {size} bytes, but its tensors end at byte {end}: nothing may follow them")
    return tensors


def _tensor_info(name: str, entry: Any, file: Path, data: int) -> TensorInfo:
    where = f"{file}: {name}"
    check_type(entry, dict, where, CheckpointError)
    dtype = field(entry, "dtype", str, where, CheckpointError)
    shape = tuple(field(entry, "shape", list[int], where, CheckpointError))
    start, stop = field(entry, "data_offsets", tuple[int, int], where, CheckpointError)
    if dtype not in DTYPES:
        raise CheckpointError(f"{name} in {file} has dtype {dtype}: it must be one of {', '.join(DTYPES)}")
    if any(n < 0 for n in shape):
        raise CheckpointError(f"{where}: shape is {show(shape)}: no axis may be negative")
    expected = 1
    for n in shape:
        expected *= n
        if expected >= 2**60:
            raise CheckpointError(f"{where}: shape is {show(shape)}: no file holds so many numbers")
    expected *= DTYPES[dtype].itemsize
    if stop - start != expected or start < 0:
        raise CheckpointError(
            f"{where}: data_offsets are {start}, {stop}: {dtype} of shape {show(shape)} takes {expected} bytes"
        )
    return TensorInfo(name, file, dtype, shape, data + start, data + stop)


def _list(directory: Path) -> dict[str, str] | None:
    """Returns the file of each tensor from the index, or None if there is a single file without index."""
    index, single = directory / INDEX, directory / SINGLE
    if not index.exists():
        if not single.exists():
            raise FileNotFoundError(
                f"{directory} holds no safetensors checkpoint: it must hold {SINGLE}, or {INDEX} and the files it names"
            )
        return None
    listed: dict[str, str] = field(
        read_json(index, CheckpointError), "weight_map", dict[str, str], str(index), CheckpointError
    )
    if not listed:
        raise CheckpointError(f"{index}: weight_map is empty: it must put every tensor in a file")
    for name, file in listed.items():
        if Path(file).name != file or file in ("", "..") or "\0" in file or len(file.encode()) > _LONGEST_NAME:
            raise CheckpointError(f"{index} puts {name} in {show(file)}: it must be the name of a file beside it")
    if single.exists() and SINGLE not in listed.values():
        raise CheckpointError(f"{directory} holds both {SINGLE} and {INDEX}, which doesn't name it: remove one of them")
    return listed
