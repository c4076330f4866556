"""A training run as a checkpoint: its model, and the variables of its newest complete step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding

from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.checkpoint.hashes import FileHashes, Unchecked, file_hashes
from dsv3_jax.checkpoint.names import TreePath
from dsv3_jax.config import ConfigError, ModelConfig, build_dataclass
from dsv3_jax.integrity import SEAL, unseal
from dsv3_jax.json_input import read_json
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.runtime import Runtime

CHECKPOINTS = "checkpoints"
"""The folder in a run's directory with one checkpoint per step."""

HASHES = "hashes.json"
"""The file of a step with the hashes of its other files."""

RUN_ITEM = "run"
"""The folder of a step with the state of the trainer's guards."""

VERSION = 2
"""Version of a step's format. Version 1 lacks `run` and the version number, version 0 also hashes.json."""


class VersionError(CheckpointError):
    """A checkpoint in the format of a later version of this program."""


Shapes = Mapping[TreePath, tuple[int, ...]]


Place = Callable[[ModelConfig, Shapes], Mapping[TreePath, Sharding]]
"""Maps a config and the shapes of variables, by path, to shardings. Each device reads its part."""


def one_device(config: ModelConfig, shapes: Shapes) -> dict[TreePath, Sharding]:
    """Places all variables on the first device."""
    return dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))


def read_config(file: Path) -> dict[str, Any]:
    """Reads the config of a run as JSON. Raises ConfigError, or FileNotFoundError."""
    fields = read_json(file, ConfigError)
    return unseal(fields, file, ConfigError) if SEAL in fields else fields  # those of earlier versions have none


def step_hashes(step: Path, *, check_hashes: bool = True) -> FileHashes:
    """Reads the hashes of a checkpoint. step: its directory. Raises VersionError, CheckpointError."""
    file = step / HASHES
    if not file.exists():
        if (step / RUN_ITEM).exists():
            raise CheckpointError(f"{file} is missing: the checkpoint is incomplete")
        return Unchecked(step, f"it has no {HASHES}, as those of earlier versions")
    fields = read_json(file, CheckpointError)
    if isinstance(version := fields.get("version"), int) and version > VERSION:
        raise VersionError(
            f"checkpoint {step} is of format {version}, this version of dsv3_jax reads formats up to {VERSION}: "
            "take the version that wrote it, or a later one"
        )
    if not check_hashes:
        return Unchecked(step, "asked for")
    return file_hashes(step, unseal(fields, file, CheckpointError), HASHES)


def complete_steps(checkpoints: Path) -> list[int]:
    """Lists the steps of the complete checkpoints in a run's folder, ascending."""
    return sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isascii() and p.name.isdecimal())


def run_config(directory: Path) -> ModelConfig:
    """Returns the architecture of a run's model. Raises CheckpointError."""
    file = directory / "config.json"
    try:
        config: ModelConfig = build_dataclass(ModelConfig, read_config(file).get("model"), str(file), "model.")
    except (OSError, ConfigError) as error:
        raise CheckpointError(f"{directory} holds no training run that can be read: {error}") from None
    return config


def read_run(
    directory: Path, runtime: Runtime, place: Place = one_device, *, mtp: bool = True, check_hashes: bool = True
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads the config of a run's model and its variables, in the runtime's `param_dtype`, without the optimizer state.

    mtp: whether to load the multi-token prediction modules.

    Raises CheckpointError if the run has no complete checkpoint, or its files can't be read.
    """
    config = run_config(directory)
    if not mtp:
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    model = DeepSeekV3(config, Runtime(param_dtype=runtime.param_dtype))
    abstract = dict(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))

    def keys(path: Any) -> tuple[str, ...]:
        return tuple(part.key for part in path)

    where = place(config, {keys(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(abstract)})
    item = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[keys(path)]), abstract
    )
    return config, read_newest(directory, item, check_hashes=check_hashes)


def read_newest(directory: Path, item: dict[str, Any], *, check_hashes: bool = True) -> dict[str, Any]:
    """Loads parts of the state in a run's newest complete checkpoint.

    item: abstract arrays with shardings, by field of `TrainState`: "params", "opt_state", ...

    Raises CheckpointError if the run has no complete checkpoint, its files can't be read, or an array is missing.
    """
    folder = directory.absolute() / CHECKPOINTS
    steps = complete_steps(folder) if folder.is_dir() else []
    if not steps:
        raise CheckpointError(f"{directory} is a training run without a complete checkpoint: let it reach one")
    step = folder / str(steps[-1])
    path = step / "state"
    restore = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    try:
        with (
            step_hashes(step, check_hashes=check_hashes).checking(),
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
        ):
            restored: dict[str, Any] = checkpointer.restore(path, args=restore)
            return restored
    except (CheckpointError, FileNotFoundError):
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise CheckpointError(f"{path} can't be read: {str(error).strip()[:300] or type(error).__name__}") from error
