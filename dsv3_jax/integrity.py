"""Integrity of files: hashes of files, seals of JSON descriptions, and flushing to disk.

The hash of a file is xxh3_128 of its bytes. A sealed JSON object ends with the hash of its other fields.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from dsv3_jax.json_input import Raise

FileHash = tuple[int, str]
"""A file's size in bytes, and its hash in hexadecimal digits."""

SEAL = "seal"


def hash_file(file: Path) -> FileHash:
    """Hashes the bytes of a file in a stream."""
    digest, buffer, size = xxhash.xxh3_128(), bytearray(1 << 18), 0
    with file.open("rb", buffering=0) as opened:
        while n := opened.readinto(buffer):
            digest.update(memoryview(buffer)[:n])
            size += n
    return size, digest.hexdigest()


def seal(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the hash of all fields as the last field."""
    return {**fields, SEAL: _hash_fields(fields)}


def unseal(fields: Mapping[str, Any], file: Path, error: Raise) -> dict[str, Any]:
    """Returns the argument of `seal`. Raises `error` if a field has changed."""
    kept = {name: value for name, value in fields.items() if name != SEAL}
    if fields.get(SEAL) != _hash_fields(kept):
        raise error(f"{file} isn't what was written: it is damaged or was changed, and its field {SEAL!r} doesn't fit")
    return kept


def _hash_fields(fields: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())


def sync(path: Path) -> None:
    """Waits until the content of a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
