"""Resumable work: units are done in parallel and recorded in a journal, and the result is renamed into place.

Everything is written under `DST.incomplete`. A finished unit is a line in its `journal.jsonl`, and is skipped when the
same work is started again. Only a complete result is renamed to DST.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.integrity import sync
from dsv3_jax.json_input import is_type

JOURNAL = "journal.jsonl"


@dataclasses.dataclass(frozen=True)
class Unit:
    """A unit of work: its name in the journal, the bytes that it reads, and its subject."""

    key: str
    nbytes: int
    what: Any


class Workspace:
    """`DST.incomplete` and its journal. Use `open_workspace`."""

    def __init__(self, target: Path, directory: Path, journal: Any, done: dict[str, Any]) -> None:
        self.target, self.directory, self.done = target, directory, done
        self._journal, self._lock = journal, threading.Lock()

    def note(self, key: str, result: Any) -> None:
        """Records that a unit is done. Its `result` is returned on resuming."""
        with self._lock:
            self.done[key] = result
            self._journal.write(json.dumps([key, result]) + "\n")
            self._journal.flush()

    def finish(self) -> None:
        """Flushes everything to disk, then renames it."""
        self._journal.close()
        (self.directory / JOURNAL).unlink()
        os.sync()
        self.directory.rename(self.target)
        sync(self.target.parent)


def check_target(target: Path) -> None:
    """Raises FileExistsError if the destination exists."""
    if target.exists():
        raise FileExistsError(f"{target} exists already: choose another destination, or remove it")


@contextmanager
def open_workspace(target: Path, identity: Any, nbytes: int) -> Iterator[Workspace]:
    """Opens the workspace of a conversion to `target`, new or from an interruption.

    Args:
      identity: identifies the work (JSON); interrupted work is continued only if it is equal.
      nbytes: the approximate size of the result.

    Raises:
      FileExistsError: `target` exists, or another process is working on it.
      CheckpointError: the workspace contains different work.
      OSError: there isn't room for `nbytes`, or the disk becomes full; the work so far can be resumed.
    """
    check_target(target)
    directory = target.with_name(target.name + ".incomplete")
    mark = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    done = _read_journal(directory, mark)
    present = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file()) if directory.exists() else 0
    _check_room(target, nbytes - present)
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / JOURNAL).open("a") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileExistsError(f"another process is writing {directory}: wait for it, or stop it") from None
        if created or not done:
            journal.truncate(0)
            journal.write(json.dumps(mark) + "\n")
        else:
            journal.write("\n")  # ends a line that the interruption cut
        journal.flush()
        for lock in directory.rglob("*.__lock"):  # of files that tensorstore was writing
            lock.unlink()
        try:
            yield Workspace(target, directory, journal, done)
        except BaseException as error:
            if _disk_is_full(error):
                raise OSError(
                    errno.ENOSPC,
                    f"the disk of {target} is full: what is done stays in {directory}; "
                    "free some space and run the same command to continue",
                ) from error
            raise


def run_units(
    workspace: Workspace,
    units: Iterable[Unit],
    work: Callable[[Unit], Any],
    intact: Callable[[Unit, Any], bool],
    *,
    title: str,
    workers: int,
    console: Console | None = None,
) -> None:
    """Does every remaining unit, `workers` at a time, showing progress. Stops at the first failure.

    work: does a unit; its result is recorded in the journal. intact: whether the output of a finished unit, given that
    result, is unchanged; otherwise the unit is done again.
    """
    console, units = console or Console(stderr=True), list(units)
    left = {u.key: u for u in units if u.key not in workspace.done}
    if done := [u for u in units if u.key in workspace.done]:
        console.print(f"{len(done):,} of {len(units):,} parts are done already: checking them")
        check = lambda u: None if intact(u, workspace.done[u.key]) else left.update({u.key: u})
        in_parallel(check, done, workers)
        if damaged := len(left) + len(done) - len(units):
            console.print(f"{damaged:,} of them are damaged or lost: they are done again")
    total = sum(u.nbytes for u in units)
    with show_progress(console) as progress:
        bar = progress.add_task(title, total=total, completed=total - sum(u.nbytes for u in left.values()))

        def do(unit: Unit) -> None:
            workspace.note(unit.key, work(unit))
            progress.advance(bar, unit.nbytes)

        in_parallel(do, list(left.values()), workers)


def in_parallel(do: Callable[[Any], Any], items: Iterable[Any], workers: int) -> None:
    """Calls `do` for every item in `workers` threads, with at most twice as many waiting. Raises the first failure."""
    remaining = iter(items)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(do, item) for item in itertools.islice(remaining, 2 * workers)}
        try:
            while running:
                finished, running = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
                for future in finished:
                    future.result()
                running |= {pool.submit(do, item) for item in itertools.islice(remaining, len(finished))}
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def keep_freed_memory() -> None:
    """Makes the C library reuse large blocks, since page faults would cost more than copying.

    Intended for processes such as the command line's. Does nothing if the library has no such option.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # numbers of malloc.h
        mallopt(mmap_threshold, 32 << 20)  # the most that it takes
        mallopt(trim_threshold, 512 << 20)


def show_progress(console: Console | None) -> Progress:
    """Returns a progress bar with bytes, bytes per second, elapsed and remaining time, on standard error by default."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )


def _read_journal(directory: Path, mark: str) -> dict[str, Any]:
    """Reads the results of finished units. An incomplete last line is ignored."""
    path = directory / JOURNAL
    if not path.exists():
        if directory.exists() and any(directory.iterdir()):
            raise CheckpointError(f"{directory} holds something else than an interrupted conversion: remove it")
        return {}
    lines = path.read_text(errors="replace").splitlines()
    if not lines:
        return {}
    if lines[0] != json.dumps(mark):
        raise CheckpointError(
            f"{directory} holds an interrupted conversion of another source or with other options: "
            "run that one to its end, or remove the directory"
        )
    done = {}
    for line in lines[1:]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if is_type(entry, tuple[str, Any]):
            done[entry[0]] = entry[1]
    return done


def _check_room(target: Path, nbytes: int) -> None:
    parent = target.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise OSError(
            errno.ENOSPC, f"{target} needs about {nbytes / 1e9:.1f} GB more, but its disk has {free / 1e9:.1f} GB free"
        )


def _disk_is_full(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or (
        "No space left on device" in str(error)
    )
