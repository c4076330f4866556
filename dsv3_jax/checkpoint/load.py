"""`load_pretrained`: loads a checkpoint into the model's variables, with each device reading only its slice."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from dsv3_jax.checkpoint import hf_config, runs
from dsv3_jax.checkpoint.hf import HFCheckpoint
from dsv3_jax.checkpoint.layout import FP8, Region, block_rows, decode_scales, full_region, tensor_box
from dsv3_jax.checkpoint.names import Leaf, TreePath
from dsv3_jax.checkpoint.remote import fetched
from dsv3_jax.checkpoint.store import MANIFEST, Store
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.model.linear import SCALES, TURNED, turn
from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.rules import RULES, Axes, rules_of
from dsv3_jax.parallel.sharding import LogicalSharding
from dsv3_jax.quantization.fp8 import BLOCK, TILE
from dsv3_jax.quantization.recipe import fp8_implementation
from dsv3_jax.runtime import Runtime

_MAKE_BLOCKS = "`python -m dsv3_jax convert HF_DIRECTORY OUT --dtype fp8` makes them"


def load_pretrained(
    path: str | Path,
    *,
    dtype: DTypeLike | Literal["fp8"] | None = None,
    runtime: Runtime | None = None,
    mesh: Mesh | None = None,
    mtp: bool = True,
    check_hashes: bool = True,
) -> tuple[DeepSeekV3, dict[str, Any]]:
    """Loads a model and its variables, `{"params": ..., "router": ...}`, from a checkpoint.

    Args:
      path: a directory in Hugging Face's layout (config.json and safetensors files, FP8 blocks included), a converted
        checkpoint (`dsv3_jax.checkpoint.convert`), or a training run, whose newest checkpoint is used; or the URL of
        one, such as gs://bucket/run, which is copied to the user's cache.
      dtype: of the parameters, float32 or bfloat16, as any dtype-like; by default the runtime's, else float32, which
        represents all stored numbers exactly, except that FP8 is rounded once. The router bias is always float32. "fp8"
        keeps matrices stored in FP8 blocks as they are, e4m3 in "params" and float32 scales in a collection "scales",
        and everything else in bfloat16. On a single Hopper GPU that multiplies in FP8, they are transposed, as its
        kernels take them, and in a collection "turned" instead of "params".
      runtime: how the model computes; by default in the dtype of its parameters. For "fp8" that is `precision="fp8"`,
        with the same kind of scales for activations as for weights; with precision `dtype`, each layer dequantises its
        weights on use.
      mtp: whether to load the multi-token prediction modules; otherwise their tensors in Hugging Face's layout are
        ignored.
      mesh: the mesh over which parameters are sharded by the runtime's rules (`fsdp_ep` if these are for one device):
        `fsdp`, `node`, `expert` and `tensor`. Axes `data` and `context` are for activations. Explicit axes, as made by
        `jax.make_mesh`, are converted to Auto axes in the mesh of the arrays. By default everything goes to one device.
      check_hashes: compare the files of a converted checkpoint or run with their hashes.

    Raises:
      FileNotFoundError, CheckpointError, ConfigError: as `HFCheckpoint` and `Store`; ConfigError also if a mesh axis
        shards nothing, or for "fp8" if no matrix is in blocks of 128 x 128.
    """
    name, path = str(path), fetched(path)
    in_blocks = isinstance(dtype, str) and dtype == "fp8"
    if in_blocks:
        runtime = _runtime_of_blocks(path) if runtime is None else runtime
        runtime = dataclasses.replace(runtime, param_dtype="bfloat16")
    elif runtime is None:
        dtype = "float32" if dtype is None else dtype
        runtime = Runtime(dtype=dtype, param_dtype=dtype)  # type: ignore[arg-type]
    elif dtype is not None:
        runtime = dataclasses.replace(runtime, param_dtype=dtype)  # type: ignore[arg-type]
    if runtime.param_dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError("the parameters' dtype is float64, which JAX has only with jax_enable_x64: set it first")
    place = functools.partial(shardings, mesh=mesh, runtime=runtime)
    turned = in_blocks and mesh is None and runtime.precision == "fp8" and fp8_implementation() == "gpu"
    options = dict(mtp=mtp, check_hashes=check_hashes, in_blocks=in_blocks, turned=turned)
    config, variables = read_variables(path, runtime, place, **options)
    return DeepSeekV3(config, runtime, name), variables


def _runtime_of_blocks(path: Path) -> Runtime:
    """Returns a runtime for FP8 on this device, with power-of-two scales if config.json says so."""
    runtime = dataclasses.replace(Runtime.for_backend(jax.default_backend()), remat="none", precision="fp8")
    if not (file := path / "config.json").exists():
        return runtime  # which reading says
    fields = hf_config.text_fields(hf_config.read_fields(file))
    return dataclasses.replace(runtime, fp8_power_of_two=hf_config.power_of_two_scales(fields))


def read_variables(
    path: Path,
    runtime: Runtime,
    place: runs.Place,
    *,
    mtp: bool = True,
    check_hashes: bool = True,
    in_blocks: bool = False,
    turned: bool = False,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads the config and variables of a checkpoint, with arrays placed by `place`; otherwise as `load_pretrained`.

    in_blocks: whether to keep matrices in FP8 blocks. turned: whether to transpose them, for Hopper's kernels.
    """
    if (path / runs.CHECKPOINTS).is_dir():
        if in_blocks:
            raise ConfigError(f"{path} is a training run, without FP8 blocks: export it first; {_MAKE_BLOCKS}")
        return runs.read_run(path, runtime, place, mtp=mtp, check_hashes=check_hashes)
    source = open_checkpoint(path, mtp=mtp, check_hashes=check_hashes)
    leaves = [leaf for leaf in source.leaves.values() if mtp or not _is_mtp(leaf.path[1])]
    config = source.config if mtp else dataclasses.replace(source.config, num_nextn_predict_layers=0)
    where = place(config, {leaf.path: leaf.shape for leaf in leaves})
    blocks = {leaf.path for leaf in leaves if in_blocks and _keeps_blocks(source, leaf)}
    if in_blocks and not blocks:
        raise ConfigError(f"{path} holds no matrix in FP8 blocks of {TILE} x {TILE}: {_MAKE_BLOCKS}")
    variables: dict[str, Any] = {}
    for leaf in leaves:
        if leaf.path in blocks:
            values, scales = _array(source, leaf, FP8, where[leaf.path]), _scales(source, leaf, where[leaf.path])
            if turned:  # one by one, so that a single one is held twice
                values, scales = _turn(values, scales, contract=_contracted(leaf))
            _put(variables, (TURNED, *leaf.path[1:]) if turned else leaf.path, values)
            _put(variables, (SCALES, *leaf.path[1:]), scales)
            continue
        target = np.dtype(np.float32 if leaf.kind.float32 else runtime.param_dtype)
        _put(variables, leaf.path, _array(source, leaf, target, where[leaf.path]))
    return config, variables


def checkpoint_config(path: Path) -> ModelConfig:
    """Returns the architecture of a checkpoint in any layout. Raises as `load_pretrained`."""
    return runs.run_config(path) if (path / runs.CHECKPOINTS).is_dir() else ModelConfig.from_hf(path)


def open_checkpoint(path: Path, *, mtp: bool = True, check_hashes: bool = True) -> HFCheckpoint | Store:
    """Opens a checkpoint of either layout.

    Files are checked when they are read or, with several processes, here: each checks a share of them.

    mtp: see `HFCheckpoint`.
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
    """Whether a part of the variables, by name, is a multi-token prediction module."""
    return name.startswith("mtp_")


def shardings(
    config: ModelConfig, shapes: runs.Shapes, *, mesh: Mesh | None, runtime: Runtime
) -> dict[TreePath, Sharding]:
    """Returns shardings of parameters: those of training, where divisible; without a mesh, a single device.

    Args:
      config: the model's.
      shapes: of the parameters, by their paths in the tree.

    Raises ConfigError if an axis of the mesh shards nothing.
    """
    if mesh is None:
        return runs.one_device(config, shapes)
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    rules = rules_of(runtime) if runtime.sharded else RULES["fsdp_ep"]
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


def _keeps_blocks(source: HFCheckpoint | Store, leaf: Leaf) -> bool:
    """Whether the FP8 blocks of a leaf are also blocks of the model's array.

    False for kv_b_proj if the keys or values of a head aren't multiples of 128 wide, since they share blocks.
    """
    if source.dtype(leaf) != FP8 or source.block != BLOCK:
        return False
    at = _blocks_of(leaf)
    return all(np.array_equal(np.repeat(i[::TILE], TILE)[: len(i)], i) for i in at)


def _blocks_of(leaf: Leaf) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row and column in the files' scale grid of each row and column of a leaf's tensors."""
    return block_rows(leaf, tensor_box(leaf, full_region(leaf.shape[leaf.stack :])), BLOCK)


_turn = jax.jit(turn, static_argnames="contract")


def _contracted(leaf: Leaf) -> int:
    """Returns the number of input axes of a leaf's matrices, which come first."""
    inputs = len(_blocks_of(leaf)[1])
    axes = leaf.shape[leaf.stack :]
    return next(n for n in range(1, len(axes)) if math.prod(axes[:n]) == inputs)


def _scales(source: HFCheckpoint | Store, leaf: Leaf, sharding: Sharding) -> jax.Array:
    """Loads the scales of a leaf, (*stack, ceil(|I| / 128), ceil(|O| / 128)), sharded like the leaf's stack."""
    rows, columns = (i[::TILE] for i in _blocks_of(leaf))
    shape = (*leaf.shape[: leaf.stack], len(columns), len(rows))
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: leaf.stack]))

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        names = np.array(leaf.names, object).reshape(shape[: leaf.stack])[index[: leaf.stack]]
        grids = [decode_scales(source.scales(name))[np.ix_(rows, columns)].T for name in np.ravel(names)]
        return np.stack(grids).reshape(*np.shape(names), *shape[leaf.stack :])

    return jax.make_array_from_callback(shape, sharding, piece)


def _put(tree: dict[str, Any], path: TreePath, value: jax.Array) -> None:
    *parents, last = path
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
