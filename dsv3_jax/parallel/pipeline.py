"""Pipelines: layers spread over the mesh axis `stage`, and microbatches passing through it.

Time is cut into ticks, and what a stage makes in one is at its neighbour in the next. With S stages counted from 0,
microbatch m is at stage s

- in tick m + s for its forward pass, whose input is all that is kept of it (on the last stage it is part of the next),
- in tick m + 2 (S - 1) - s for the gradient, for which the forward pass is computed again,

so that in between every stage does one forward and one backward pass a tick (1F1B). Under `zero_bubble` the second of
these makes the gradient of the stage's input alone, which is what the stage before waits for, and

- in tick m + 2 (S - 1), on all stages, the gradient of the weights follows,

which moves work from the pipeline's filling to its draining, where stages would wait (as ZB-H1 of arXiv 2401.10241 and
DualPipe, report section 3.2.1, do). As each of the two computes the forward pass again, this pays with fewer
microbatches than stages; see `duration`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from dsv3_jax.config import ConfigError

Schedule = Literal["1f1b", "zero_bubble"]

STAGE = "stage"


def duration(schedule: Schedule, stages: int, microbatches: int) -> int:
    """Time of a step in forward passes of one microbatch on one stage, each gradient taking as long as one of them.

    M 4 + (S - 1) 4 for 1F1B: forward, forward again, two gradients. M 5 + (S - 1) 3 for zero_bubble.
    """
    if schedule == "1f1b":
        return 4 * (microbatches + stages - 1)
    return 5 * microbatches + 3 * (stages - 1)


StageFunction = Callable[..., tuple[jax.Array, jax.Array, Any, Any]]
"""`(own, shared, x, piece, constants, stage) -> (y, objective, total, local)`: the part of the model on one stage.

own: its parameters. shared: those that every stage has. x: what the stage before made, of any value on the first.
piece: the microbatch. constants: what isn't differentiated, its own and the shared. Of the results, `objective` is what
this stage adds to the loss, `total` is summed over stages and microbatches, `local` over microbatches.
"""


def pipeline_gradients(
    function: StageFunction,
    own: Any,
    shared: Any,
    pieces: Any,
    constants: tuple[Any, Any],
    *,
    stages: int,
    specs: tuple[Any, Any],
    batch: tuple[str, ...],
    activation: jax.ShapeDtypeStruct,
    schedule: Schedule,
) -> tuple[Any, Any, Any, Any]:
    """Gradients of the summed objective over all devices of the mesh in use, each running `function` on its part.

    Args:
      own, constants[0]: trees whose leaves have a leading axis of stages.
      pieces: a tree of (microbatches, sequences, ...).
      stages: devices along the mesh axis `stage`.
      specs: PartitionSpecs of `own` and of `shared`; both lie whole on a device but for stages and experts.
      batch: the mesh axes that cut the sequences.
      activation: of one microbatch on one device, between stages.

    Returns:
      gradients of `own` and of `shared`, cut as these are, float32 or wider, `total`, and `local` with a leading axis
      of stages.
    """
    microbatches = len(jax.tree.leaves(pieces)[0])
    slots = min(microbatches, 2 * stages - 1)  # microbatches whose input a stage holds at once, at most

    def on_stage(own: Any, shared: Any, pieces: Any, constants: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
        stage = lax.axis_index(STAGE)
        own, mine = jax.tree.map(lambda a: a[0], (own, constants[0]))
        add = lambda a, b: jax.tree.map(jnp.add, a, b)
        nothing = jnp.zeros(activation.shape, activation.dtype)

        def evaluate(own: Any, shared: Any, x: jax.Array, piece: Any) -> tuple[Any, Any]:
            y, objective, total, local = function(own, shared, x, piece, (mine, constants[1]), stage)
            return (y, objective), (total, local)

        def forward(x: jax.Array, g: jax.Array, piece: Any, sums: Any) -> Any:
            return evaluate(own, shared, x, piece)[0][0]

        def gradient(x: jax.Array, g: jax.Array, piece: Any, sums: Any) -> Any:
            d_parameters, totals = sums
            if schedule == "1f1b":
                _, pull, measured = jax.vjp(
                    lambda own, shared, x: evaluate(own, shared, x, piece), own, shared, x, has_aux=True
                )
                *made, dx = pull((g, one))
                return dx, (add(d_parameters, tuple(made)), add(totals, measured))
            _, pull, measured = jax.vjp(lambda x: evaluate(own, shared, x, piece), x, has_aux=True)
            return pull((g, one))[0], (d_parameters, add(totals, measured))

        def weight_gradient(x: jax.Array, g: jax.Array, piece: Any, sums: Any) -> Any:
            _, pull, _ = jax.vjp(lambda own, shared: evaluate(own, shared, x, piece), own, shared, has_aux=True)
            return add(sums[0], pull((g, one))), sums[1]

        def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
            inputs, gradients, sums = carry

            def do(m: jax.Array, what: Callable[..., Any], otherwise: Any, *, unless: Any = False) -> Any:
                """`what` for microbatch m, if there is such a one."""
                at = jnp.clip(m, 0, microbatches - 1)
                piece = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, at, keepdims=False), pieces)
                x, g = (lax.dynamic_index_in_dim(a, at % slots, keepdims=False) for a in (inputs, gradients))
                return lax.cond((at == m) & ~jnp.asarray(unless), what, lambda *_: otherwise, x, g, piece, sums)

            last = stage == stages - 1
            made = do(t - stage, forward, nothing, unless=last)
            turned = t - 2 * (stages - 1)
            d_input, sums = do(turned + stage, gradient, (nothing, sums))
            if schedule == "zero_bubble":
                sums = do(turned, weight_gradient, sums)

            def pass_on(value: jax.Array, buffer: jax.Array, m: jax.Array, to: int) -> jax.Array:
                """Microbatch m's value arrives from a neighbour, if it has one on that side and there is such an m."""
                pairs = [(i, i + to) for i in range(stages) if 0 <= i + to < stages]
                arrived = lax.ppermute(value, STAGE, pairs)
                there = (m >= 0) & (m < microbatches) & (stage - to >= 0) & (stage - to < stages)
                return buffer.at[jnp.where(there, m % slots, slots)].set(arrived, mode="drop")

            inputs = pass_on(made, inputs, t - (stage - 1), 1)
            gradients = pass_on(d_input, gradients, turned + stage + 1, -1)
            return (inputs, gradients, sums), None

        first = jax.tree.map(lambda a: a[0], pieces)
        (_, objective), measured = jax.eval_shape(evaluate, own, shared, activation, first)
        one = jnp.ones((), objective.dtype)
        wide = lambda a: jnp.promote_types(a.dtype, jnp.float32)  # of sums over microbatches and devices
        zeros = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, wide(a)), tree)
        buffer = jnp.zeros((slots, *activation.shape), activation.dtype)
        start = (buffer, buffer, zeros(((own, shared), measured)))
        ticks = jnp.arange(microbatches + 2 * (stages - 1))
        (_, _, ((d_own, d_shared), (total, local))), _ = lax.scan(tick, start, ticks)
        stacked = lambda tree: jax.tree.map(lambda a: a[None], tree)
        # What lies on several devices was computed on each for its own sequences.
        elsewhere = lambda spec: tuple(a for a in batch if a not in jax.tree.leaves(tuple(spec)))
        add_up = lambda tree, cut: jax.tree.map(lambda a, spec: lax.psum(a, elsewhere(spec)), tree, cut)
        d_shared = lax.psum(add_up(d_shared, specs[1]), STAGE)
        return (
            stacked(add_up(d_own, specs[0])),
            d_shared,
            lax.psum(total, (STAGE, *batch)),
            stacked(lax.psum(local, batch)),
        )

    by_stage, whole = PartitionSpec(STAGE), PartitionSpec()
    run = jax.shard_map(
        on_stage,
        in_specs=(*specs, PartitionSpec(None, batch or None), (by_stage, whole)),
        out_specs=(*specs, whole, by_stage),
        check_vma=False,
    )
    return run(own, shared, pieces, constants)


def layers_of_stages(layers: int, stages: int) -> np.ndarray:
    """Which layers each stage has: (stages, most) int32, `layers` for none. Fewer go to both ends, which do more.

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
