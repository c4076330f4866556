"""Conversion from orbax to Hugging Face's layout, for transformers and the official code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console

from dsv3_jax.checkpoint import names
from dsv3_jax.checkpoint.files import DTYPES, INDEX, SINGLE, CheckpointError
from dsv3_jax.checkpoint.hf import HFCheckpoint, converted_fields
from dsv3_jax.checkpoint.jobs import Unit, open_workspace, run_units
from dsv3_jax.checkpoint.layout import FP8, quantise_matrix
from dsv3_jax.checkpoint.names import SCALE
from dsv3_jax.checkpoint.store import MANIFEST, Store
from dsv3_jax.checkpoint.verify import verify_files
from dsv3_jax.json_input import is_type
from dsv3_jax.quantization.fp8 import BLOCK

_FILE_BYTES = 5_000_000_000
_UNIT_BYTES = 32 << 20
_CASTS = {"bf16": "BF16", "float32": "F32"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of the new files: its file and offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def export_hf(
    store: Store,
    target: Path,
    *,
    dtype: str = "keep",
    verify: bool = False,
    workers: int = 4,
    console: Console | None = None,
) -> None:
    """Writes a converted checkpoint, or variables in memory, to a new directory `target` in Hugging Face's layout.

    Args:
      dtype: "keep": as in the store, which restores the source's bytes if those were kept; "fp8": matrices that the
        released files have in FP8 blocks are quantised, unless they already are; "bf16" or "float32": cast.
      verify: read the files back and compare them before `target` appears.

    Raises:
      FileExistsError, OSError: the destination exists, or can't be written.
      CheckpointError: a tensor doesn't match the manifest; the destination contains a different interrupted export.
    """
    block = _block(store, dtype)
    files = plan_export(store, dtype)
    entries = {e.name: e for file in files.values() for e in file}
    identity = {"store": str(store.directory.resolve()), "version": store.identity(), "dtype": dtype}
    with open_workspace(target, identity, sum(e.nbytes for e in entries.values())) as workspace:
        with contextlib.ExitStack() as stack:
            out = {f: stack.enter_context(contextlib.closing(_OutFile(workspace.directory / f))) for f in files}
            for file, content in files.items():
                out[file].start(content)

            def work(unit: Unit) -> dict[str, str]:
                hashes: dict[str, str] = {}
                for name in unit.what:
                    hashes |= _write_tensor(store, entries, name, block, out)
                for file in {entries[name].file for name in unit.what}:
                    out[file].sync()  # the journal must not say more than the disk holds
                return hashes

            def intact(unit: Unit, hashes: Any) -> bool:
                written = {n for name in unit.what for n in (name, name + SCALE) if n in entries}
                return is_type(hashes, dict[str, str]) and all(
                    hashes.get(n) == out[entries[n].file].hash(entries[n].offset, entries[n].nbytes) for n in written
                )

            title = f"exporting {store.directory.name}"
            run_units(workspace, _units(entries), work, intact, title=title, workers=workers, console=console)
        _describe(store, workspace.directory, entries, dtype, block)
        if verify:
            verify_files(store, HFCheckpoint(workspace.directory), workers=workers, console=console)
        workspace.finish()


def plan_export(store: Store, dtype: str = "keep") -> dict[str, list[Entry]]:
    """Plans the files of `export_hf`, and the tensors in each."""
    return _files(_entries(store, dtype))


def describe_export(store: Store, dtype: str = "keep") -> str:
    """Describes the result of `plan_export` in one line of totals."""
    files = plan_export(store, dtype)
    entries = [e for file in files.values() for e in file]
    numbers = sum(math.prod(e.shape) for e in entries)
    size = sum(e.nbytes for e in entries)
    return f"{len(entries):,} tensors, {numbers:,} numbers, {size:,} bytes in {len(files)} safetensors files"


def _block(store: Store, dtype: str) -> tuple[int, int] | None:
    """Returns the size of the FP8 blocks of an export."""
    return (store.block or BLOCK) if dtype == "fp8" else store.block if dtype == "keep" else None


def _entries(store: Store, dtype: str) -> list[Entry]:
    """Lists every tensor of the new checkpoint, in the model's order."""
    entries, block = [], _block(store, dtype)
    for name, shape in names.tensor_shapes(store.config).items():
        kind = store.kind(name)
        written = _written_dtype(store, name, dtype)
        entries.append(Entry(name, written, shape))
        if written == "F8_E4M3":
            assert block is not None
            assert kind.fp8 or store.is_fp8(name)
            kept = store.is_fp8(name) and store.file_dtype(name + SCALE)
            entries.append(Entry(name + SCALE, kept or "F32", names.scale_shape((shape[0], shape[1]), block)))
    return entries


def _written_dtype(store: Store, name: str, dtype: str) -> str:
    if dtype in _CASTS:
        return "F32" if store.kind(name).float32 else _CASTS[dtype]
    if store.is_fp8(name) or (dtype == "fp8" and store.kind(name).fp8):
        return "F8_E4M3"
    return store.file_dtype(name)


def _files(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Assigns tensors to files and offsets. A weight and its scales stay together."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if size + entry.nbytes > _FILE_BYTES and not entry.name.endswith(SCALE):
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    count = len(groups)
    called = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return {file: _place(group, file) for file, group in zip(called, groups, strict=True)}


def _place(group: list[Entry], file: str) -> list[Entry]:
    """Assigns offsets after the header, widest dtypes first, so that every tensor is aligned."""
    placed, offset = [], 0
    for entry in sorted(group, key=lambda e: -DTYPES[e.dtype].itemsize):
        placed.append(dataclasses.replace(entry, file=file, offset=offset))
        offset += entry.nbytes
    start = len(_header(placed))
    return [dataclasses.replace(e, offset=e.offset + start) for e in placed]


def _header(entries: list[Entry], start: int = 0) -> bytes:
    """Returns the bytes of the header, length included. `start` is the origin of the entries' offsets."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for e in entries:
        fields[e.name] = {
            "dtype": e.dtype,
            "shape": e.shape,
            "data_offsets": [e.offset - start, e.offset - start + e.nbytes],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class _OutFile:
    """A file of the new checkpoint, written at any offset, by one thread at a time to avoid spinning on its lock."""

    def __init__(self, path: Path) -> None:
        self._handle, self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644), threading.Lock()

    def start(self, entries: list[Entry]) -> None:
        """Allocates the file in full and writes its header, so that a full disk is noticed now."""
        os.posix_fallocate(self._handle, 0, max(e.offset + e.nbytes for e in entries))
        self.write(_header(entries, min(e.offset for e in entries)), 0)

    def write(self, data: bytes | np.ndarray, offset: int) -> None:
        view = memoryview(data if isinstance(data, bytes) else _bytes(data))
        start, size = offset, len(view)
        while view:
            with self._lock:
                written = os.pwrite(self._handle, view, offset)
            view, offset = view[written:], offset + written
        # Sends the bytes on to the disk now, beside the work on the next ones, and not all of them at the end.
        os.posix_fadvise(self._handle, start, size, os.POSIX_FADV_DONTNEED)

    def hash(self, offset: int, nbytes: int) -> str:
        """Returns the hash of bytes that were written before."""
        digest = xxhash.xxh3_128()
        for start in range(offset, offset + nbytes, _UNIT_BYTES):
            digest.update(os.pread(self._handle, min(_UNIT_BYTES, offset + nbytes - start), start))
        return digest.hexdigest()

    def sync(self) -> None:
        os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)


def _bytes(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _units(entries: dict[str, Entry]) -> list[Unit]:
    """Groups tensors into units of similar size, each weight with its scales."""
    units: list[Unit] = []
    group: list[str] = []
    size = 0
    weights = [n for n in entries if not n.endswith(SCALE)]
    for i, name in enumerate(weights):
        group.append(name)
        size += entries[name].nbytes
        if size >= _UNIT_BYTES or i == len(weights) - 1:
            units.append(Unit(group[0], size, tuple(group)))
            group, size = [], 0
    return units


def _write_tensor(
    store: Store, entries: dict[str, Entry], name: str, block: tuple[int, int] | None, out: dict[str, _OutFile]
) -> dict[str, str]:
    """Writes a tensor, and its scales if it is in FP8. Returns the hashes of their bytes."""
    entry, scale = entries[name], entries.get(name + SCALE)
    dtype = DTYPES[entry.dtype]
    if dtype == FP8 and not store.is_fp8(name):
        assert block is not None
        assert scale is not None
        made = zip(
            (entry, scale), quantise_matrix(store.matrix(name), block, power_of_two=store.power_of_two), strict=True
        )
        hashes = {}
        for e, data in made:
            out[e.file].write(data, e.offset)
            hashes[e.name] = xxhash.xxh3_128_hexdigest(_bytes(data))
        return hashes
    digest, offset = xxhash.xxh3_128(), entry.offset
    for rows in store.bands(name):
        data = _bytes(store.matrix(name, rows, dtype))
        digest.update(data)
        out[entry.file].write(data, offset)
        offset += data.nbytes
    hashes = {name: digest.hexdigest()}
    if scale is not None:
        grid = _bytes(store.scales(name))
        out[scale.file].write(grid, scale.offset)
        hashes[scale.name] = xxhash.xxh3_128_hexdigest(grid)
    for written, found in hashes.items():
        _check_hash(store, written, entries[written].dtype, found)
    return hashes


def _check_hash(store: Store, name: str, dtype: str, digest: str) -> None:
    """Checks tensors written in the source's dtype against the source's hashes, if the store has them."""
    kept, expected = store.manifest["tensors"].get(name, (None, None))
    if store.manifest["dtype"] == "keep" and kept == dtype and expected != digest:
        raise CheckpointError(f"{name} in {store.directory} isn't what {MANIFEST} says: the checkpoint is damaged")


def _describe(
    store: Store, directory: Path, entries: dict[str, Entry], dtype: str, block: tuple[int, int] | None
) -> None:
    """Writes config.json, the index if there are several files, and the small files of the source."""
    cast = {"bf16": "bfloat16", "float32": "float32"}.get(dtype)
    fields = converted_fields(store.fields, store.config, cast, block)
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    where = {e.name: e.file for e in entries.values()}
    if set(where.values()) != {SINGLE}:
        index = {"metadata": {"total_size": sum(e.nbytes for e in entries.values())}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    store.write_small_files(directory)
