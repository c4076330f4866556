"""`load_pretrained`: a checkpoint straight into the model's variables, each device reading only its slice."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.checkpoint import runs
from dsv3_jax.checkpoint.hf import HFCheckpoint
from dsv3_jax.checkpoint.layout import Region
from dsv3_jax.checkpoint.names import Leaf
from dsv3_jax.checkpoint.store import MANIFEST, Store
from dsv3_jax.config import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.rules import PRESETS, parameter_axes, present


def load_pretrained(
    path: str | Path, *, dtype: str | None = None, runtime: Runtime | None = None, mesh: Mesh | None = None
) -> tuple[DeepSeekV3, dict[str, Any]]:
    """The model of a checkpoint, and its variables `{"params": ..., "router": ...}`.

    Args:
      path: a directory in Hugging Face's layout (config.json and safetensors files, FP8 blocks included), a
        converted one (`dsv3_jax.checkpoint.convert`), or that of a training run, whose newest checkpoint is taken.
      dtype: of the parameters, "float32" or "bfloat16"; by default the runtime's, else float32, which holds every
        number that a file can store, FP8 to one rounding. The router's bias is float32 always.
      runtime: how the model computes; by default in the dtype of its parameters.
      mesh: shards the parameters over its axes `expert`, `fsdp` and `tensor`; by default all go to one device.

    Raises:
      FileNotFoundError, CheckpointError, ConfigError: as `HFCheckpoint` and `Store`.
    """
    if runtime is None:
        runtime = Runtime(dtype=dtype or "float32", param_dtype=dtype or "float32")  # type: ignore[arg-type]
    elif dtype is not None:
        runtime = dataclasses.replace(runtime, param_dtype=dtype)  # type: ignore[arg-type]
    if (Path(path) / runs.CHECKPOINTS).is_dir():
        config, variables = runs.read_run(Path(path), runtime, mesh)
        return DeepSeekV3(config, runtime), variables
    source = open_checkpoint(Path(path))
    variables = {}
    for leaf in source.leaves.values():
        target = np.dtype(np.float32 if leaf.kind.float32 else runtime.param_dtype)
        _put(variables, leaf, _array(source, leaf, target, mesh))
    return DeepSeekV3(source.config, runtime), variables


def open_checkpoint(path: Path) -> HFCheckpoint | Store:
    """A checkpoint of either layout."""
    if (path / MANIFEST).exists():
        return Store(path)
    source = HFCheckpoint(path)
    source.check_copies()
    return source


def partition_spec(leaf: Leaf, mesh: Mesh) -> PartitionSpec:
    """How a leaf is cut over a mesh: as training's `fsdp_ep` cuts it, where that divides the leaf's axis."""
    rules, spec = PRESETS["fsdp_ep"], []
    for name, size in zip(parameter_axes(leaf.path, len(leaf.shape)), leaf.shape, strict=True):
        axes = present(getattr(rules, name), mesh) if name else ()
        spec.append(axes if axes and size % math.prod(mesh.shape[a] for a in axes) == 0 else None)
    return PartitionSpec(*spec)


def _array(source: HFCheckpoint | Store, leaf: Leaf, dtype: np.dtype, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(source.read(leaf, tuple(slice(0, n) for n in leaf.shape), dtype))
    read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        region: Region = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape, strict=True))
        key = tuple((s.start, s.stop) for s in region)
        if key not in read:  # devices that hold the same slice share one reading
            read[key] = source.read(leaf, region, dtype)
        return read[key]

    return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, partition_spec(leaf, mesh)), piece)


def _put(tree: dict[str, Any], leaf: Leaf, value: jax.Array) -> None:
    *parents, last = leaf.path
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
