"""Runs at URLs, such as gs://bucket/run: trained in a working copy on this machine that is copied there meanwhile.

The working copy is a directory like that of any other run. A thread copies what changes in it to the URL: the files
beside the checkpoints about every minute, a checkpoint when it is complete. A checkpoint is whole at the URL when it
has its hashes, which are copied last; what an interruption leaves without them isn't used, and is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from dsv3_jax.checkpoint.jobs import in_parallel
from dsv3_jax.checkpoint.remote import OWNER, WORKERS, Remote, as_url, cached, complete_steps_of, in_step
from dsv3_jax.checkpoint.runs import CHECKPOINTS, HASHES, RUN_ITEM, complete_steps
from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer_files import TOKENIZER_FILES
from dsv3_jax.parallel.placement import all_processes_here, any_process
from dsv3_jax.training.directory import CONFIG, LOCK, locked, replace_file

COPY_SECONDS = 60.0
"""Longest time between two copies of the small files."""
BEAT_SECONDS = 30.0
"""Time between two signs of life at the URL."""
WAIT_SECONDS = 100.0
"""How long a process that takes over a run waits for a sign of life of the one before."""
_FORGOTTEN_SECONDS = 3600.0
"""Age of a sign of life that isn't waited for, with room for clocks that differ."""
_POLL_SECONDS = 0.5
_LAST_TRIES = 4

_FIRST = (CONFIG, *TOKENIZER_FILES)
"""Files that exist before the first checkpoint. They come first: without them a directory is of no run."""


@contextlib.contextmanager
def working_copy(directory: Path | str, console: Console | None = None) -> Iterator[Path]:
    """Yields the directory to train in: `directory` itself, or for a URL its working copy, which is kept.

    What is at the URL is copied down first, and the working copy is copied there until the block ends, however it
    ends. All processes of a job must call it together, and must share the user's cache directory.

    Raises:
      ConfigError: another process trains there, no package for the URL is installed, or the processes share no cache.
      OSError: the URL can't be read or written. What couldn't be copied there is in the working copy.
    """
    url = as_url(directory)
    if url is None:
        yield Path(directory)
        return
    console = console or Console(quiet=jax.process_index() != 0)
    here, refused = cached("runs", url), None
    all_processes_here()  # they connect at their first exchange, and wait for that half a minute only
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                stack.enter_context(_mirrored(url, here, lambda line: console.print(line, soft_wrap=True)))
            except (ConfigError, OSError) as error:
                refused = error
        if any_process(refused is not None):
            raise refused or ConfigError(f"{url} can't be used: process 0 says why")
        if jax.process_count() > 1:
            _check_shared(here)
        yield here


def _check_shared(here: Path) -> None:
    """Raises ConfigError if a process doesn't see the working copy of process 0."""
    session = (_owner_here(here) or {}).get("session", "")
    mine = np.frombuffer(session.encode().ljust(32)[:32], np.uint8)
    if any_process(not np.array_equal(multihost_utils.broadcast_one_to_all(mine), mine)):
        raise ConfigError(
            f"the processes don't share {here}, where they would write their parts of a checkpoint: set XDG_CACHE_HOME "
            "to a directory of a shared file system, or mount the bucket and give the path of the mount"
        )


@contextlib.contextmanager
def _mirrored(url: str, here: Path, say: Callable[[str], None]) -> Iterator[None]:
    remote = Remote(url)
    here.mkdir(parents=True, exist_ok=True)
    with locked(here.parent) as warning:
        if warning:
            say(f"warning: {warning}")
        mirror = Mirror(remote, here, say)
        mirror.open()
        say(f"{url} is trained in {here}, and copied from there")
        try:
            yield
        except BaseException:
            try:
                mirror.close()
            except OSError as error:
                say(f"warning: {error}")  # the failure of the run says more
            raise
        mirror.close()


class Mirror:
    """Keeps a copy of a run's directory at a URL."""

    def __init__(self, remote: Remote, here: Path, say: Callable[[str], None]) -> None:
        """here: the working copy, in a folder of its own that this process has locked. say: prints a line."""
        self.remote, self.here, self._say = remote, here, say
        self._there: dict[int, bytes] = {}  # the hashes of the steps at the URL
        self._seen: set[int] = set()  # steps that were in the working copy
        self._copied: dict[str, tuple[int, int]] = {}  # size and time of each small file when it was copied
        self._owner: dict[str, Any] = {}
        self._ended, self._lost = threading.Event(), ""
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._copy_on, self._beat_on)]

    # Begin -----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Takes the run over, copies what is at the URL to the working copy, and starts to copy the other way.

        Raises ConfigError if another process trains there, and OSError.
        """
        before, mine = self._owner_there(), _owner_here(self.here)
        ours = before is not None and mine is not None and before["session"] == mine["session"]
        if before is not None and not ours:  # of ours the lock says that it has ended
            self._wait_for_the_end_of(before)
        session = before["session"] if ours and before else uuid.uuid4().hex
        self._owner = {"session": session, "host": socket.gethostname(), "process": os.getpid()}
        self._sign()
        found = self.remote.list()
        for step in complete_steps_of(found):
            self._there[step] = self.remote.read(_hashes(step)) or b""
        for part in {in_step(name) for name in found} - {None, *self._there}:  # without hashes: of an interruption
            self.remote.remove(f"{CHECKPOINTS}/{part}")
        if not ours:
            self._clear()
        self._copy_down(found)
        replace_file(self.here.with_name(OWNER), json.dumps(self._owner).encode())
        for thread in self._threads:
            thread.start()

    def _wait_for_the_end_of(self, owner: dict[str, Any]) -> None:
        """Returns when a process has ended. Raises ConfigError if it gives a sign of life."""
        age = time.time() - owner["time"]
        if owner["ended"] or age > _FORGOTTEN_SECONDS:
            return
        who = f"process {owner['process']} on {owner['host']}"
        self._say(
            f"{self.remote.url} was held by {who} {age:.0f} s ago: waiting {WAIT_SECONDS:.0f} s for a sign of life"
        )
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(5.0, WAIT_SECONDS / 10))
            if (now := self._owner_there()) is not None and now != owner:
                if now["ended"]:
                    return
                raise ConfigError(
                    f"{self.remote.url} is held by {who}, which trains there: wait for its end, stop it, or choose "
                    "another --run-dir"
                )

    def _clear(self) -> None:
        """Empties the working copy, which is of an earlier state. Later checkpoints than at the URL are set aside."""
        newest = max(self._there, default=-1)
        if any(step > newest or step in self._there for step in self._pending()):
            aside = self.here.with_name(f"{self.here.name}-{time.time_ns()}")
            self.here.rename(aside)
            self._say(f"{self.remote.url} isn't what was here before, which is now {aside}")
        else:
            shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir(exist_ok=True)

    def _copy_down(self, found: dict[str, str]) -> None:
        """Copies what the working copy lacks: small files, and the newest checkpoints back to one that is good."""
        folder, steps = self.here / CHECKPOINTS, []
        for step in sorted(self._there, reverse=True):
            steps.append(step)
            run = self.remote.read(f"{CHECKPOINTS}/{step}/{RUN_ITEM}/metadata") or b"{}"
            with contextlib.suppress(ValueError):
                if len(steps) > 1 and json.loads(run).get("good"):
                    break
        small = [name for name in found if not name.startswith(CHECKPOINTS) and name != OWNER]  # none set aside
        lacking = [name for name in small if not (self.here / name).exists()]
        in_parallel(lambda name: self.remote.get(name, self.here / name), lacking, WORKERS)
        for name in lacking:
            self._copied[name] = _state(self.here / name)
        for step in steps:
            if not (folder / str(step)).exists():
                names = [name for name in found if in_step(name) == step]
                arriving = self.here.with_name("arriving")  # it gets its place when it is whole
                shutil.rmtree(arriving, ignore_errors=True)
                in_parallel(lambda name, at=arriving: self.remote.get(name, at / name), names, WORKERS)  # type: ignore[misc]
                folder.mkdir(exist_ok=True)
                (arriving / CHECKPOINTS / str(step)).rename(folder / str(step))
        self._seen = set(steps)

    # Meanwhile -------------------------------------------------------------------------------------------

    def _copy_on(self) -> None:
        """Copies when a checkpoint is complete, and every minute. What fails is tried again, with one message."""
        copied, failed = time.monotonic(), ""
        while not self._ended.wait(_POLL_SECONDS):
            try:
                if not self._pending() and time.monotonic() < copied + COPY_SECONDS:
                    continue
                self.copy()
                if failed:
                    self._say(f"{self.remote.url} can be written again")
                failed = ""
            except Exception as error:  # of file systems, which raise many kinds, and of a disk
                if not failed:
                    self._say(f"warning: {error}; the run goes on in {self.here}, and copying is tried again")
                failed = str(error)
                self._ended.wait(COPY_SECONDS / 6)
            copied = time.monotonic()

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # copying says so too
                self._beat()

    def _beat(self) -> None:
        """Gives a sign of life, unless another process has taken the run over: then nothing more is copied."""
        now = self._owner_there()
        if not self._lost and now is not None and now["session"] != self._owner["session"]:
            who = f"process {now['process']} on {now['host']}"
            self._lost = f"{self.remote.url} was taken over by {who}"
            self._say(f"warning: {self._lost}: what follows is in {self.here} only")
        if not self._lost:
            self._sign()

    def _sign(self, *, ended: bool = False) -> None:
        self.remote.write(OWNER, json.dumps(self._owner | {"time": time.time(), "ended": ended}).encode())

    def _owner_there(self) -> dict[str, Any] | None:
        content = self.remote.read(OWNER)
        return None if content is None else _owner(content)

    def _steps(self) -> list[int]:
        """Lists the complete steps here, ascending."""
        folder = self.here / CHECKPOINTS
        steps = complete_steps(folder) if folder.is_dir() else []
        self._seen |= set(steps)
        return steps

    def _pending(self) -> list[int]:
        """Lists the complete steps here that aren't at the URL, newest first."""
        hashes = {step: _content(self.here / _hashes(step)) for step in reversed(self._steps())}
        return [step for step, content in hashes.items() if self._there.get(step) != content]

    def copy(self) -> None:
        """Copies what has changed to the URL, and removes there the checkpoints that were removed here.

        The order makes each moment one to go on from: no checkpoint without a config, no metrics without a
        checkpoint, no checkpoint without the metrics before it, and none of before a rollback with those after it.

        Raises OSError.
        """
        if self._lost:
            raise OSError(self._lost)
        small = self._small_files()
        steps, newest = self._pending(), max(self._steps(), default=-1)
        self._remove([step for step in self._gone() if step > newest] + [step for step in steps if step in self._there])
        self._copy_small([name for name in small if name in _FIRST])
        if steps and not self._there:
            self._copy_step(steps.pop())
        if self._there:
            self._copy_small(self._small_files() if steps else small)
        for step in steps:
            self._copy_step(step)
        self._remove(self._gone())

    def _gone(self) -> list[int]:
        """Lists the steps at the URL that training has removed here."""
        return sorted(set(self._there) & self._seen - set(self._steps()))

    def _small_files(self) -> list[str]:
        """Lists the files beside the checkpoints, except for those with a leading dot, which are unfinished."""
        names = []
        for top, folders, files in self.here.walk():
            folders[:] = [f for f in folders if not f.startswith(".") and (top, f) != (self.here, CHECKPOINTS)]
            names += [str((top / f).relative_to(self.here)) for f in files if not f.startswith(".")]
        return sorted(name for name in names if name != LOCK)

    def _copy_small(self, names: list[str]) -> None:
        def copy(name: str) -> None:
            try:
                state = _state(self.here / name)
                if self._copied.get(name) == state:
                    return
                self.remote.put(self.here / name, name)
            except FileNotFoundError:
                if (self.here / name).exists():
                    raise
                return
            self._copied[name] = state

        in_parallel(copy, names, WORKERS)

    def _copy_step(self, step: int) -> None:
        """Copies a checkpoint, its hashes last. One that is deleted meanwhile is copied whole or not at all."""
        links = self.here.with_name("leaving") / str(step)
        shutil.rmtree(links, ignore_errors=True)
        try:
            # Of links: its files stay when orbax deletes the checkpoint.
            shutil.copytree(self.here / CHECKPOINTS / str(step), links, copy_function=_link)
            hashes = _content(links / HASHES)
            if hashes is None or any(not (links / name).is_file() for name in json.loads(hashes)["files"]):
                return
        except (shutil.Error, FileNotFoundError):
            return
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(f"{self.here / _hashes(step)} is damaged: {error}") from None
        self._remove([step] if step in self._there else [], last=True)
        top, names = f"{CHECKPOINTS}/{step}", [str(f.relative_to(links)) for f in links.rglob("*") if f.is_file()]
        files = [name for name in names if name != HASHES]
        in_parallel(lambda name: self.remote.put(links / name, f"{top}/{name}"), files, WORKERS)
        self.remote.put(links / HASHES, _hashes(step))
        self._there[step] = hashes
        shutil.rmtree(links, ignore_errors=True)

    def _remove(self, steps: list[int], *, last: bool = False) -> None:
        """Removes checkpoints at the URL, their hashes first. Leaves at least one, unless `last`."""
        for step in steps if last or len(steps) < len(self._there) else ():
            self.remote.remove(_hashes(step))
            self._there.pop(step)
            self.remote.remove(f"{CHECKPOINTS}/{step}")

    # End -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Copies what is left, trying for a while, and gives the run free. Raises OSError."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        for attempt in range(_LAST_TRIES):
            try:
                self._beat()
                self.copy()
                self._sign(ended=True)
                return
            except OSError as error:
                if self._lost:
                    raise OSError(f"{self._lost}: what this process did since is in {self.here} only") from None
                if attempt + 1 == _LAST_TRIES:
                    raise OSError(
                        f"{error}; everything is in {self.here}: the same command on this machine, with --resume, "
                        "copies it from there"
                    ) from error
                time.sleep(2**attempt)


def _hashes(step: int) -> str:
    return f"{CHECKPOINTS}/{step}/{HASHES}"


def _owner_here(here: Path) -> dict[str, Any] | None:
    content = _content(here.with_name(OWNER))
    return None if content is None else _owner(content)


def _owner(content: bytes) -> dict[str, Any]:
    """Reads a sign of life; one that is damaged is of nobody, a long time ago."""
    nobody = {"session": "", "host": "?", "process": "?", "time": 0.0, "ended": False}
    with contextlib.suppress(ValueError):
        found = json.loads(content)
        if isinstance(found, dict):
            return nobody | found
    return nobody


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copy2(source, target)
