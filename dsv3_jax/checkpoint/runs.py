"""The directory of a training run as a checkpoint: its model, and the variables of its newest complete step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.config import ModelConfig, Runtime, build_dataclass
from dsv3_jax.model.transformer import DeepSeekV3

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds one checkpoint a step."""


def read_run(directory: Path, runtime: Runtime, mesh: Mesh | None) -> tuple[ModelConfig, dict[str, Any]]:
    """The config of the run's model and its variables, in the runtime's `param_dtype`; not the optimizer's state.

    With a mesh every device holds all of them.

    Raises CheckpointError if the run has no complete checkpoint, or its files can't be read.
    """
    try:
        config = build_dataclass(ModelConfig, json.loads((directory / "config.json").read_text())["model"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{directory}/config.json is not the config of a training run: {error!r}") from None
    steps = sorted(int(p.name) for p in (directory / CHECKPOINTS).iterdir() if p.name.isdigit())
    if not steps:
        raise CheckpointError(f"{directory} is a training run without a complete checkpoint: let it reach one")
    model = DeepSeekV3(config, Runtime(param_dtype=runtime.param_dtype))
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    place = NamedSharding(mesh, PartitionSpec()) if mesh is not None else SingleDeviceSharding(jax.devices()[0])
    item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), dict(abstract))
    path = directory.absolute() / CHECKPOINTS / str(steps[-1]) / "state"
    restore = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return config, checkpointer.restore(path, args=restore)
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise CheckpointError(f"{path} can't be read: {str(error).splitlines()[0][:300]}") from error
