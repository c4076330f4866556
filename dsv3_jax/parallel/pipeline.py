"""Pipeline parallelism: layers are sharded over the mesh axis `stage`, and microbatches pass through it.

Time is divided into ticks; the output of a stage reaches its neighbour in the next tick. With S stages counted from 0,
microbatch m is at stage s

- in tick m + s for its forward pass, of which only the input is saved (on the last stage it is part of the next),
- in tick m + 2 (S - 1) - s for the gradient, for which the forward pass is recomputed,

so that in between every stage does one forward and one backward pass per tick (1F1B). Under `zero_bubble` the second of
these makes the gradient of the stage's input alone, which is what the stage before waits for, and

- in tick m + 2 (S - 1), on all stages, the gradient of the weights follows,

which moves work from filling the pipeline to draining it, when stages would be idle (as ZB-H1 of arXiv 2401.10241 and
DualPipe, report section 3.2.1, do). Since both recompute the forward pass, this is faster only with fewer microbatches
than stages; see `duration`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from dsv3_jax.config import ConfigError
from dsv3_jax.runtime import PipelineSchedule

STAGE = "stage"


def duration(schedule: PipelineSchedule, stages: int, microbatches: int) -> int:
    """Duration of a step, in units of one forward pass of a microbatch on one stage; each gradient takes one unit.

    M 4 + (S - 1) 4 for 1F1B: forward, recomputation, two gradients. M 5 + (S - 1) 3 for zero_bubble.
    """
    if schedule == "1f1b":
        return 4 * (microbatches + stages - 1)
    return 5 * microbatches + 3 * (stages - 1)


StageFunction = Callable[..., tuple[jax.Array, jax.Array, Any, Any]]
"""`(own, shared, x, piece, constants, stage) -> (y, objective, total, local)`: the part of the model on one stage.

own: its parameters. shared: those on every stage. x: the output of the previous stage, arbitrary on the first.
piece: the microbatch. constants: its own and shared arrays that aren't differentiated. `objective` is what this stage
adds to the loss; `total` is summed over stages and microbatches, `local` over microbatches.
"""


def pipeline_gradients(
    function: StageFunction,
    own: Any,
    shared: Any,
    pieces: Any,
    constants: tuple[Any, Any],
    *,
    take: Callable[[Any], Any],
    dtypes: Any,
    stages: int,
    specs: tuple[Any, Any],
    batch: tuple[str, ...],
    activation: jax.ShapeDtypeStruct,
    schedule: PipelineSchedule,
) -> tuple[Any, Any, Any, Any]:
    """Computes gradients of the summed objective on the current mesh. Each device runs `function` on its part.

    Args:
      own: parameters of all stages, sharded as in `specs[0]`.
      constants[0]: a tree whose leaves have a leading axis of stages.
      pieces: a tree of (microbatches, sequences, ...).
      take: a linear function from a device's part of `own` to the parameters of its stage, for `function`. Its
        transpose returns gradients, summed over the devices that it communicates with.
      dtypes: a tree of the dtypes in which `own` is communicated and passed to `function`.
      stages: devices along the mesh axis `stage`.
      specs: PartitionSpecs of `own` and of `shared`, which is replicated except for experts.
      batch: the mesh axes that shard sequences.
      activation: shape and dtype between stages, of one microbatch on one device.

    Returns:
      gradients of `own` and `shared`, sharded alike, in float32 or wider; `total`; and `local` with a leading axis of
      stages.
    """

    def on_stage(own: Any, shared: Any, pieces: Any, constants: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
        of_stage = jax.tree.map(lambda a: a[0], constants[0])
        mine = take(jax.tree.map(lambda a, dtype: a.astype(dtype), own, dtypes))
        work = _Work(function, mine, shared, (of_stage, constants[1]), lax.axis_index(STAGE), schedule)
        (d_mine, d_shared), (total, local) = _run(work, pieces, stages, activation)
        wide = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.promote_types(a.dtype, jnp.float32)), own)
        d_own = jax.linear_transpose(take, wide)(d_mine)[0]
        return (
            _add_up(d_own, specs[0], (STAGE, *batch)),
            _add_up(d_shared, specs[1], (STAGE, *batch)),
            lax.psum(total, (STAGE, *batch)),
            _stacked(lax.psum(local, batch)),
        )

    by_stage, whole = PartitionSpec(STAGE), PartitionSpec()
    run = jax.shard_map(
        on_stage,
        in_specs=(*specs, PartitionSpec(None, batch or None), (by_stage, whole)),
        out_specs=(*specs, whole, by_stage),
        check_vma=False,
    )
    return run(own, shared, pieces, constants)


def _stacked(tree: Any) -> Any:
    """Adds a leading axis of one stage to a tree."""
    return jax.tree.map(lambda a: a[None], tree)


def _add_up(gradients: Any, specs: Any, axes: tuple[str, ...]) -> Any:
    """Sums gradients over the devices along `axes` that hold the same part of a parameter."""

    def add_up(gradient: jax.Array, spec: PartitionSpec) -> Any:
        return lax.psum(gradient, tuple(a for a in axes if a not in jax.tree.leaves(tuple(spec))))

    return jax.tree.map(add_up, gradients, specs)


@dataclasses.dataclass(frozen=True)
class _Work:
    """One stage's passes over one microbatch: forward, gradient, and zero_bubble's gradient of the weights.

    Each pass takes the stage's input x, the gradient g of its output, the microbatch, and the sums so far: gradients of
    (own, shared), and (total, local).
    """

    function: StageFunction
    own: Any
    shared: Any
    constants: tuple[Any, Any]
    stage: jax.Array
    schedule: PipelineSchedule

    def evaluate(self, own: Any, shared: Any, x: jax.Array, piece: Any) -> tuple[Any, Any]:
        """Returns ((y, objective), (total, local)): the differentiated outputs, and the others."""
        y, objective, total, local = self.function(own, shared, x, piece, self.constants, self.stage)
        return (y, objective), (total, local)

    @jax.named_scope("forward")
    def forward(self, x: jax.Array, g: jax.Array, piece: Any, sums: Any) -> jax.Array:
        y: jax.Array = self.evaluate(self.own, self.shared, x, piece)[0][0]
        return y

    @jax.named_scope("gradient")
    def gradient(self, x: jax.Array, g: jax.Array, piece: Any, sums: Any) -> tuple[jax.Array, Any]:
        """Computes the gradient of the input and, under 1F1B, of the weights."""
        d_parameters, totals = sums
        if self.schedule == "zero_bubble":
            of_input = lambda x: self.evaluate(self.own, self.shared, x, piece)
            (_, objective), pull, measured = jax.vjp(of_input, x, has_aux=True)
            return pull((g, jnp.ones_like(objective)))[0], (d_parameters, _add(totals, measured))
        of_all = lambda own, shared, x: self.evaluate(own, shared, x, piece)
        (_, objective), pull, measured = jax.vjp(of_all, self.own, self.shared, x, has_aux=True)
        *made, dx = pull((g, jnp.ones_like(objective)))
        return dx, (_add(d_parameters, tuple(made)), _add(totals, measured))

    @jax.named_scope("weight_gradient")
    def weight_gradient(self, x: jax.Array, g: jax.Array, piece: Any, sums: Any) -> Any:
        of_weights = lambda own, shared: self.evaluate(own, shared, x, piece)
        (_, objective), pull, _ = jax.vjp(of_weights, self.own, self.shared, has_aux=True)
        return _add(sums[0], pull((g, jnp.ones_like(objective)))), sums[1]


def _run(work: _Work, pieces: Any, stages: int, activation: jax.ShapeDtypeStruct) -> Any:
    """Runs all ticks of one stage. Returns sums over microbatches of gradients (own, shared), and of (total, local)."""
    stage, microbatches = work.stage, len(jax.tree.leaves(pieces)[0])
    slots = min(microbatches, 2 * stages - 1)  # microbatches whose input a stage holds at once, at most
    nothing = jnp.zeros(activation.shape, activation.dtype)

    def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
        inputs, gradients, sums = carry

        def do(m: jax.Array, what: Callable[..., Any], otherwise: Any, *, unless: Any = False) -> Any:
            """Runs `what` for microbatch m, if it exists."""
            at = jnp.clip(m, 0, microbatches - 1)
            piece = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, at, keepdims=False), pieces)
            x, g = (lax.dynamic_index_in_dim(a, at % slots, keepdims=False) for a in (inputs, gradients))
            return lax.cond((at == m) & ~jnp.asarray(unless), what, lambda *_: otherwise, x, g, piece, sums)

        backward = t - 2 * (stages - 1)
        y = do(t - stage, work.forward, nothing, unless=stage == stages - 1)
        dx, sums = do(backward + stage, work.gradient, (nothing, sums))
        if work.schedule == "zero_bubble":
            sums = do(backward, work.weight_gradient, sums)
        arrive = functools.partial(_arrive, stage=stage, stages=stages, microbatches=microbatches)
        inputs = arrive(y, inputs, t - (stage - 1), 1)
        gradients = arrive(dx, gradients, backward + stage + 1, -1)
        return (inputs, gradients, sums), None

    first = jax.tree.map(lambda a: a[0], pieces)
    measured = jax.eval_shape(work.evaluate, work.own, work.shared, activation, first)[1]
    wide = lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))  # sums over microbatches and devices
    sums = jax.tree.map(wide, ((work.own, work.shared), measured))
    buffer = jnp.zeros((slots, *activation.shape), activation.dtype)
    return lax.scan(tick, (buffer, buffer, sums), jnp.arange(microbatches + 2 * (stages - 1)))[0][2]


@jax.named_scope("send_to_neighbour")
def _arrive(
    value: jax.Array, buffer: jax.Array, m: jax.Array, to: int, *, stage: jax.Array, stages: int, microbatches: int
) -> jax.Array:
    """Sends a value to the next stage (`to` 1) or the previous one (-1). Stores what arrives for a microbatch."""
    arrived = lax.ppermute(value, STAGE, [(i, i + to) for i in range(stages) if 0 <= i + to < stages])
    there = (m >= 0) & (m < microbatches) & (stage - to >= 0) & (stage - to < stages)
    slots = len(buffer)
    return buffer.at[jnp.where(there, m % slots, slots)].set(arrived, mode="drop")


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def take_stage(part: jax.Array, layers: np.ndarray, cut: tuple[int, tuple[str, ...]] | None) -> jax.Array:
    """Returns the layers of this device's stage, (most, ...), from its part of a stack of all layers, (L, ...). Linear.

    Args:
      layers: from `layers_of_stages`; missing layers are zero.
      cut: the axis along which the stack is sharded, and over which mesh axes; None if it isn't. The result is
        all-gathered along it. Stages exchange their parts of each other's layers, so that no device ever holds all
        layers.
    """
    pick = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)
    axis, axes = cut or (0, ())
    if others := tuple(a for a in axes if a != STAGE):
        part = lax.all_gather(part, others, axis=axis, tiled=True)
    if STAGE not in axes:
        return pick(part, jnp.asarray(layers)[lax.axis_index(STAGE)])
    swapped: jax.Array = lax.all_to_all(pick(part, layers), STAGE, 0, axis + 1, tiled=True)
    return swapped[0]


def layers_of_stages(layers: int, stages: int) -> np.ndarray:
    """Assigns layers to stages: (stages, most) int32, `layers` for none.

    Both ends get fewer, since they have other work.

    Raises ConfigError if there are fewer layers than stages.
    """
    if layers < stages:
        raise ConfigError(f"mesh.stage is {stages}, but there are only {layers} sparse layers to spread")
    counts = np.full(stages, layers // stages)
    middle_first = sorted(range(stages), key=lambda s: abs(2 * s - stages + 1))
    counts[middle_first[: layers % stages]] += 1
    ends = np.cumsum(counts)
    place = np.arange(counts.max())
    return np.where(place < counts[:, None], (ends - counts)[:, None] + place, layers).astype(np.int32)
