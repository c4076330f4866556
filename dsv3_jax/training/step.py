"""One training step as a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dsv3_jax.model.router import ROUTER
from dsv3_jax.model.transformer import DeepSeekV3, expert_load, only_of
from dsv3_jax.training.losses import (
    Batch,
    Loss,
    Metrics,
    StepSums,
    Whole,
    forward,
    load_violations,
    model_inputs,
    predictable,
)
from dsv3_jax.training.pipelined import pipelined_gradients, stages_in_use


@struct.dataclass
class TrainState:
    """All that training changes: a pytree to checkpoint, shard and pass through `train_step`.

    step: int32, steps taken. params, router: the model's two collections. opt_state: optax's. rng: a typed key.
    """

    step: jax.Array
    params: Any
    router: Any
    opt_state: Any
    rng: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """Variables as `model.apply` takes them."""
        return {"params": self.params, ROUTER: self.router}


def init_state(model: DeepSeekV3, optimizer: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    """A state at step 0, from a typed key."""
    init_rng, rng = jax.random.split(rng)
    variables = model.init(init_rng, jnp.zeros((1, 1), jnp.int32))
    params, router = variables["params"], variables.get(ROUTER, {})
    return TrainState(jnp.zeros((), jnp.int32), params, router, optimizer.init(params), rng)


def make_train_step(
    model: DeepSeekV3,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    microbatches: int = 1,
    skip_non_finite: bool = True,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the pure `train_step(state, batch, sequences=None) -> (state, metrics)`; jit it with `donate_argnums=0`.

    `sequences`, () int32, is for batches that grow, so that one program takes all sizes: the batch then has the largest
    one, its first `sequences` rows count, and the targets of the others are `IGNORE`. Microbatches without any that
    count aren't computed.

    Args:
      loss: the objective, such as `PretrainingLoss(model.config, schedule)`.
      microbatches: number of pieces of the batch, whose gradients are accumulated one after the other; must divide B.
        Over the stages of a mesh, they are what passes through the pipeline.
        The result is that of the whole batch: losses, loads and gradients are sums over the pieces.
      skip_non_finite: whether a step whose objective or gradient isn't finite leaves all but `step` as it is. The
        metric `skipped` is 1 then, else 0.
    """

    def train_step(state: TrainState, batch: Batch, sequences: jax.Array | None = None) -> tuple[TrainState, Metrics]:
        size = batch["tokens"].shape[0]
        if size % microbatches:
            raise ValueError(f"a batch of {size} sequences can't be cut into {microbatches} microbatches")
        whole = _whole(state, batch, sequences)

        def objective(params: Any, piece: Batch, real: jax.Array | None = None) -> tuple[jax.Array, StepSums]:
            sums = _sums(model, loss, {"params": params, ROUTER: state.router}, piece, whole, real)
            return sums.objective, sums

        if stages_in_use(model) > 1:
            if sequences is not None:
                raise ValueError("a pipeline takes batches without padding")
            grads, sums = pipelined_gradients(model, state.variables, _cut(batch, microbatches), loss, whole)
        else:
            grads, sums = _accumulate(jax.grad(objective, has_aux=True), state.params, batch, microbatches, sequences)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        router = update_bias(state.router, sums.load, loss.bias_update_speed(state.step))
        with jax.named_scope("metrics"):
            metrics = loss.metrics(sums.loss, whole) | load_violations(sums.load)
            metrics |= {"objective": sums.objective, "grad_norm": optax.global_norm(grads)}
        after = (params, router, opt_state)
        if skip_non_finite:
            good = jnp.isfinite(metrics["objective"]) & jnp.isfinite(metrics["grad_norm"])
            metrics["skipped"] = jnp.where(good, 0, 1)
            before = (state.params, state.router, state.opt_state)
            after = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
        return TrainState(state.step + 1, *after, state.rng), metrics

    return train_step


def _whole(state: TrainState, batch: Batch, sequences: jax.Array | None = None) -> Whole:
    count = jnp.asarray(batch["tokens"].shape[0] if sequences is None else sequences)
    return Whole(state.step, jnp.sum(predictable(batch, 1)), count)


def _sums(
    model: DeepSeekV3,
    loss: Loss,
    variables: Mapping[str, Any],
    piece: Batch,
    whole: Whole,
    real: jax.Array | None = None,
) -> StepSums:
    """Runs the model on a piece of the batch and applies the loss; `real` as in `model_inputs`."""
    inputs = model_inputs(model, piece, loss.batch_keys, real)
    outputs = forward(model, variables, inputs, loss.detach_mtp)
    if real is not None:
        outputs = only_of(outputs, real)
    with jax.named_scope("loss"):
        return StepSums(*loss(outputs, inputs, whole), expert_load(outputs))


def _accumulate(
    grad: Callable[..., Any], params: Any, batch: Batch, microbatches: int, sequences: jax.Array | None = None
) -> tuple[Any, StepSums]:
    """Sums gradients and loss sums over pieces of the batch, one piece in memory at a time, in float32 or wider."""

    def of_piece(*piece: Any) -> tuple[Any, StepSums]:
        wide: Any = jax.tree.map(lambda x: x.astype(jnp.promote_types(x, jnp.float32)), grad(params, *piece))
        return cast(tuple[Any, StepSums], wide)

    def add(total: Any, *piece: Any) -> tuple[Any, StepSums]:
        return cast(tuple[Any, StepSums], jax.tree.map(jnp.add, total, of_piece(*piece)))

    if microbatches == 1 and sequences is None:
        return of_piece(batch)
    pieces = _cut(batch, microbatches)
    first = jax.tree.map(lambda x: x[0], pieces)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_piece, first))
    if sequences is None:
        total: tuple[Any, StepSums] = jax.lax.scan(lambda total, piece: (add(total, piece), None), zeros, pieces)[0]
        return total
    row = jnp.arange(batch["tokens"].shape[0]).reshape(microbatches, -1)

    def add_piece(i: jax.Array, total: Any) -> Any:
        piece, rows = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (pieces, row))
        return add(total, piece, rows < sequences)

    return cast(tuple[Any, StepSums], jax.lax.fori_loop(0, -(-sequences // row.shape[1]), add_piece, zeros))


def _cut(batch: Batch, microbatches: int) -> dict[str, jax.Array]:
    return {name: x.reshape(microbatches, -1, *x.shape[1:]) for name, x in batch.items()}


@jax.named_scope("router_bias")
def update_bias(router: Any, load: dict[str, jax.Array], speed: jax.Array) -> Any:
    """Balancing without auxiliary loss (section 2.1.2): up by `speed` where an expert got too little, else down.

    Args:
      router: the `router` collection; its leaves are (..., E) float32.
      load: tokens that the whole batch sent to each expert, keyed by the collection's first level.
    """
    return {
        name: jax.tree.map(lambda b, n=load[name]: b + speed * jnp.sign(n.mean(-1, keepdims=True) - n), branch)
        for name, branch in router.items()
    }


def make_eval_step(model: DeepSeekV3, loss: Loss) -> Callable[[TrainState, Batch], StepSums]:
    """Builds the pure `eval_step(state, batch) -> StepSums`; those of several batches add up leaf by leaf."""
    return lambda state, batch: _sums(model, loss, state.variables, batch, _whole(state, batch))
