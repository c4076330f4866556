"""Where a run's arrays live: the mesh, what is cut over it, and which rows of a batch this process has to load."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.mesh import AXES, MeshShape, make_mesh
from dsv3_jax.parallel.rules import rules_of
from dsv3_jax.parallel.sharding import Logical, LogicalSharding, state_shardings
from dsv3_jax.runtime import Runtime


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A jitted function that is called where `mesh` is in use."""

    jitted: Any
    mesh: Mesh

    def __call__(self, *arguments: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self.jitted(*arguments)

    def check(self, *arguments: Any) -> None:
        """Traces the function for (abstract) arguments, as a call would, and raises what that call would raise then."""
        with jax.set_mesh(self.mesh):
            self.jitted.eval_shape(*arguments)


class Placement:
    """The mesh of a run and the shardings that the runtime's rules give its arrays.

    A mesh of one device takes the first there is; any other takes all devices of all processes of the job.
    """

    def __init__(
        self,
        shape: MeshShape,
        runtime: Runtime,
        axes: Mapping[tuple[str, ...], Logical],
        devices: list[jax.Device] | None = None,
    ) -> None:
        """Raises ConfigError if the mesh doesn't suit the devices, or the rules cut nothing over one of its axes.

        axes: logical axes of the model's parameters, by their paths below the collection.

        `devices` may be of a topology that isn't there, to compile for.
        """
        if shape.devices > 1 and runtime.sharding == "single":
            raise ConfigError(f"mesh {shape} with runtime.sharding 'single': choose fsdp, fsdp_ep, ep_tp or pp_ep_dp")
        rules = rules_of(runtime)
        used = {axis for name in dataclasses.asdict(rules) for axis in getattr(rules, name)}
        for axis, size in dataclasses.asdict(shape).items():
            if size > 1 and axis not in used:
                raise ConfigError(
                    f"mesh.{axis} is {size}, but runtime.sharding {runtime.sharding!r} cuts nothing over it, so that "
                    f"these devices would all do the same: it cuts over {', '.join(a for a in AXES if a in used)}"
                )
        if devices is None:
            devices = jax.local_devices()[:1] if shape.devices == 1 else jax.devices()
        self.mesh = make_mesh(shape, devices)
        self.sharding = LogicalSharding(rules, self.mesh)
        self._axes = axes
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self._batch = NamedSharding(self.mesh, PartitionSpec(self.sharding.axes("batch") or None))

    def init(self, init: Callable[[jax.Array], Any], key: jax.Array) -> Any:
        """The pytree `init(key)`, each device making only its part of it."""
        shardings = state_shardings(jax.eval_shape(init, key), self.mesh, self.sharding.rules, self._axes)
        return jax.jit(init, out_shardings=shardings)(key)

    def abstract(self, init: Callable[[jax.Array], Any], batch: dict[str, Any]) -> tuple[Any, Any]:
        """Shapes, dtypes and shardings of the state and of a batch, for `lower`.

        Raises ConfigError if an axis of the mesh cuts nothing of this state, as `expert` of a model without experts.
        """

        def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        state = jax.eval_shape(init, jax.random.key(0))
        shardings = state_shardings(state, self.mesh, self.sharding.rules, self._axes)
        cut = {axis for sharding in jax.tree.leaves(shardings) for axes in sharding.spec for axis in _axes(axes)}
        cut |= {*self.sharding.axes("batch"), *self.sharding.axes("sequence")}
        for axis in AXES:
            if self.sharding.axis_size(axis) > 1 and axis not in cut:
                raise ConfigError(f"mesh.{axis} is {self.mesh.shape[axis]}, but nothing of this model is cut over it")
        return jax.tree.map(place, state, shardings), jax.tree.map(lambda x: place(x, self._batch), batch)

    def jit_step(self, step: Callable[..., Any], state: Any) -> OnMesh:
        """The step compiled for this mesh: its new state lies as `state` does, its metrics on every device."""
        return OnMesh(self._jit(step, state), self.mesh)

    def lower(self, step: Callable[..., Any], state: Any, batch: Any) -> jax.stages.Lowered:
        """Lowers what `jit_step` would compile, from the abstract state and batch of `abstract`."""
        with jax.set_mesh(self.mesh):
            lowered: jax.stages.Lowered = self._jit(step, state).lower(state, batch)
            return lowered

    def _jit(self, step: Callable[..., Any], state: Any) -> Any:
        shardings = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(step, out_shardings=(shardings, self.replicated), donate_argnums=0)

    def jit_evaluation(self, evaluate: Callable[..., Any]) -> OnMesh:
        """Compiled, its result on every device."""
        return OnMesh(jax.jit(evaluate, out_shardings=self.replicated), self.mesh)

    @property
    def parts(self) -> int:
        """Parts that a batch is cut into; they must divide it."""
        return self.sharding.size("batch")

    def rows(self, batch_size: int) -> np.ndarray:
        """The rows of a batch that this process's devices hold, ascending."""
        self._check(batch_size)
        slices = self._batch.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))

    def abstract_batch(self, names: Iterable[str], batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of what `batch` makes."""
        self._check(batch_size)
        one = jax.ShapeDtypeStruct((batch_size, length), np.int32, sharding=self._batch)
        return dict.fromkeys(names, one)

    def batch(self, rows: np.ndarray, local: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """Global arrays (batch_size, T) of the local rows that `rows` numbers."""
        self._check(batch_size)

        def array(values: np.ndarray) -> jax.Array:
            def piece(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                wanted = np.arange(batch_size)[index[0]]
                return values[np.searchsorted(rows, wanted)]

            return jax.make_array_from_callback((batch_size, *values.shape[1:]), self._batch, piece)

        return {name: array(values) for name, values in local.items()}

    def _check(self, batch_size: int) -> None:
        if batch_size % self.parts:
            axes = " x ".join(self.sharding.axes("batch"))
            raise ConfigError(f"a batch of {batch_size} sequences doesn't divide over {axes} = {self.parts} devices")


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec, which leaves the tuple out where there is one."""
    return (entry,) if isinstance(entry, str) else entry or ()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process of the job; all must ask at once."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def all_processes_here() -> None:
    """Waits until every process of the job has come this far."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all processes here")
