"""Pipeline parallelism: layers are sharded over the mesh axis `stage`, and microbatches pass through it.

Time is divided into ticks; the output of a stage reaches its neighbour in the next tick. With S stages counted from 0,
microbatch m is at stage s

- in tick m + s for its forward pass, of which only the input is saved (on the last stage it is part of the next),
- in tick m + 2 (S - 1) - s for the gradient, for which the forward pass is recomputed,

so that in between every stage does one forward and one backward pass per tick (1F1B). Under `zero_bubble` nothing is
recomputed: a stage saves the residuals of its forward pass, as many as the rematerialisation policy leaves. The second
pass makes the gradient of the stage's input alone, which is what the stage before waits for, and

- in tick m + 2 (S - 1), on all stages, the gradient of the weights follows,

which moves work from filling the pipeline to draining it, when stages would be idle (as ZB-H1 of arXiv 2401.10241 and
DualPipe, report section 3.2.1, do). `parallel.split_backward` splits the backward pass.
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
from dsv3_jax.parallel.split_backward import SplitBackward
from dsv3_jax.runtime import PipelineSchedule

STAGE = "stage"


def duration(schedule: PipelineSchedule, stages: int, microbatches: int) -> int:
    """Duration of a step, in units of one forward pass of a microbatch on one stage; each gradient takes one unit.

    M 4 + (S - 1) 4 for 1F1B: forward, forward again, two gradients. M 3 + (S - 1) 2 for zero_bubble: forward and the
    gradient of the input wait for each other, that of the weights for nothing.
    """
    if schedule == "1f1b":
        return 4 * (microbatches + stages - 1)
    return 3 * microbatches + 2 * (stages - 1)


def bubble(schedule: PipelineSchedule, stages: int, microbatches: int) -> float:
    """The share of that time in which a stage waits for others."""
    return 1 - (4 if schedule == "1f1b" else 3) * microbatches / duration(schedule, stages, microbatches)


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
    held: frozenset[str],
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
      specs: PartitionSpecs of `own` and of `shared`, which lies whole on a device but for experts.
      batch: the mesh axes that cut the sequences.
      activation: of one microbatch on one device, between stages.
      held: the mesh axes over which arrays are cut by hand here, all that the specs and `batch` name. Over others, as
        `tensor` and `context`, XLA cuts what a device has further.

    Returns:
      gradients of `own` and `shared`, sharded alike, in float32 or wider; `total`; and `local` with a leading axis of
      stages.
    """

    def on_stage(own: Any, shared: Any, pieces: Any, constants: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
        of_stage = jax.tree.map(lambda a: a[0], constants[0])
        mine = take(jax.tree.map(lambda a, dtype: a.astype(dtype), own, dtypes))
        work = _Work(function, mine, shared, (of_stage, constants[1]), lax.axis_index(STAGE))
        run = _run if schedule == "1f1b" else _run_split
        (d_mine, d_shared), (total, local) = run(work, pieces, stages, activation)
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
        axis_names=held,
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
    """One stage's passes over one microbatch: forward and gradient.

    Each pass takes the stage's input x, the gradient g of its output, the microbatch, and the sums so far: gradients of
    (own, shared), and (total, local).
    """

    function: StageFunction
    own: Any
    shared: Any
    constants: tuple[Any, Any]
    stage: jax.Array

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
        """The gradients of the input and of the weights."""
        of_all = lambda own, shared, x: self.evaluate(own, shared, x, piece)
        (_, objective), pull, measured = jax.vjp(of_all, self.own, self.shared, x, has_aux=True)
        *made, dx = pull((g, jnp.ones_like(objective)))
        return dx, (_add(sums[0], tuple(made)), _add(sums[1], measured))

    def no_sums(self, x: Any, piece: Any) -> Any:
        """Sums of nothing yet, float32 or wider, as microbatches and devices are added up in."""
        measured = jax.eval_shape(self.evaluate, self.own, self.shared, x, piece)[1]
        wide = lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))
        return jax.tree.map(wide, ((self.own, self.shared), measured))


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
        arrive = functools.partial(_arrive, stage=stage, stages=stages, microbatches=microbatches)
        inputs = arrive(y, inputs, t - (stage - 1), 1)
        gradients = arrive(dx, gradients, backward + stage + 1, -1)
        return (inputs, gradients, sums), None

    sums = work.no_sums(activation, jax.tree.map(lambda a: a[0], pieces))
    buffer = jnp.zeros((slots, *activation.shape), activation.dtype)
    return lax.scan(tick, (buffer, buffer, sums), jnp.arange(microbatches + 2 * (stages - 1)))[0][2]


def _run_split(work: _Work, pieces: Any, stages: int, activation: jax.ShapeDtypeStruct) -> Any:
    """`_run` with the backward pass in two: what arrives is used at once, what a forward pass made is kept."""
    stage, microbatches, last = work.stage, len(jax.tree.leaves(pieces)[0]), stages - 1

    def evaluate(own: Any, shared: Any, x: jax.Array, rest: Any) -> Any:
        constants, piece, stage = rest
        return dataclasses.replace(work, constants=constants, stage=stage).evaluate(own, shared, x, piece)

    def of(m: Any) -> Any:
        return work.constants, jax.tree.map(lambda a: a[m], pieces), stage

    nothing = jnp.zeros(activation.shape, activation.dtype)
    own, shared = work.own, work.shared
    split = SplitBackward(evaluate, own, shared, nothing, of(0))
    (_, objective), _ = jax.eval_shape(lambda: split.forward(own, shared, nothing, of(0))[0])

    @jax.named_scope("forward")
    def forward(x: jax.Array, m: jax.Array) -> Any:
        ((y, _), measured), kept = split.forward(own, shared, x, of(m))
        return y, measured, kept

    @jax.named_scope("gradient")
    def gradient(kept: Any, g: jax.Array) -> Any:
        (d_shared, dx), handed_on = split.first(own, shared, kept, (g, jnp.ones(objective.shape, objective.dtype)))
        return dx, d_shared, handed_on

    @jax.named_scope("weight_gradient")
    def weight_gradient(kept: Any, handed_on: Any) -> Any:
        return split.second(own, shared, kept, handed_on)

    def do(m: jax.Array, what: Callable[..., Any], *arguments: Any) -> Any:
        """`what`, if there is a microbatch m, else zeros."""
        none = _zeros(jax.eval_shape(what, *arguments))
        return lax.cond((m >= 0) & (m < microbatches), what, lambda *_: none, *arguments)

    def store(buffer: Any, made: Any, m: jax.Array) -> Any:
        there = (m >= 0) & (m < microbatches)
        put = lambda b, a: b.at[jnp.where(there, m % len(b), len(b))].set(a, mode="drop")
        return jax.tree.map(put, buffer, made)

    def load(buffer: Any, m: jax.Array) -> Any:
        return jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, m % len(b), keepdims=False), buffer)

    def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
        x, g, kept, handed_on, ((d_own, d_shared), measured) = carry
        m = t - stage, t - 2 * last + stage, t - 2 * last
        y, of_m, made = do(m[0], forward, x, jnp.clip(m[0], 0, microbatches - 1))
        kept = store(kept, made, m[0])
        dx, of_shared, made = do(m[1], gradient, load(kept, m[1]), g)
        handed_on = store(handed_on, made, m[1])
        of_own = do(m[2], weight_gradient, load(kept, m[2]), load(handed_on, m[2]))
        sums = (_add(d_own, of_own), _add(d_shared, of_shared)), _add(measured, of_m)
        return (_shift(y, 1, stages), _shift(dx, -1, stages), kept, handed_on, sums), None

    def buffers(like: Any, slots: int) -> Any:
        return jax.tree.map(lambda a: jnp.zeros((min(slots, microbatches), *a.shape), a.dtype), like)

    made = jax.eval_shape(forward, nothing, 0)[2]
    later = jax.eval_shape(gradient, made, nothing)[2]
    sums = work.no_sums(activation, of(0)[1])
    start = nothing, nothing, buffers(made, 2 * stages - 1), buffers(later, stages), sums
    return lax.scan(tick, start, jnp.arange(microbatches + 2 * last))[0][4]


def _zeros(like: Any) -> Any:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)


@jax.named_scope("send_to_neighbour")
def _shift(value: jax.Array, to: int, stages: int) -> jax.Array:
    """Sends a value to the next stage (`to` 1) or the one before (-1); zeros arrive where there is none."""
    arrived: jax.Array = lax.ppermute(value, STAGE, [(i, i + to) for i in range(stages) if 0 <= i + to < stages])
    return arrived


def _arrive(
    value: jax.Array, buffer: jax.Array, m: jax.Array, to: int, *, stage: jax.Array, stages: int, microbatches: int
) -> jax.Array:
    """Sends a value to the next stage (`to` 1) or the one before (-1); stores what arrives, if it is a microbatch's."""
    arrived = _shift(value, to, stages)
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
