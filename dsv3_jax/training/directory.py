"""The directory of a run: what stands in it before the first step."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import xxhash

from dsv3_jax.checkpoint.hashes import seal
from dsv3_jax.checkpoint.runs import read_config
from dsv3_jax.config import ConfigError
from dsv3_jax.json_input import check_type
from dsv3_jax.training.config import TrainConfig

CONFIG = "config.json"

TOKENIZER_FILES = ("tokenizer.json", "tiktoken.model", "tokenizer_config.json")
"""What a run keeps of its tokenizer, under the names that a Hugging Face checkpoint uses."""


def tokenizer_sources(path: str | Path | None) -> dict[str, Path]:
    """Which file of the tokenizer at `path`, a file or a folder, is kept under which name. None for bytes."""
    if path is None:
        return {}
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    found = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if path.is_dir():
        return found
    beside = {name: file for name, file in found.items() if name == "tokenizer_config.json"}
    return {"tiktoken.model" if path.suffix == ".model" else "tokenizer.json": path} | beside


def hashes(files: dict[str, Path]) -> dict[str, str]:
    """The xxh3_128 of each file's bytes."""
    return {name: xxhash.xxh3_128_hexdigest(file.read_bytes()) for name, file in sorted(files.items())}


def write_config(directory: Path, config: TrainConfig, tokenizer: dict[str, str]) -> None:
    """Writes `config.json`: the run's config, under `tokenizer_files` its tokenizer's hashes, under `seal` its own."""
    content = seal(dataclasses.asdict(config) | {"tokenizer_files": tokenizer})
    _replace(directory / CONFIG, (json.dumps(content, indent=2) + "\n").encode())


def keep_tokenizer(directory: Path, path: str | Path | None) -> dict[str, str]:
    """Copies the tokenizer's files into the run's directory, whole or not at all; returns their hashes."""
    files = tokenizer_sources(path)
    for name, file in files.items():
        _replace(directory / name, file.read_bytes())
    return hashes(files)


def kept_tokenizer(directory: Path, path: str | Path | None) -> str | Path | None:
    """Where a run that goes on finds its tokenizer: its own copy, else (a run that kept none) `path`.

    Raises ConfigError if the copy isn't what it was when the run began, or `path` holds another tokenizer.
    """
    recorded = read_config(directory / CONFIG).get("tokenizer_files") or {}
    check_type(recorded, dict[str, str], f"{directory / CONFIG}: tokenizer_files", ConfigError)
    kept = hashes({name: directory / name for name in recorded if (directory / name).is_file()})
    for name, digest in recorded.items():
        if kept.get(name) != digest:
            what = "isn't what it was" if name in kept else "is gone, which was there"
            raise ConfigError(
                f"{directory / name} {what} when the run began: put the original back (xxh3_128 {digest})"
            )
    if not recorded:
        return path
    given = {name: file for name, file in tokenizer_sources(path).items() if file.is_file()}
    if given and hashes(given) != kept:
        raise ConfigError(f"data.tokenizer is {path}, but {directory} was trained with another one, which it keeps")
    return directory


def _replace(path: Path, content: bytes) -> None:
    """Puts a file in place in one step, so that a crash leaves the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)
