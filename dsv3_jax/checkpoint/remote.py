"""Directories on object stores, such as gs://bucket/run. `fetched` copies one to the user's cache, to be read there.

Through fsspec: gs:// with gcsfs, s3:// with s3fs, az:// with adlfs, file://, and others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import fsspec
import xxhash

from dsv3_jax.checkpoint.jobs import in_parallel
from dsv3_jax.checkpoint.runs import CHECKPOINTS, HASHES
from dsv3_jax.config import ConfigError

OWNER = "owner.json"
"""The object of a run at a URL that says which process writes there."""

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)")
WORKERS = 8
"""Files that are copied at a time."""

_SMALL = 16 << 20
_TRIES = 3
_VERSION = ("size", "ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "updated", "created")
"""Fields of a file system's listing that differ when the content does."""


def as_url(path: str | Path) -> str | None:
    """Returns the URL that a path is, or None if it is one of this machine. A `Path` of a URL has lost a slash."""
    found = _URL.fullmatch(str(path).rstrip("/"))
    return found and f"{found[1]}://{'/' if found[1] in ('file', 'local') else ''}{found[2]}"


class Remote:
    """The files below a URL, by their names relative to it.

    Raises ConfigError if no package for such URLs is installed. Its methods raise FileNotFoundError, and OSError for
    whatever else goes wrong.
    """

    def __init__(self, url: str) -> None:
        self.url, scheme = url, url.partition(":")[0]
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)  # it logs tracebacks of what it raises
        options = {"auto_mkdir": True} if scheme in ("file", "local") else {}
        try:
            self._files, root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise ConfigError(f"{url} can't be used, a package is missing: {_line(error)}") from None
        except ValueError as error:
            if scheme in fsspec.available_protocols():
                raise ConfigError(f"{url} can't be used: {_line(error)}") from None
            raise ConfigError(
                f"{url} is of no known kind: it must begin with gs://, s3://, az:// or another of fsspec's"
            ) from None
        self._root = str(root).rstrip("/")

    def list(self) -> dict[str, str]:
        """Returns all files, each with a text that changes when the file does; none if there is no such directory."""
        with self._named("listed"):
            self._files.invalidate_cache()  # other machines write there too
            try:
                found = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        below = f"{self._root}/"
        return {
            path.removeprefix(below): json.dumps([str(info.get(name)) for name in _VERSION])
            for path, info in found.items()
            if path.startswith(below) and not path.endswith("/")
        }

    def read(self, name: str) -> bytes | None:
        """Returns the content of a file, or None if there is none of that name."""
        with self._named("read"):
            try:
                content: bytes = self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        with self._named(f"written ({name})"):
            self._files.pipe_file(self._path(name), content)

    def put(self, file: Path, name: str) -> None:
        """Copies a file of this machine there. A small one may grow meanwhile."""
        if file.stat().st_size < _SMALL:
            self.write(name, file.read_bytes())
            return
        with self._named(f"written ({name})"):
            self._files.put_file(str(file), self._path(name))

    def get(self, name: str, file: Path) -> None:
        """Copies a file to this machine. It gets its name when it is whole. Raises FileNotFoundError."""
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            with self._named(f"read ({name})"):
                self._files.get_file(self._path(name), str(beside))
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Removes a file, or all files below a directory, if there are any."""
        with self._named(f"removed ({name})"), contextlib.suppress(FileNotFoundError):
            self._files.invalidate_cache()
            self._files.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Raises what a file system raises, of many kinds, as an OSError of one line with the URL."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.url} can't be {what}, there is no such file or bucket: {_line(error)}"
            ) from error
        except Exception as error:
            raise OSError(f"{self.url} can't be {what}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def complete_steps_of(names: Iterable[str]) -> list[int]:
    """Lists the steps that are whole among the names of a run's files, ascending.

    The hashes of a step are written after its other files, and removed before them.
    """
    found = (re.fullmatch(rf"{CHECKPOINTS}/(\d+)/{HASHES}", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def in_step(name: str) -> int | None:
    """Returns the step that a run's file belongs to, or None for a file beside the checkpoints."""
    match = re.match(rf"{CHECKPOINTS}/(\d+)/", name)
    return int(match[1]) if match else None


def cached(kind: str, url: str) -> Path:
    """Returns the directory in the user's cache for a URL, with its last part as name, in a folder of its own."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = url.rsplit("/", 1)[-1]
    return base.absolute() / "dsv3_jax" / kind / f"{name}-{xxhash.xxh3_64_hexdigest(url.encode())}" / name


def fetched(path: str | Path, *, weights: bool = True) -> Path:
    """Returns `path` if it is one of this machine. A URL is copied to the user's cache first, where it has changed.

    weights: whether to copy a run's newest whole checkpoint, too. Of another directory all files are copied.

    Raises ConfigError, FileNotFoundError and OSError, each with the URL.
    """
    url = as_url(path)
    if url is None:
        return Path(path)
    remote, here = Remote(url), cached("fetched", url)
    for left in reversed(range(_TRIES)):
        try:
            _fetch(remote, here, weights)
            break
        except FileNotFoundError:  # a run deletes its old checkpoints
            if not left:
                raise
    return here


def _fetch(remote: Remote, here: Path, weights: bool) -> None:
    found, journal = remote.list(), here.with_name("versions.json")
    if not set(found) - {OWNER}:
        raise FileNotFoundError(f"{remote.url} holds no files: give the URL of a training run or checkpoint")
    steps = complete_steps_of(found)[-1:] if weights else []
    wanted = {n: v for n, v in found.items() if not n.startswith(CHECKPOINTS) or in_step(n) in steps}  # none set aside
    wanted.pop(OWNER, None)
    try:
        known = json.loads(journal.read_text())
    except (OSError, ValueError):
        known = {}
    here.mkdir(parents=True, exist_ok=True)
    if any(name.startswith(f"{CHECKPOINTS}/") for name in found):
        (here / CHECKPOINTS).mkdir(exist_ok=True)  # by which a run is recognised
    new = [name for name, version in wanted.items() if known.get(name) != version or not (here / name).is_file()]
    in_parallel(lambda name: remote.get(name, here / name), new, WORKERS)
    for name in set(known) - set(found):
        (here / name).unlink(missing_ok=True)
    for other in (here / CHECKPOINTS).glob("*") if steps else ():
        if other.name != str(steps[0]):
            shutil.rmtree(other, ignore_errors=True)
    beside = journal.with_name(f".{journal.name}.{os.getpid()}")
    beside.write_text(json.dumps({name: version for name, version in known.items() if name in found} | wanted))
    beside.replace(journal)
