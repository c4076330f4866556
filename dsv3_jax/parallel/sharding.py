"""Sharding while tracing: the runtime's rules on the current mesh, looked up in one place.

A model never names mesh axes. It names the logical axes of an array ("batch", "heads", ...), and the rules chosen by
`Runtime.sharding` map these to mesh axes. The mesh is that of `jax.set_mesh`; without one, or if the mesh axes have
size 1, nothing here changes the program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.rules import LOGICAL, Axes, Rules, rules_of
from dsv3_jax.runtime import Runtime

Logical = tuple[str | None, ...]
"""A field of `Rules`, or None, for each axis of an array."""


@dataclasses.dataclass(frozen=True)
class LogicalSharding:
    """Rules on a mesh; without a mesh, everything is on one device."""

    rules: Rules
    mesh: Mesh | AbstractMesh | None

    @property
    def manual(self) -> bool:
        """Whether the trace is inside a `shard_map` over all that cuts arrays, which are one device's part already."""
        return self.mesh is not None and AxisType.Manual in self.mesh.axis_types and not self.automatic

    @property
    def automatic(self) -> Axes:
        """Mesh axes of more than one device that no `shard_map` holds, over which XLA cuts arrays."""
        if self.mesh is None:
            return ()
        types = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return tuple(a for a, of in types if of != AxisType.Manual and self.axis_size(a) > 1)

    def all_but(self, automatic: Iterable[str]) -> frozenset[str]:
        """The mesh's axes without these: for a `shard_map` that leaves them to XLA."""
        return frozenset(() if self.mesh is None else self.mesh.axis_names) - frozenset(automatic)

    def axes_left(self, logical: str) -> Axes:
        """Those of `axes` that no `shard_map` holds: over which an array at hand is cut further."""
        return tuple(a for a in self.axes(logical) if a in self.automatic)

    def size_left(self, logical: str) -> int:
        """Parts that an array at hand is cut into along a logical axis."""
        return math.prod(map(self.axis_size, self.axes_left(logical)))

    def axes(self, logical: str) -> Axes:
        """Returns the mesh axes of more than one device that shard a logical axis, outermost first."""
        _check_names((logical,))
        return tuple(a for a in getattr(self.rules, logical) if self.axis_size(a) > 1)

    def size(self, logical: str) -> int:
        """Returns the number of parts that a logical axis is sharded into."""
        return math.prod(map(self.axis_size, self.axes(logical)))

    def axis_size(self, mesh_axis: str) -> int:
        """Returns the number of devices along a mesh axis, 1 if there is no such axis."""
        return 1 if self.mesh is None else self.mesh.shape.get(mesh_axis, 1)

    def spec(self, what: str, shape: tuple[int, ...], logical: Logical) -> PartitionSpec:
        """Returns the PartitionSpec of an array, by mesh axes that aren't manual in a `shard_map`.

        Args:
          what: the name of the array for error messages.
          logical: one name or None for each axis of `shape`.

        Raises:
          ConfigError: a mesh axis shards two of its axes, or a size isn't divisible.
          ValueError: `logical` and `shape` have different lengths, or a name isn't a logical axis.
        """
        _check_names(logical)
        used: dict[str, str] = {}
        spec: list[Axes | None] = []
        for name, size in zip(logical, shape, strict=True):
            axes = self.axes_left(name) if name else ()
            for axis in axes:
                if axis in used:
                    raise ConfigError(
                        f"{what} {shape}: the rules cut {used[axis]!r} and {name!r} both over mesh axis {axis!r}"
                    )
                used[axis] = str(name)
            parts = math.prod(map(self.axis_size, axes))
            if size % parts:
                raise ConfigError(
                    f"{what} {shape}: its {name!r} of {size} doesn't divide over {' x '.join(axes)} = {parts} devices"
                )
            spec.append(axes or None)
        return PartitionSpec(*spec)

    def constrain(self, x: jax.Array, *logical: str | None) -> jax.Array:
        """Constrains the sharding of an activation; the identity without a mesh. Differentiable."""
        spec = self.spec("an activation", x.shape, logical)
        return x if self.mesh is None or self.manual else jax.lax.with_sharding_constraint(x, spec)

    @jax.named_scope("all_gather_weight")
    def all_gather_weight(self, w: jax.Array, what: str, logical: Logical, use: WeightUse) -> jax.Array:
        """Prepares a stored parameter for a layer: rounds it to `use.dtype` and all-gathers it along `embed` (FSDP).

        The dtype of the result is the wider of that and of `w`, so that the gradient isn't rounded before it is
        reduce-scattered over devices in `use.gradient_dtype`.
        """
        if self.mesh is None:
            return _all_gather(w, None, use)
        stored, used, by_hand = self.stored(), self.used(), self.gathered_by_hand(logical)
        whole = list(w.shape)
        for i, axes in by_hand:
            whole[i] *= math.prod(map(self.axis_size, axes))
        if not self.automatic:
            return _all_gather(w, _Cuts(None, None, by_hand), use)
        specs = [sharding.spec(what, tuple(whole), logical) for sharding in (used, stored)]
        return _all_gather(w, _Cuts(specs[0], specs[1], by_hand), use)

    def gathered_by_hand(self, logical: Logical) -> tuple[tuple[int, Axes], ...]:
        """Where a weight is gathered for use over mesh axes that a `shard_map` holds: its axes, each with those."""
        stored, used = self.stored(), self.used()
        apart = (tuple(a for a in stored.axes(n) if a not in used.axes(n)) if n else () for n in logical)
        held = (tuple(a for a in axes if a not in self.automatic) for axes in apart)
        return tuple((i, axes) for i, axes in enumerate(held) if axes)

    def part(self, shape: tuple[int, ...], logical: Logical) -> tuple[int, ...]:
        """The shape of a stored parameter as it is at hand: inside a `shard_map`, that of a device's part."""
        stored = self.stored()
        held = (stored.size(name) // stored.size_left(name) if name else 1 for name in logical)
        return tuple(n // parts for n, parts in zip(shape, held, strict=True))

    def used(self) -> LogicalSharding:
        """Returns the sharding of weights as layers use them, all-gathered along `embed`."""
        return self._replace(embed=())

    def stored(self) -> LogicalSharding:
        """The sharding of master weights and optimizer state: also over `zero` (ZeRO-1), but not over stages."""
        return self._replace(embed=self.rules.embed + self.rules.zero, layers=())

    def _replace(self, **rules: Axes) -> LogicalSharding:
        return dataclasses.replace(self, rules=dataclasses.replace(self.rules, **rules))


def current_sharding(runtime: Runtime) -> LogicalSharding:
    """Returns the runtime's rules on the current mesh."""
    return LogicalSharding(rules_of(runtime), current_mesh() if runtime.sharded else None)


def current_mesh() -> AbstractMesh | None:
    """Returns the mesh of the innermost `jax.set_mesh` or `jax.shard_map`, or None if there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def constrain(x: jax.Array, runtime: Runtime, *logical: str | None) -> jax.Array:
    """Constrains the sharding of an activation on the current mesh; the identity without one. Differentiable."""
    return current_sharding(runtime).constrain(x, *logical)


def only(spec: PartitionSpec, axes: frozenset[str]) -> PartitionSpec:
    """How an array is cut by these mesh axes alone, of those that `LogicalSharding.spec` gave."""
    return PartitionSpec(*(tuple(a for a in mesh_axes(cut) if a in axes) or None for cut in spec))


def mesh_axes(entry: str | tuple[str, ...] | None) -> Axes:
    """The mesh axes of an entry of a PartitionSpec, which leaves the tuple out where there is one."""
    return (entry,) if isinstance(entry, str) else entry or ()


def state_shardings(tree: Any, mesh: Mesh, rules: Rules, axes: Mapping[tuple[str, ...], Logical]) -> Any:
    """Returns a NamedSharding for each array of a train state or of the model's variables.

    Args:
      tree: arrays, or `jax.ShapeDtypeStruct`s. Leaves other than parameters, gradients and moments (counters, keys,
        router biases) are replicated.
      axes: logical axes of the parameters, by path.

    Raises ConfigError, naming the parameter, if the rules don't fit its shape.
    """
    stored = LogicalSharding(rules, mesh).stored()

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = tuple(str(getattr(key, "key", "")) for key in path)
        # A parameter's path ends with its names, whatever stands before: an attribute, an index, a collection.
        logical = next((axes[keys[i:]] for i in range(len(keys)) if keys[i:] in axes), None)
        if logical is None:
            return NamedSharding(mesh, PartitionSpec())
        what = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, stored.spec(what, leaf.shape, logical))

    return jax.tree_util.tree_map_with_path(place, tree)


def _check_names(logical: Logical) -> None:
    if unknown := [name for name in logical if name is not None and name not in LOGICAL]:
        raise ValueError(f"{unknown[0]!r} is not a logical axis: they are {', '.join(LOGICAL)}")


class WeightUse(NamedTuple):
    """dtype: in which layers use a weight. gradient_dtype: in which its gradient is summed over devices."""

    dtype: Any
    gradient_dtype: Any


class _Cuts(NamedTuple):
    """How XLA cuts a weight as it is used and as it is stored; None inside a `shard_map` over all axes. by_hand: the
    axes of the array that are gathered over mesh axes that a `shard_map` holds, and over which."""

    used: PartitionSpec | None
    stored: PartitionSpec | None
    by_hand: tuple[tuple[int, Axes], ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(w: jax.Array, cuts: _Cuts | None, use: WeightUse) -> jax.Array:
    gathered = w.astype(use.dtype)
    if cuts is not None:
        for i, axes in cuts.by_hand:
            gathered = jax.lax.all_gather(gathered, axes, axis=i, tiled=True)
        if cuts.used is not None:
            gathered = jax.lax.with_sharding_constraint(gathered, cuts.used)
    return gathered.astype(jnp.promote_types(w.dtype, use.dtype))


def _all_gather_forward(w: jax.Array, cuts: _Cuts | None, use: WeightUse) -> tuple[jax.Array, jax.Array]:
    return _all_gather(w, cuts, use), jnp.zeros((0,), w.dtype)


def _scatter_gradient(cuts: _Cuts | None, use: WeightUse, like: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    if cuts is not None:
        # Named as used first: else the partitioner would rather cut the activations anew than add up and scatter this.
        g = g.astype(use.gradient_dtype)
        if cuts.used is not None:
            g = jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(g, cuts.used), cuts.stored)
        for i, axes in cuts.by_hand:
            g = jax.lax.psum_scatter(g, axes, scatter_dimension=i, tiled=True)
    return (g.astype(like.dtype),)


_all_gather.defvjp(_all_gather_forward, _scatter_gradient)
