"""The directory of a run: its owner, its lock, and its files before the first step."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from dsv3_jax.checkpoint.run_tokenizer import kept_files
from dsv3_jax.checkpoint.runs import CHECKPOINTS, complete_steps
from dsv3_jax.config import ConfigError, build_dataclass
from dsv3_jax.data.tokenizer_files import TOKENIZER_FILES, tokenizer_sources
from dsv3_jax.integrity import seal
from dsv3_jax.json_input import parse_json
from dsv3_jax.training.config import TrainConfig

CONFIG = "config.json"
METRICS = "metrics.jsonl"
LOCK = "lock"

_AT_THE_START = {CONFIG, LOCK, CHECKPOINTS, "tensorboard", *TOKENIZER_FILES}
"""Files that may exist before the first checkpoint, that of step 0."""


def check_directory(config: TrainConfig, directory: Path, *, resume: bool) -> None:
    """Raises ConfigError if a run of `config` in `directory` would mix two runs, or there is nothing to resume."""
    path, checkpoints = directory / CONFIG, directory / CHECKPOINTS
    if not path.exists():
        if resume:
            raise ConfigError(f"{directory} holds no run to resume: start it without --resume")
        if directory.exists() and visible(directory) - {LOCK}:
            raise ConfigError(f"{directory} is not empty and holds no run: choose another --run-dir")
        return
    before = TrainConfig.from_json(path)
    if not resume and not has_begun(directory):
        return
    if differences := config.differences(before):
        raise ConfigError(
            f"{directory} holds a run of another config ({'; '.join(differences)}): choose another --run-dir"
        )
    if not _saved(directory):
        raise ConfigError(
            f"{directory} holds a run, but {checkpoints} has no checkpoint to go on from: put them back there, or "
            "start anew with another --run-dir"
        )
    if not resume:
        raise ConfigError(
            f"{directory} holds this run already: add --resume to continue it, or choose another --run-dir"
        )


def has_begun(directory: Path) -> bool:
    """Whether `directory` contains a run with at least one checkpoint."""
    if not (directory / CONFIG).exists():
        return False
    return _saved(directory) or bool(visible(directory) - _AT_THE_START)


def _saved(directory: Path) -> bool:
    checkpoints = directory / CHECKPOINTS
    return checkpoints.is_dir() and bool(complete_steps(checkpoints))


def visible(directory: Path) -> set[str]:
    """Lists the names in a directory, except for those with a leading dot, which are unfinished files from a crash."""
    return {p.name for p in directory.iterdir() if not p.name.startswith(".")}


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[str]:
    """Locks a directory for this process, at most until the process ends in whatever way.

    Yields a warning if the file system has no locks (`flock`), else nothing. Whether a lock works across hosts depends
    on the file system: it does on NFS from version 4 on, GPFS, and Lustre mounted with `flock`.

    Raises ConfigError if another process holds the directory.
    """
    file, warning = directory / LOCK, ""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "not named"
            raise ConfigError(
                f"{directory} is held by another process ({holder}), which trains there: wait for its end, stop it, or "
                "choose another --run-dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warning = f"{directory} is on a file system without locks: see to it that no other process trains there"
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield warning
    finally:
        os.close(descriptor)


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    """Returns the xxh3_128 of each file."""
    return {name: xxhash.xxh3_128_hexdigest(data) for name, data in sorted(files.items())}


def write_config(directory: Path, config: TrainConfig, tokenizer: str | Path | None) -> None:
    """Writes `config.json` and copies the tokenizer's files, each of them atomically.

    `config.json` is the run's config, with the tokenizer's hashes in `tokenizer_files` and its own hash in `seal`. It
    is written first, since files without it would belong to somebody else.
    """
    write_fields(directory, dataclasses.asdict(config), tokenizer)


def write_fields(directory: Path, fields: dict[str, Any], tokenizer: str | Path | None) -> None:
    """`write_config` for the fields of a run of any kind."""
    files = {name: file.read_bytes() for name, file in tokenizer_sources(tokenizer).items()}
    content = seal(fields | {"tokenizer_files": hashes(files)})
    replace_file(directory / CONFIG, (json.dumps(content, indent=2) + "\n").encode())
    for name, data in files.items():
        replace_file(directory / name, data)


def check_config(config: TrainConfig) -> None:
    """Raises ConfigError if the config couldn't be read back from `config.json`, such as text that isn't UTF-8."""
    try:
        kept = parse_json(json.dumps(dataclasses.asdict(config)), "config", ConfigError)
    except TypeError as error:  # a value that isn't one of JSON, given in Python
        raise ConfigError(f"the run's config can't be written: {error}") from None
    build_dataclass(TrainConfig, kept, "the run's config")


def kept_tokenizer(directory: Path, path: str | Path | None) -> str | Path | None:
    """Returns the path of a resumed run's tokenizer: its own copy or, if there is none, `path`.

    Raises ConfigError if the copy has changed, or `path` contains another tokenizer.
    """
    recorded = kept_files(directory)
    if not recorded:
        return path
    given = {name: file.read_bytes() for name, file in tokenizer_sources(path).items() if file.is_file()}
    if given and hashes(given) != recorded:
        raise ConfigError(f"data.tokenizer is {path}, but {directory} was trained with another one, which it keeps")
    return directory


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file atomically."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)
