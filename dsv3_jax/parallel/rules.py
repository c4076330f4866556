"""What is cut over which mesh axes: logical names on every array, written once, and the presets that map them.

A model never names a mesh axis. It names what an axis of an array is ("batch", "heads", ...), and the rules that
`Runtime.sharding` chooses say which mesh axes cut that. The mesh itself is the one of `jax.set_mesh`; without one,
or where the axes in question have size 1, nothing here does anything.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ConfigError, Runtime
from dsv3_jax.parallel.mesh import AXES

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """For each logical axis, the mesh axes that cut it, outermost first."""

    batch: Axes = ()
    sequence: Axes = ()
    layers: Axes = ()
    """The stacked layers of one kind."""
    vocab: Axes = ()
    embed: Axes = ()
    """The model's width, or the rank projected up from, in parameters, which are put together just before use."""
    heads: Axes = ()
    ffn: Axes = ()
    """Hidden width of dense feed-forwards and shared experts."""
    experts: Axes = ()
    expert_ffn: Axes = ()
    zero: Axes = ()
    """Cuts `embed` of the optimizer's state and master weights further than that of the weights in use (ZeRO-1)."""


_TENSOR: dict[str, Axes] = {"vocab": ("tensor",), "heads": ("tensor",), "ffn": ("tensor",), "expert_ffn": ("tensor",)}
_EXPERTS: Axes = ("node", "expert")

PRESETS = {
    "single": Rules(),
    "fsdp": Rules(batch=("data", "fsdp"), sequence=("context",), embed=("fsdp",), **_TENSOR),
    "fsdp_ep": Rules(
        batch=("data", "fsdp", *_EXPERTS), sequence=("context",), embed=("fsdp",), experts=_EXPERTS, **_TENSOR
    ),
    "ep_tp": Rules(batch=("data",), experts=_EXPERTS, **_TENSOR),
    "pp_ep_dp": Rules(
        batch=("data", "fsdp", *_EXPERTS),
        sequence=("context",),
        layers=("stage",),
        experts=_EXPERTS,
        zero=("stage", "data", "fsdp"),
        **_TENSOR,
    ),
}
"""`fsdp_ep` trains; `ep_tp` decodes, its tokens not cut over the experts; `pp_ep_dp` is the report's own (3.2)."""

PARAMETERS: dict[tuple[str, int], tuple[str | None, ...]] = {
    ("embed_tokens", 2): ("vocab", "embed"),
    ("lm_head", 2): ("embed", "vocab"),
    ("q_proj", 3): ("embed", "heads", None),
    ("q_a_proj", 2): ("embed", None),
    ("q_b_proj", 3): ("embed", "heads", None),
    ("kv_a_proj_with_mqa", 2): ("embed", None),
    ("k_b_proj", 3): ("embed", "heads", None),
    ("v_b_proj", 3): ("embed", "heads", None),
    ("o_proj", 3): ("heads", None, "embed"),
    ("weight", 2): ("embed", None),  # the router's
    ("gate_proj", 2): ("embed", "ffn"),
    ("up_proj", 2): ("embed", "ffn"),
    ("down_proj", 2): ("ffn", "embed"),
    ("gate_proj", 3): ("experts", "embed", "expert_ffn"),
    ("up_proj", 3): ("experts", "embed", "expert_ffn"),
    ("down_proj", 3): ("experts", "expert_ffn", "embed"),
    ("eh_proj", 2): (None, "embed"),
    ("e_score_correction_bias", 1): (None,),
    ("slot_of", 2): (None, None),
    ("copies", 1): (None,),
} | {
    (f"{of}norm", 1): (None,) for of in ("", "e", "h", "input_layer", "post_attention_layer", "q_a_layer", "kv_a_layer")
}
"""Logical axes of each parameter, by its name and number of axes; stacked ones have `layers` before them."""

STACKS = ("dense_layers", "moe_layers")


@functools.cache
def rules_of(runtime: Runtime) -> Rules:
    """The runtime's preset with its overrides. Raises ConfigError for an override that isn't `axis=mesh,axes`."""
    rules = PRESETS[runtime.sharding]
    names = [f.name for f in dataclasses.fields(Rules)]
    for text in runtime.sharding_overrides:
        name, equals, axes = text.partition("=")
        cut = tuple(filter(None, axes.split(",")))
        if not equals or name not in names or not set(cut) <= set(AXES):
            raise ConfigError(
                f"runtime.sharding_overrides has {text!r}: it must be NAME=MESH,AXES with a name of "
                f"{', '.join(names)} and mesh axes of {', '.join(AXES)}"
            )
        rules = dataclasses.replace(rules, **{name: cut})
    return rules


def larger(axes: Axes, mesh: Mesh | AbstractMesh) -> Axes:
    """Those of `axes` that the mesh has more than one device along."""
    return tuple(a for a in axes if mesh.shape.get(a, 1) > 1)


def present(axes: Axes, mesh: Mesh | AbstractMesh) -> Axes:
    """Those of `axes` that cut something here: larger than 1, and not already in the hands of a shard_map."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(a for a in larger(axes, mesh) if types[a] != AxisType.Manual)


def partition_spec(
    what: str, shape: tuple[int, ...], logical: tuple[str | None, ...], rules: Rules, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """How an array is cut.

    Args:
      what: the array's name, for errors.
      logical: a field of `Rules`, or None, for each axis of `shape`.

    Raises:
      ConfigError: two of its axes are cut by the same mesh axis, or a size doesn't divide.
    """
    used: dict[str, str] = {}
    spec: list[Axes | None] = []
    for name, size in zip(logical, shape, strict=True):
        axes = present(getattr(rules, name), mesh) if name else ()
        for axis in axes:
            if axis in used:
                raise ConfigError(
                    f"{what} {shape}: the rules cut {used[axis]!r} and {name!r} both over mesh axis {axis!r}"
                )
            used[axis] = str(name)
        parts = math.prod(mesh.shape[a] for a in axes)
        if size % parts:
            raise ConfigError(
                f"{what} {shape}: its {name!r} of {size} doesn't divide over {' x '.join(axes)} = {parts} devices"
            )
        spec.append(axes or None)
    return PartitionSpec(*spec)


def parameter_axes(path: tuple[Any, ...], rank: int) -> tuple[str | None, ...]:
    """Logical axes of the parameter at a path of a pytree: of a parameter's own, its gradient's, a moment's."""
    keys = [str(getattr(p, "key", p)) for p in path]
    stacked = any(k in STACKS for k in keys)
    axes = PARAMETERS[keys[-1], rank - stacked]
    return ("layers", *axes) if stacked else axes


def state_shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Where each array of a train state, or of the model's variables, lives: a NamedSharding for each leaf.

    Args:
      tree: arrays or their abstract twins. Leaves that aren't a parameter's (counters, keys) are on every device.

    Raises ConfigError, naming the parameter, if the rules don't suit its shape.
    """
    stored = dataclasses.replace(rules, embed=rules.embed + rules.zero, layers=())

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if leaf.ndim == 0 or getattr(path[-1], "key", None) is None:
            return NamedSharding(mesh, PartitionSpec())
        what = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(what, leaf.shape, parameter_axes(path, leaf.ndim), stored, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def constrain(x: jax.Array, runtime: Runtime, *logical: str | None) -> jax.Array:
    """States how an activation is cut; the identity without a mesh. Differentiable."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or runtime.sharding == "single":
        return x
    spec = partition_spec("an activation", x.shape, logical, rules_of(runtime), mesh)
    return jax.lax.with_sharding_constraint(x, spec)


def in_use(w: jax.Array, runtime: Runtime, name: str) -> jax.Array:
    """A parameter as a layer uses it: put together along `embed` (FSDP), and its gradient cut up again."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or runtime.sharding == "single":
        return w
    rules, logical = rules_of(runtime), PARAMETERS[name, w.ndim]
    stored = dataclasses.replace(rules, embed=rules.embed + rules.zero)
    spec = lambda r: partition_spec(name, w.shape, logical, r, mesh)
    return _in_use(w, spec(dataclasses.replace(rules, embed=())), spec(stored))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _in_use(w: jax.Array, used: PartitionSpec, stored: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(w, used)


def _gradient_stored(used: PartitionSpec, stored: PartitionSpec, _: None, g: jax.Array) -> tuple[jax.Array]:
    # Named as used first: else the partitioner would rather cut the activations anew than add up and scatter this.
    g = jax.lax.with_sharding_constraint(g, used)
    return (jax.lax.with_sharding_constraint(g, stored),)


_in_use.defvjp(lambda w, used, stored: (_in_use(w, used, stored), None), _gradient_stored)
