"""Checkpoints of a training run, written atomically by orbax in parallel with training.

A checkpoint is a directory named by its step, with three items: `state` (the arrays), `data` (the position in the data)
and `run` (the state of the guards, and whether the run was well). `hashes.json` has the version of the format and the
hash of every file.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.checkpoint.hashes import hash_files
from dsv3_jax.checkpoint.runs import HASHES, RUN_ITEM, VERSION, VersionError, complete_steps, step_hashes
from dsv3_jax.integrity import seal, sync
from dsv3_jax.json_input import read_json
from dsv3_jax.parallel.placement import all_processes_here
from dsv3_jax.training.step import TrainState

_ORBAX_METADATA = "_CHECKPOINT_METADATA"
"""A file with times and kinds of items, which orbax writes last and restoring doesn't need."""


class _HashedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):  # type: ignore[misc]  # orbax has no types
    """The temporary directory of a checkpoint. Its files are hashed before it is renamed.

    orbax calls `finalize` in one process, when all have written their files.
    """

    async def finalize(self) -> None:
        directory = Path(self.get())
        if (directory / "state").is_dir():  # its parts, state and data, come here too
            await asyncio.to_thread(_write_hashes, directory)
        await super().finalize()


def _write_hashes(directory: Path) -> None:
    files = [f for f in directory.rglob("*") if f.is_file() and f.name != _ORBAX_METADATA]
    hashes = hash_files(directory, [str(f.relative_to(directory)) for f in files])
    content = {"version": VERSION, "hash": "xxh3_128", "files": hashes}
    (directory / HASHES).write_text(json.dumps(seal(content), indent=1))
    # On disk before it gets its name: else a power failure could leave a complete name with incomplete files.
    for path in (*files, directory / HASHES, *(d for d in directory.rglob("*") if d.is_dir()), directory):
        try:
            sync(path)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without it
                raise


class Restored(NamedTuple):
    """The content of a checkpoint. data: position in the data. run: see `Checkpoints.save`; may be empty."""

    state: TrainState
    data: dict[str, Any]
    run: dict[str, Any]


class Checkpoints:
    """The checkpoints under a directory, one per step.

    keep: number of newest checkpoints to keep. keep_every: also keep those whose step it divides; 0 for none. The
    newest one saved as good is always kept. check_hashes: whether restoring compares files with their hashes.
    """

    def __init__(self, directory: Path, keep: int, *, keep_every: int = 0, check_hashes: bool = True) -> None:
        self.directory, self._check_hashes = directory.absolute(), check_hashes
        policies = [checkpoint_managers.LatestN(keep), _Kept(self)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            temporary_path_class=_HashedPath,
        )
        self._drop_damaged_metadata()
        # The threads of a failed write log their tracebacks before we say in one line what they mean.
        for name in ("absl", "asyncio", "concurrent.futures"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        # Compressing takes processors that steps on a CPU compute with, and saves about a tenth of the bytes.
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),
            "data": ocp.JsonCheckpointHandler(),
            RUN_ITEM: ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        self.good = self._newest_good()

    def _drop_damaged_metadata(self) -> None:
        """Removes files of orbax that it stumbles over before anything is restored; it can do without them.

        No hash covers them, since they are written when a checkpoint is complete.
        """
        if jax.process_index() == 0 and self.directory.is_dir():
            for found in ocp.path.step.standard_name_format().find_all(self.directory):
                try:
                    _ = found.commit_timestamp
                except Exception:  # as many kinds as there are ways to be damaged
                    (Path(found.path) / _ORBAX_METADATA).unlink()
        all_processes_here()

    def latest(self) -> int | None:
        """Returns the newest complete step, or None."""
        return cast(int | None, self._manager.latest_step())

    def steps(self) -> list[int]:
        """Lists the steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self, state: TrainState, data_state: dict[str, Any], run: dict[str, Any] | None = None, *, good: bool = True
    ) -> None:
        """Starts to write the state of step `state.step`, after finishing earlier ones. Raises CheckpointError.

        run: further JSON to restore. good: whether the run was well; the newest such checkpoint isn't deleted.
        """
        step = int(state.step)
        if step == self.latest():
            return
        self._guard(lambda: _check_room(self.directory, state), step)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_with_raw_key(state)),
            data=ocp.args.JsonSave(data_state),
            **{RUN_ITEM: ocp.args.JsonSave({"good": good, **(run or {})})},
        )
        before, self.good = self.good, step if good else self.good
        try:  # what is to be deleted is chosen here, and deleted when this one is complete
            self._guard(lambda: self._manager.save(step, args=items), step)
        except CheckpointError:
            self.good = before
            raise

    def wait(self) -> None:
        """Waits until everything is on disk. Raises CheckpointError."""
        self._guard(self._manager.wait_until_finished, None)

    def restore(self, like: TrainState, step: int | None = None) -> Restored:
        """Restores the checkpoint of a step, by default the newest, with the shapes, dtypes and shardings of `like`.

        like: arrays, or `jax.ShapeDtypeStruct`s.

        Raises:
          CheckpointError: there is none, or its files have changed.
          VersionError: a later version of this program wrote it.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.directory} holds no complete checkpoint: start without --resume")
        directory = self.directory / str(step)
        item = _abstract(like)
        restore = ocp.args.PyTreeRestore(item, ocp.checkpoint_utils.construct_restore_args(item))
        items = {"state": restore, "data": ocp.args.JsonRestore()}
        if (directory / RUN_ITEM).exists():
            items[RUN_ITEM] = ocp.args.JsonRestore()
        try:
            with step_hashes(directory, check_hashes=self._check_hashes).checking():
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except FileNotFoundError as error:
            raise CheckpointError(str(error)) from None
        except CheckpointError:
            raise
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise CheckpointError(f"checkpoint {directory} can't be read: {_first_line(error)}") from error
        state = restored["state"]
        state = dataclasses.replace(state, rng=jax.random.wrap_key_data(state.rng))
        return Restored(state, restored["data"], dict(restored.get(RUN_ITEM) or {}))

    def restore_newest(
        self, like: TrainState, wrong: Callable[[TrainState], str] = lambda _: ""
    ) -> tuple[Restored, dict[int, str]]:
        """Restores the newest valid checkpoint. Also returns, by step, why each newer one isn't valid.

        wrong: returns what is wrong with a restored state, if anything.

        Raises CheckpointError if no checkpoint is valid, and VersionError as `restore`.
        """
        passed_over: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self.restore(like, step)
                why = wrong(restored.state)
            except VersionError:
                raise
            except CheckpointError as error:
                why = str(error)
            if not why:
                return restored, passed_over
            passed_over[step] = why
        reasons = "; ".join(f"step {step}: {why}" for step, why in passed_over.items())
        raise CheckpointError(
            f"{self.directory} has no checkpoint that is whole and finite ({reasons or 'none at all'})"
        )

    def _newest_good(self) -> int | None:
        return max((step for step in self.steps() if self._saved_as_good(step)), default=None)

    def _saved_as_good(self, step: int) -> bool:
        """Whether a checkpoint was saved as good. Earlier versions didn't record it."""
        try:
            run = read_json(self.directory / str(step) / RUN_ITEM / "metadata", CheckpointError)
        except FileNotFoundError:
            return True
        except (OSError, CheckpointError):
            return False  # damaged
        return bool(run.get("good"))

    def set_aside(self, step: int) -> Path:
        """Moves a checkpoint to a directory beside the others, and returns its new path.

        All processes must call it together; one of them moves the files.
        """
        aside = self.directory.with_name(f"{self.directory.name}_set_aside")
        target = aside / f"{step}-{time.time_ns()}"
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(target)
        all_processes_here()
        self._manager.reload()
        if step == self.good:  # else the one that is the newest good now would be deleted in time
            self.good = self._newest_good()
        return target

    def pass_over(self, why: dict[int, str], say: Callable[[str], None]) -> None:
        """Sets aside the checkpoints that `restore_newest` found not to be valid, and says of each why."""
        for step, reason in why.items():
            aside = self.set_aside(step)
            say(f"the checkpoint of step {step} is passed over and now {aside}: {reason}")

    def close(self) -> None:
        """Waits until everything is on disk, and stops the threads. Raises CheckpointError."""
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


class _Kept:
    """An orbax policy that preserves the newest good checkpoint."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [info.step == self._checkpoints.good for info in checkpoints]


def _check_room(directory: Path, state: TrainState) -> None:
    """Raises OSError if the disk has no room for the state, before anything is written."""
    need = sum(x.nbytes for x in jax.tree.leaves(_with_raw_key(state)))
    free = shutil.disk_usage(directory).free
    if free < need:
        raise OSError(errno.ENOSPC, f"it takes {need / 1e6:,.1f} MB, but the disk has {free / 1e6:,.1f} MB left")


def _with_raw_key(state: TrainState) -> TrainState:
    """Replaces typed keys, which can't be saved, by their data."""
    return dataclasses.replace(state, rng=jax.random.key_data(state.rng))


def _abstract(state: TrainState) -> TrainState:
    """Returns the shapes, dtypes and shardings of a state as stored on disk."""
    key = jax.eval_shape(jax.random.key_data, state.rng)
    rng: Any = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=state.rng.sharding)
    abstract: TrainState = jax.tree.map(ocp.utils.to_shape_dtype_struct, dataclasses.replace(state, rng=rng))
    return abstract


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
