"""The directory of a training run as a checkpoint: its model, and the variables of its newest complete step."""

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
"""The folder of a run that holds one checkpoint a step."""

HASHES = "hashes.json"
"""The file of a step with the hashes of its other files."""

RUN_ITEM = "run"
"""The folder of a step with what the trainer's guards know."""

VERSION = 2
"""Version of the format of a step's directory. 1: without `run` and its own number. 0: without hashes.json too."""


class VersionError(CheckpointError):
    """A checkpoint in a format that a later version of this program wrote."""


Shapes = Mapping[TreePath, tuple[int, ...]]


Place = Callable[[ModelConfig, Shapes], Mapping[TreePath, Sharding]]
"""From a config and the variables' shapes, by path, to where they go; each device reads its part."""


def one_device(config: ModelConfig, shapes: Shapes) -> dict[TreePath, Sharding]:
    """Places all variables on the first device."""
    return dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))


def read_config(file: Path) -> dict[str, Any]:
    """The config of a run as JSON. Raises ConfigError, or FileNotFoundError."""
    fields = read_json(file, ConfigError)
    return unseal(fields, file, ConfigError) if SEAL in fields else fields  # those of earlier versions have none


def step_hashes(step: Path, *, check_hashes: bool = True) -> FileHashes:
    """Hashes that the files of a checkpoint must have. step: its directory. Raises VersionError, CheckpointError."""
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
    """Steps of the checkpoints in a run's folder, ascending: one that isn't complete has another name."""
    return sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isascii() and p.name.isdecimal())


def run_config(directory: Path) -> ModelConfig:
    """The architecture of the model that a run trains. Raises CheckpointError."""
    file = directory / "config.json"
    try:
        config: ModelConfig = build_dataclass(ModelConfig, read_config(file).get("model"), str(file), "model.")
    except (OSError, ConfigError) as error:
        raise CheckpointError(f"{directory} holds no training run that can be read: {error}") from None
    return config


def read_run(
    directory: Path, runtime: Runtime, place: Place = one_device, *, mtp: bool = True, check_hashes: bool = True
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config of the run's model and its variables, in the runtime's `param_dtype`; not the optimizer's state.

    mtp: with the modules of multi-token prediction.

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
    """Parts of the state of a run's newest complete checkpoint.

    item: abstract arrays with their shardings, below the names of `TrainState`'s fields: "params", "opt_state", ...

    Raises CheckpointError if the run has no complete checkpoint, its files can't be read, or it holds no such arrays.
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
