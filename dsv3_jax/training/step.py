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
from dsv3_jax.parallel.dispatch import SLACKS
from dsv3_jax.parallel.sharding import current_sharding
from dsv3_jax.training.accumulate import accumulated_gradients, cut_batch, evaluated_sums
from dsv3_jax.training.losses import (
    Batch,
    Loss,
    Metrics,
    StepSums,
    Whole,
    load_violations,
    predictable,
)
from dsv3_jax.training.pipelined import pipeline_stages, pipelined_gradients


@struct.dataclass
class TrainState:
    """The state of training: a pytree to checkpoint, shard and pass through `train_step`.

    step: int32, steps taken. params, router: the model's two collections. opt_state: optax's. rng: a typed key.
    """

    step: jax.Array
    params: Any
    router: Any
    opt_state: Any
    rng: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """Returns the variables for `model.apply`."""
        return {"params": self.params, ROUTER: self.router}


def init_state(model: DeepSeekV3, optimizer: optax.GradientTransformation, rng: jax.Array) -> TrainState:
    """Returns a state at step 0, from a typed key."""
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

    `sequences`, () int32, is for batch-size ramps, so that one program serves all sizes: the batch then has the largest
    size, only its first `sequences` rows count, and the targets of the others are `IGNORE`. Microbatches of padding are
    skipped.

    Args:
      loss: the objective, such as `PretrainingLoss(model.config, schedule)`.
      microbatches: number of pieces of the batch, which must divide B. Their gradients are accumulated, or they pass
        through the pipeline if the mesh has stages. The result is that of the whole batch: losses, loads and gradients
        are sums over the pieces.
      skip_non_finite: whether a step whose objective or gradient isn't finite changes only `step`, and the optimizer's
        count of steps in the schedule. The metric `skipped` is then 1, else 0.
    """

    def train_step(state: TrainState, batch: Batch, sequences: jax.Array | None = None) -> tuple[TrainState, Metrics]:
        size = batch["tokens"].shape[0]
        if size % microbatches:
            raise ValueError(f"a batch of {size} sequences can't be cut into {microbatches} microbatches")
        whole = _whole(state, batch, sequences)

        if pipeline_stages(model) > 1:
            if sequences is not None:
                raise ValueError("a pipeline takes batches without padding")
            grads, sums = pipelined_gradients(
                model, state.variables, cut_batch(model.runtime, batch, microbatches), loss, whole
            )
        else:
            grads, sums = accumulated_gradients(model, loss, state.variables, batch, microbatches, whole, sequences)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        router = update_bias(state.router, sums.load, loss.bias_update_speed(state.step))
        with jax.named_scope("metrics"):
            metrics = loss.metrics(sums.loss, whole) | load_violations(sums.load)
            metrics |= {"objective": sums.objective, "grad_norm": optax.global_norm(grads)}
            if current_sharding(model.runtime).size("experts") > 1:
                metrics |= dispatch_metrics(sums.exchanges)
        after = (params, router, opt_state)
        if skip_non_finite:
            good = jnp.isfinite(metrics["objective"]) & jnp.isfinite(metrics["grad_norm"])
            metrics["skipped"] = jnp.where(good, 0, 1)
            before = (state.params, state.router, state.opt_state)

            def keep(new: Any, old: Any) -> Any:
                return new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(good, new, old)

            after = jax.tree.map(keep, after, before, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
        return TrainState(state.step + 1, *after, state.rng), metrics

    return train_step


def dispatch_metrics(exchanges: jax.Array) -> Metrics:
    """From `model.transformer.exchanges`: the share in several rounds, and the least of `SLACKS` (or else the largest)
    with which no more than one in a hundred would have been.
    """
    share = exchanges[:-1] / exchanges[-1]
    enough = (share[1:] <= 0.01).at[-1].set(True)
    return {"dispatch_in_rounds": share[0], "dispatch_slack_needed": jnp.array(SLACKS)[jnp.argmax(enough)]}


def _whole(state: TrainState, batch: Batch, sequences: jax.Array | None = None) -> Whole:
    count = jnp.asarray(batch["tokens"].shape[0] if sequences is None else sequences)
    return Whole(state.step, jnp.sum(predictable(batch, 1)), count)


@jax.named_scope("router_bias")
def update_bias(router: Any, load: dict[str, jax.Array], speed: jax.Array) -> Any:
    """Auxiliary-loss-free balancing (section 2.1.2): adds `speed` to the bias of underloaded experts, subtracts it from
    others.

    Args:
      router: the `router` collection; its leaves are (..., E) float32.
      load: tokens of the whole batch sent to each expert, keyed by the collection's first level.
    """
    return {
        name: jax.tree.map(lambda b, n=load[name]: b + speed * jnp.sign(n.mean(-1, keepdims=True) - n), branch)
        for name, branch in router.items()
    }


def make_eval_step(model: DeepSeekV3, loss: Loss, *, microbatches: int = 1) -> Callable[[TrainState, Batch], StepSums]:
    """Builds the pure `eval_step(state, batch) -> StepSums`. The results of several batches add up leaf by leaf.

    microbatches: see `make_train_step`; limits memory to that of a training step.
    """

    def eval_step(state: TrainState, batch: Batch) -> StepSums:
        return evaluated_sums(model, loss, state.variables, batch, microbatches, _whole(state, batch))

    return eval_step
