"""`load_pretrained`: a checkpoint straight into the model's variables, each device reading only its slice."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from dsv3_jax.checkpoint import runs
from dsv3_jax.checkpoint.hf import HFCheckpoint
from dsv3_jax.checkpoint.layout import Region
from dsv3_jax.checkpoint.names import Leaf, TreePath
from dsv3_jax.checkpoint.store import MANIFEST, Store
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.rules import RULES, Axes, rules_of
from dsv3_jax.parallel.sharding import LogicalSharding
from dsv3_jax.runtime import Runtime


def load_pretrained(
    path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    runtime: Runtime | None = None,
    mesh: Mesh | None = None,
    mtp: bool = True,
    check_hashes: bool = True,
) -> tuple[DeepSeekV3, dict[str, Any]]:
    """The model of a checkpoint, and its variables `{"params": ..., "router": ...}`.

    Args:
      path: a directory in Hugging Face's layout (config.json and safetensors files, FP8 blocks included), a
        converted one (`dsv3_jax.checkpoint.convert`), or that of a training run, whose newest checkpoint is taken.
      dtype: of the parameters, float32 or bfloat16, as any dtype-like; by default the runtime's, else float32, which
        holds every number that a file can store, FP8 to one rounding. The router's bias is float32 always.
      runtime: how the model computes; by default in the dtype of its parameters.
      mtp: with the modules of multi-token prediction; without them, in a directory of Hugging Face's layout nothing of
        theirs is looked at.
      mesh: shards the parameters over its axes as the runtime's rules say (`fsdp_ep` where these are for one device):
        `fsdp`, `node`, `expert` and `tensor`. Axes `data` and `context` are there for activations. A mesh of
        `jax.make_mesh`, whose axes are Explicit, is taken as one of Auto axes, which the arrays then lie on. By default
        all go to one device.
      check_hashes: compares the files of a converted checkpoint or a run with the hashes that were written with them.

    Raises:
      FileNotFoundError, CheckpointError, ConfigError: as `HFCheckpoint` and `Store`; ConfigError also for a mesh axis
        that cuts nothing.
    """
    if runtime is None:
        dtype = "float32" if dtype is None else dtype
        runtime = Runtime(dtype=dtype, param_dtype=dtype)  # type: ignore[arg-type]
    elif dtype is not None:
        runtime = dataclasses.replace(runtime, param_dtype=dtype)  # type: ignore[arg-type]
    if runtime.param_dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError("the parameters' dtype is float64, which JAX has only with jax_enable_x64: set it first")
    place = functools.partial(shardings, mesh=mesh, runtime=runtime)
    config, variables = read_variables(Path(path), runtime, place, mtp=mtp, check_hashes=check_hashes)
    return DeepSeekV3(config, runtime, str(path)), variables


def read_variables(
    path: Path, runtime: Runtime, place: runs.Place, *, mtp: bool = True, check_hashes: bool = True
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the variables of a checkpoint, each array where `place` says; all else as `load_pretrained`."""
    if (path / runs.CHECKPOINTS).is_dir():
        return runs.read_run(path, runtime, place, mtp=mtp, check_hashes=check_hashes)
    source = open_checkpoint(path, mtp=mtp, check_hashes=check_hashes)
    leaves = [leaf for leaf in source.leaves.values() if mtp or not _is_mtp(leaf.path[1])]
    config = source.config if mtp else dataclasses.replace(source.config, num_nextn_predict_layers=0)
    where = place(config, {leaf.path: leaf.shape for leaf in leaves})
    variables: dict[str, Any] = {}
    for leaf in leaves:
        target = np.dtype(np.float32 if leaf.kind.float32 else runtime.param_dtype)
        _put(variables, leaf, _array(source, leaf, target, where[leaf.path]))
    return config, variables


def checkpoint_config(path: Path) -> ModelConfig:
    """The architecture of a checkpoint of any layout that `load_pretrained` reads; raises as that does."""
    return runs.run_config(path) if (path / runs.CHECKPOINTS).is_dir() else ModelConfig.from_hf(path)


def open_checkpoint(path: Path, *, mtp: bool = True, check_hashes: bool = True) -> HFCheckpoint | Store:
    """A checkpoint of either layout. Its files are checked as they are read; by several processes here, shared out.

    mtp: as in `HFCheckpoint`.
    """
    if (path / MANIFEST).exists():
        store = Store(path, check_hashes=check_hashes)
        if jax.process_count() > 1:
            store.hashes.check_together()
        return store
    source = HFCheckpoint(path, mtp=mtp)
    source.check_copies()
    return source


def _is_mtp(name: str) -> bool:
    """Whether a part of the variables, by its name below the collection, is a module of multi-token prediction."""
    return name.startswith("mtp_")


def shardings(
    config: ModelConfig, shapes: runs.Shapes, *, mesh: Mesh | None, runtime: Runtime
) -> dict[TreePath, Sharding]:
    """Where parameters go: as training cuts them, where that divides an array's axis; without a mesh, to one device.

    Args:
      config: the model's.
      shapes: of the parameters, by their paths in the tree.

    Raises ConfigError for an axis of the mesh that cuts nothing.
    """
    if mesh is None:
        return runs.one_device(config, shapes)
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    rules = RULES["fsdp_ep"] if runtime.sharding == "single" else rules_of(runtime)
    stored, logical = LogicalSharding(rules, mesh).stored(), parameter_axes(DeepSeekV3(config))

    def cut(path: TreePath, shape: tuple[int, ...]) -> list[Axes | None]:
        named = zip(logical.get(path[1:], (None,) * len(shape)), shape, strict=True)
        return [(name and size % stored.size(name) == 0 and stored.axes(name)) or None for name, size in named]

    cuts = {path: cut(path, shape) for path, shape in shapes.items()}
    rule = {f.name: getattr(stored.rules, f.name) for f in dataclasses.fields(stored.rules)}
    of_activations = {a for name in ("batch", "sequence") for a in rule.pop(name)}
    of_parameters = {a for axes in rule.values() for a in axes}
    used = {a for c in cuts.values() for axes in c for a in axes or ()} | of_activations - of_parameters
    for axis in (a for a in mesh.axis_names if mesh.shape[a] > 1):
        if axis not in used:
            known = ", ".join(a for a in AXES if a in of_activations | of_parameters)
            why = "its size divides no array" if axis in of_parameters else f"the axes that do are {known}"
            raise ConfigError(f"mesh axis {axis!r} of {mesh.shape[axis]} devices cuts nothing: {why}")
    return {path: NamedSharding(mesh, PartitionSpec(*c)) for path, c in cuts.items()}


def _array(source: HFCheckpoint | Store, leaf: Leaf, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    if isinstance(sharding, SingleDeviceSharding):
        whole = source.read(leaf, tuple(slice(0, n) for n in leaf.shape), dtype)
        return cast(jax.Array, jax.device_put(whole, sharding))
    read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        region: Region = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape, strict=True))
        key = tuple((s.start, s.stop) for s in region)
        if key not in read:  # devices that hold the same slice share one reading
            read[key] = source.read(leaf, region, dtype)
        return read[key]

    return jax.make_array_from_callback(leaf.shape, sharding, piece)


def _put(tree: dict[str, Any], leaf: Leaf, value: jax.Array) -> None:
    *parents, last = leaf.path
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
