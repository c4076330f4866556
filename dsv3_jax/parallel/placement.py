"""Placement of a run's arrays: the mesh, the shardings, and the rows of a batch that this process loads."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.mesh import AXES, MeshShape, make_mesh
from dsv3_jax.parallel.rules import rules_of
from dsv3_jax.parallel.sharding import Logical, LogicalSharding, mesh_axes, state_shardings
from dsv3_jax.runtime import Runtime


@dataclasses.dataclass
class Jitted:
    """A jitted function that is traced and called with `mesh` set, if it has one."""

    jitted: Any
    mesh: Mesh | None
    _traced: Any = None
    _ahead: futures.Future[Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        with self._on_mesh():
            call = self.jitted if self._ahead is None else self._ahead.result()
            return call(*arguments)

    def check(self, *arguments: Any) -> None:
        """Traces the function for (abstract) arguments, and raises the errors of a call."""
        with self._on_mesh():
            self._traced = self.jitted.trace(*arguments)

    def compile_ahead(self) -> None:
        """Starts to compile, in a thread, for the arguments of the last `check`.

        A call waits for it, and takes no others.
        """
        traced, self._traced = self._traced, None

        def compiled() -> Any:
            with self._on_mesh():
                return traced.lower().compile()

        pool = futures.ThreadPoolExecutor(1)
        self._ahead = pool.submit(compiled)
        pool.shutdown(wait=False)

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


class Placement:
    """The mesh of a run, and the shardings of its arrays by the runtime's rules.

    A mesh of one device uses the first device; any other uses all devices of all processes of the job.
    """

    def __init__(
        self,
        shape: MeshShape,
        runtime: Runtime,
        axes: Mapping[tuple[str, ...], Logical],
        devices: list[jax.Device] | None = None,
    ) -> None:
        """Raises ConfigError if the mesh doesn't match the devices, or the rules shard nothing over one of its axes.

        axes: logical axes of the model's parameters, by path.

        `devices` may belong to an absent topology, to compile for.
        """
        if shape.devices > 1 and not runtime.sharded:
            raise ConfigError(f"mesh {shape} with runtime.sharding 'single': choose fsdp, fsdp_ep, ep_tp or pp_ep_dp")
        rules = rules_of(runtime)
        used = {axis for name in dataclasses.asdict(rules) for axis in getattr(rules, name)}
        for axis, size in dataclasses.asdict(shape).items():
            if size > 1 and axis not in used:
                raise ConfigError(
                    f"mesh.{axis} is {size}, but runtime.sharding {runtime.sharding!r} cuts nothing over it, so that "
                    f"these devices would all do the same: it cuts over {', '.join(a for a in AXES if a in used)}"
                )
        if devices is None and shape.devices == 1 < jax.process_count():
            processes = jax.process_count()
            raise ConfigError(f"the mesh is one device, but the job has {processes} processes: give it all devices")
        if devices is None:
            devices = jax.local_devices()[:1] if shape.devices == 1 else jax.devices()
        self.mesh = make_mesh(shape, devices)
        self.sharding = LogicalSharding(rules, self.mesh)
        self._axes = axes
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self._batch = NamedSharding(self.mesh, PartitionSpec(self.sharding.axes("batch") or None))

    def jit_init(self, init: Callable[[jax.Array], Any]) -> Jitted:
        """Jits a function from a typed key to a pytree. Each device creates only its part."""
        state = jax.eval_shape(init, jax.random.key(0))
        shardings = state_shardings(state, self.mesh, self.sharding.rules, self._axes)
        return Jitted(jax.jit(init, out_shardings=shardings), None)  # what it applies the model to isn't a batch

    def abstract(self, init: Callable[[jax.Array], Any], batch: dict[str, Any]) -> tuple[Any, Any]:
        """Returns shapes, dtypes and shardings of the state and of a batch, for `lower`.

        Raises ConfigError if a mesh axis shards nothing of this state, such as `expert` for a model without experts.
        """

        def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        state = jax.eval_shape(init, jax.random.key(0))
        shardings = state_shardings(state, self.mesh, self.sharding.rules, self._axes)
        cut = {axis for sharding in jax.tree.leaves(shardings) for axes in sharding.spec for axis in mesh_axes(axes)}
        cut |= {*self.sharding.axes("batch"), *self.sharding.axes("sequence")}
        for axis in AXES:
            if self.sharding.axis_size(axis) > 1 and axis not in cut:
                raise ConfigError(f"mesh.{axis} is {self.mesh.shape[axis]}, but nothing of this model is cut over it")
        return jax.tree.map(place, state, shardings), jax.tree.map(lambda x: place(x, self._batch), batch)

    def jit_step(self, step: Callable[..., Any], state: Any) -> Jitted:
        """Jits a step for this mesh. The new state is sharded like `state`, and metrics are replicated."""
        return Jitted(self._jit(step, state), self.mesh)

    def lower(self, step: Callable[..., Any], state: Any, batch: Any) -> jax.stages.Lowered:
        """Lowers the function of `jit_step` for the abstract state and batch of `abstract`."""
        with jax.set_mesh(self.mesh):
            lowered: jax.stages.Lowered = self._jit(step, state).lower(state, batch)
            return lowered

    def _jit(self, step: Callable[..., Any], state: Any) -> Any:
        shardings = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(step, out_shardings=(shardings, self.replicated), donate_argnums=0)

    def jit_evaluation(self, evaluate: Callable[..., Any]) -> Jitted:
        """Jits a function whose result is replicated."""
        return Jitted(jax.jit(evaluate, out_shardings=self.replicated), self.mesh)

    @property
    def parts(self) -> int:
        """Number of parts that a batch is sharded into, which must divide it."""
        return self.sharding.size("batch")

    def rows(self, batch_size: int) -> np.ndarray:
        """Returns the rows of a batch that this process's devices hold, ascending."""
        self._check(batch_size)
        slices = self._batch.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))

    def abstract_batch(self, names: Iterable[str], batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes, dtypes and shardings of `batch`."""
        self._check(batch_size)
        one = jax.ShapeDtypeStruct((batch_size, length), np.int32, sharding=self._batch)
        return dict.fromkeys(names, one)

    def batch(self, rows: np.ndarray, local: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """Makes global arrays (batch_size, T) from local rows with the numbers `rows`."""
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


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process of the job. All processes must call it together."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def all_processes_here() -> None:
    """Waits until every process of the job has reached this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all processes here")
