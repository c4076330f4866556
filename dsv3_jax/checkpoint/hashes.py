"""Hashes of the files of a checkpoint, written beside them and checked on reading.

The hash of a file is xxh3_128 of its bytes. Hashing files rather than arrays covers what copies and disks damage or
lose, and is independent of shards, meshes and devices.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import jax

from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.checkpoint.jobs import in_parallel
from dsv3_jax.integrity import FileHash, hash_file
from dsv3_jax.json_input import field
from dsv3_jax.parallel.placement import any_process

_SMALL = 1 << 20
_WORKERS = 4

_log = logging.getLogger(__name__)


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, FileHash]:
    """Hashes several files below a directory, in parallel."""
    found: dict[str, FileHash] = {}
    in_parallel(lambda name: found.update({name: hash_file(directory / name)}), names, _WORKERS)
    return dict(sorted(found.items()))


class FileHashes:
    """Expected hashes of the files below a directory. Each file is checked once, on first use.

    expected: by relative path. where: the name of the file with the hashes.
    """

    def __init__(self, directory: Path, expected: Mapping[str, FileHash], where: str) -> None:
        self.directory, self.expected, self.where = directory, expected, where
        self._checks: dict[str, concurrent.futures.Future[None]] = {}
        self._lock, self._checked = threading.Lock(), False

    def check(self, names: Iterable[str]) -> None:
        """Checks files that haven't been checked yet, and waits for those being checked by other threads.

        Raises:
          FileNotFoundError: a file is missing.
          CheckpointError: a file has changed since it was written.
        """
        if self._checked:
            return
        names = list(names)
        if len(names) == 1:
            self._check_once(names[0])
        else:
            in_parallel(self._check_once, names, _WORKERS)

    def _check_once(self, name: str) -> None:
        with self._lock:
            mine = name not in self._checks
            future = self._checks.setdefault(name, concurrent.futures.Future())
        if mine:
            try:
                self._check(name)
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)
        future.result()

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Checks every file: small ones first, the others in parallel with the `with` block. Raises as `check`.

        With several processes, each first checks its share, since a failure inside the block would leave the others
        waiting.
        """
        if jax.process_count() > 1:
            self.check_together()
            yield
            return
        small = [n for n, (size, _) in self.expected.items() if size <= _SMALL]
        self.check(small)  # descriptions: what they say is used before their reading ends
        with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
            running = [pool.submit(self.check, [n]) for n in sorted(set(self.expected) - set(small))]
            try:
                yield
            finally:
                for future in running:
                    future.result()  # says more than what the block made of damaged bytes

    def check_together(self) -> None:
        """Checks every file in one of the processes, and raises in all of them if one fails."""
        share, failure = sorted(self.expected)[jax.process_index() :: jax.process_count()], None
        try:
            in_parallel(lambda name: self.check([name]), share, _WORKERS)
        except (OSError, CheckpointError) as error:
            failure = error
        if any_process(failure is not None):
            raise failure or CheckpointError(f"another process found a file of {self.directory} missing or damaged")
        self._checked = True

    def _check(self, name: str) -> None:
        file, expected = self.directory / name, self.expected.get(name)
        if expected is None:
            if file.exists():
                raise CheckpointError(f"{file} isn't listed in {self.where}: it is of another checkpoint; remove it")
            return  # an array's part that is zero has no file
        try:
            found = hash_file(file)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise FileNotFoundError(
                f"{file} is missing, which {self.where} lists: the checkpoint is incomplete; copy it again"
            ) from None
        if found != expected:
            what = f"has {found[0]} bytes of {expected[0]}" if found[0] != expected[0] else "has other bytes"
            raise CheckpointError(f"{file} isn't what {self.where} says: it {what}; it is damaged, copy it again")


class Unchecked(FileHashes):
    """Returns hashes that aren't checked, with a warning in the log."""

    def __init__(self, directory: Path, why: str) -> None:
        super().__init__(directory, {}, "")
        self._checked = True
        _log.warning("%s is read unchecked: %s", directory, why)


# Descriptions that hold hashes ---------------------------------------------------------------------------


def file_hashes(directory: Path, fields: Mapping[str, Any], where: str) -> FileHashes:
    """Reads the hashes in the field `files` of a description."""
    files = field(fields, "files", dict[str, tuple[int, str]], str(directory / where), CheckpointError)
    for name in files:
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise CheckpointError(f"{directory / where} lists {name!r}: it must be a file below {directory}")
    return FileHashes(directory, {name: (size, digest) for name, (size, digest) in files.items()}, where)
