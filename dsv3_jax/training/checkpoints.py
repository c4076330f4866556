"""Checkpoints of a training run: the state and the data's position, written by orbax, whole or not at all."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.checkpoint.hashes import hash_files, seal
from dsv3_jax.checkpoint.runs import HASHES, complete_steps, step_hashes
from dsv3_jax.parallel.placement import all_processes_here
from dsv3_jax.training.step import TrainState

_ORBAX_METADATA = "_CHECKPOINT_METADATA"
"""Times and the kinds of the items: orbax writes it last, and nothing that is restored comes from it."""


class _HashedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint's temporary directory: its files are hashed before it gets its name.

    orbax calls `finalize` in one process, when all have written their files.
    """

    async def finalize(self) -> None:
        directory = Path(self.get())
        if (directory / "state").is_dir():  # its parts, state and data, come here too
            await asyncio.to_thread(_write_hashes, directory)
        await super().finalize()


def _write_hashes(directory: Path) -> None:
    files = (f for f in directory.rglob("*") if f.is_file() and f.name != _ORBAX_METADATA)
    hashes = hash_files(directory, [str(f.relative_to(directory)) for f in files])
    (directory / HASHES).write_text(json.dumps(seal({"hash": "xxh3_128", "files": hashes}), indent=1))


class Checkpoints:
    """The checkpoints under a directory: one a step, the newest few kept.

    check_hashes: whether restoring compares a checkpoint's files with the hashes that were saved with them.
    """

    def __init__(self, directory: Path, keep: int, *, check_hashes: bool = True) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            temporary_path_class=_HashedPath,
        )
        self.directory, self._check_hashes = directory.absolute(), check_hashes
        # The threads of a failed write log their tracebacks before we say in one line what they mean.
        for name in ("absl", "asyncio", "concurrent.futures"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data_state: dict[str, Any]) -> None:
        """Starts to write the state of step `state.step`; earlier ones are finished first. Raises CheckpointError."""
        step = int(state.step)
        if step == self.latest():
            return
        self._guard(lambda: _check_room(self.directory, state), step)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_with_raw_key(state)), data=ocp.args.JsonSave(data_state)
        )
        self._guard(lambda: self._manager.save(step, args=items), step)

    def wait(self) -> None:
        """Waits until everything is on disk. Raises CheckpointError."""
        self._guard(self._manager.wait_until_finished, None)

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step, by default the newest, with the shapes, dtypes and shardings of `like`.

        like: arrays or their abstract twins.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.directory} holds no complete checkpoint: start without --resume")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _with_raw_key(like))
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        try:
            with step_hashes(self.directory / str(step), check_hashes=self._check_hashes).checking():
                restored = self._manager.restore(step, args=items)
        except (CheckpointError, FileNotFoundError):
            raise
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} can't be read: {_first_line(error)}"
            ) from error
        state = restored["state"]
        return dataclasses.replace(state, rng=jax.random.wrap_key_data(state.rng)), restored["data"]

    def set_aside(self, step: int) -> Path:
        """Moves a checkpoint out of the way, beside the directory of the others, and returns where it is.

        Every process calls it, when all have come this far; one of them moves.
        """
        aside = self.directory.with_name(f"{self.directory.name}_set_aside")
        target = aside / f"{step}-{time.time_ns()}"
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(target)
        all_processes_here()
        self._manager.reload()
        return target

    def close(self) -> None:
        self._guard(self._manager.close, None)

    def _guard(self, write: Any, step: int | None) -> None:
        try:
            write()
        except Exception as error:  # orbax and tensorstore raise many kinds
            what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            complete = complete_steps(self.directory)  # the manager counts one from when its writing starts
            left = f"the newest complete one is of step {complete[-1]}" if complete else "there is no complete one yet"
            raise CheckpointError(
                f"{what} couldn't be written to {self.directory}: {_first_line(error)}; {left}"
            ) from error


def _check_room(directory: Path, state: TrainState) -> None:
    """Raises OSError if the disk can't hold the state: better before a byte is written than in the middle."""
    need = sum(x.nbytes for x in jax.tree.leaves(_with_raw_key(state)))
    free = shutil.disk_usage(directory).free
    if free < need:
        raise OSError(errno.ENOSPC, f"it takes {need / 1e6:,.1f} MB, but the disk has {free / 1e6:,.1f} MB left")


def _with_raw_key(state: TrainState) -> TrainState:
    """Typed keys have no on-disk form: their data has."""
    return dataclasses.replace(state, rng=jax.random.key_data(state.rng))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
