"""One training step as a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dsv3_jax.model.router import ROUTER
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.training.losses import Batch, Tally, forward_tally, objective, predictable
from dsv3_jax.training.pipelined import pipelined_gradients, stages_in_use
from dsv3_jax.training.schedule import Schedule

Metrics = dict[str, jax.Array]


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
        """What `model.apply` takes."""
        return {"params": self.params, ROUTER: self.router}


def init_state(model: DeepSeekV3, optimizer: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    """A state at step 0, from a typed key."""
    init_rng, rng = jax.random.split(rng)
    variables = model.init(init_rng, jnp.zeros((1, 1), jnp.int32))
    params, router = variables["params"], variables.get(ROUTER, {})
    return TrainState(jnp.zeros((), jnp.int32), params, router, optimizer.init(params), rng)


def make_train_step(
    model: DeepSeekV3, optimizer: optax.GradientTransformation, schedule: Schedule, *, microbatches: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the pure `train_step(state, batch) -> (state, metrics)`; jit it with `donate_argnums=0`.

    Args:
      microbatches: pieces of the batch whose gradients are accumulated one after the other; must divide B. Over
        the stages of a mesh, they are what passes through the pipeline.
        The result is that of the whole batch: losses, loads and gradients are sums over the pieces.
    """
    alpha = model.config.aux_loss_alpha

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        size = batch["tokens"].shape[0]
        if size % microbatches:
            raise ValueError(f"a batch of {size} sequences can't be cut into {microbatches} microbatches")
        mtp_weight = schedule.mtp_weight(state.step)
        totals = jnp.sum(predictable(batch, 1)), jnp.asarray(size)

        def loss(params: Any, piece: Batch) -> tuple[jax.Array, Tally]:
            tally = forward_tally(model, {"params": params, ROUTER: state.router}, piece)
            return objective(tally, alpha, mtp_weight, *totals), tally

        if stages_in_use(model) > 1:
            whole = lambda tally: objective(tally, alpha, mtp_weight, *totals)
            grads, tally = pipelined_gradients(model, state.variables, _cut(batch, microbatches), whole)
        else:
            grads, tally = _accumulate(jax.grad(loss, has_aux=True), state.params, batch, microbatches)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        router = update_bias(state.router, tally.load, schedule.bias_update_speed(state.step))
        metrics = evaluate_tally(tally) | {
            "objective": objective(tally, alpha, mtp_weight, *totals),
            "grad_norm": optax.global_norm(grads),
            "learning_rate": schedule.learning_rate(state.step),
        }
        return TrainState(state.step + 1, params, router, opt_state, state.rng), metrics

    return train_step


def _accumulate(grad: Callable, params: Any, batch: Batch, microbatches: int) -> tuple[Any, Tally]:
    """Sums gradients and tallies over pieces of the batch, one piece in memory at a time, in float32 or wider."""
    of_piece = lambda piece: jax.tree.map(lambda x: x.astype(jnp.promote_types(x, jnp.float32)), grad(params, piece))
    if microbatches == 1:
        return of_piece(batch)
    pieces = _cut(batch, microbatches)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_piece, jax.tree.map(lambda x: x[0], pieces)))
    add = lambda total, piece: (jax.tree.map(jnp.add, total, of_piece(piece)), None)
    return jax.lax.scan(add, zeros, pieces)[0]


def _cut(batch: Batch, microbatches: int) -> dict[str, jax.Array]:
    return {name: x.reshape(microbatches, -1, *x.shape[1:]) for name, x in batch.items()}


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


def evaluate_tally(tally: Tally) -> Metrics:
    """Readable means: losses in nats a predicted token, accuracy, and each layer's load violation, max / mean - 1."""
    metrics = {"loss": tally.cross_entropy / jnp.maximum(tally.tokens, 1)}
    if depths := sum(name.startswith("mtp_") for name in tally.load):
        predicted = jnp.maximum(tally.mtp_tokens, 1)  # of all depths, over which `mtp_cross_entropy` is a mean
        metrics["mtp_loss"] = depths * tally.mtp_cross_entropy / predicted
        metrics["mtp_accuracy"] = tally.mtp_correct / predicted
    if tally.load:
        metrics["balance_loss"] = tally.balance / tally.sequences
    for name, load in tally.load.items():
        metrics[f"load_violation/{name}"] = load.max(-1) / load.mean(-1) - 1
    return metrics


def make_eval_step(model: DeepSeekV3) -> Callable[[TrainState, Batch], Tally]:
    """Builds the pure `eval_step(state, batch) -> Tally`; tallies of several batches add up leaf by leaf."""
    return lambda state, batch: forward_tally(model, state.variables, batch)
