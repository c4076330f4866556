"""Gradients of the training objective with sparse layers sharded over the stages of a pipeline.

The first stage also has the embedding and the dense layers, the last one the head, the MTP modules and the loss; the
parameters of these are on every stage.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from dsv3_jax.config import ConfigError
from dsv3_jax.model.block import Block
from dsv3_jax.model.module import keys
from dsv3_jax.model.remat import rematerialise
from dsv3_jax.model.router import ROUTER, RouterStats
from dsv3_jax.model.transformer import DeepSeekV3, Outputs, exchanges, expert_load, parameter_axes
from dsv3_jax.parallel.pipeline import layers_of_stages, pipeline_gradients, take_stage
from dsv3_jax.parallel.sharding import Logical, current_sharding, only
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import Batch, Loss, StepSums, Whole, model_inputs

SPARSE = "moe_layers"


def pipeline_stages(model: DeepSeekV3) -> int:
    """Number of stages of the current mesh, if the runtime's rules shard layers over them; else 1."""
    return current_sharding(model.runtime).size("layers")


def pipelined_gradients(
    model: DeepSeekV3, variables: Mapping[str, Any], pieces: Batch, loss: Loss, whole: Whole
) -> tuple[Any, StepSums]:
    """Computes gradients of the objective with respect to the parameters, and the sums of the whole batch.

    Args:
      variables: the model's two collections.
      pieces: the batch with a leading axis of microbatches.
      whole: of the whole batch.

    Raises ConfigError if there are fewer sparse layers than stages, or the batch says which experts its tokens go to.
    """
    if "experts" in pieces:
        raise ConfigError("a batch has 'experts', which the stages of a pipeline don't replay: leave mesh.stage at 1")
    config, stages = model.config, pipeline_stages(model)
    stored, axes = current_sharding(model.runtime).stored(), parameter_axes(model)
    # Inside the pipeline a stage's parameters are whole.
    runtime = dataclasses.replace(
        model.runtime, sharding_overrides=(*model.runtime.sharding_overrides, "embed=", "zero=")
    )
    model = DeepSeekV3(config, runtime)
    if not config.num_moe_layers:
        raise ConfigError("mesh.stage spreads sparse layers, but the model has none")
    layers = layers_of_stages(config.num_moe_layers, stages)  # (S, most)
    split = runtime.pipeline == "zero_bubble"

    shared = dict(variables["params"])
    own = shared.pop(SPARSE)
    names = jax.tree_util.tree_map_with_path(lambda path, _: axes[SPARSE, *keys(path)], own)
    router = dict(variables[ROUTER])
    bias = jax.tree.map(lambda a: jnp.take(a, layers, axis=0, mode="fill", fill_value=0), router.pop(SPARSE, {}))

    def take(parts: Any) -> Any:
        def of(part: jax.Array, logical: Logical) -> jax.Array:
            cut = (logical.index("embed"), stored.axes("embed")) if "embed" in logical else None
            return take_stage(part, layers, cut)

        stack = jax.tree.map(of, parts, names)
        return tuple(jax.tree.map(lambda a, i=i: a[i], stack) for i in range(layers.shape[1])) if split else stack

    exists = jnp.asarray(layers < config.num_moe_layers)
    block = rematerialise(Block, runtime)(config, runtime, is_moe=True)

    everywhere = (layers < config.num_moe_layers).all(0)  # of the layers of a stage, those that every stage has
    # What the two ends do besides is computed again, so that other stages keep nothing of it but its input.
    again = jax.checkpoint if split else lambda f: f

    def sparse_layers(
        own: Any, bias: Any, exists: jax.Array, x: jax.Array, index: Any
    ) -> tuple[jax.Array, RouterStats]:
        def run(x: jax.Array, params: Any, bias: Any) -> tuple[jax.Array, RouterStats]:
            y, (_, stats) = cast(Any, block.apply({"params": params, ROUTER: bias}, x, index, None))
            return y, stats

        def layer(x: jax.Array, of: Any) -> tuple[jax.Array, RouterStats]:
            *weights, there = of
            none = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run, x, *weights)[1])
            return cast(tuple[jax.Array, RouterStats], lax.cond(there, run, lambda x, *_: (x, none), x, *weights))

        if not split:
            return lax.scan(layer, x, (own, bias, exists))
        # One by one, so that each one's backward pass can be cut in two.
        routing = []
        for i, weights in enumerate(own):
            of = weights, jax.tree.map(lambda a, i=i: a[i], bias)
            x, stats = run(x, *of) if everywhere[i] else jax.checkpoint(layer)(x, (*of, exists[i]))
            routing.append(stats)
        return x, jax.tree.map(lambda *stats: jnp.stack(stats), *routing)

    def on_stage(
        own: Any, shared: Any, x: jax.Array, piece: Batch, constants: Any, stage: jax.Array
    ) -> tuple[jax.Array, jax.Array, StepSums, jax.Array]:
        (bias, exists), (router, whole) = constants
        apply = functools.partial(model.apply, {"params": shared, ROUTER: router})
        inputs = model_inputs(model, piece, loss.batch_keys)
        embed = lambda: apply(inputs.tokens, method="first_stage", **inputs.where)
        x = again(lambda x: lax.cond(stage == 0, embed, lambda: x))(x)
        x, stats = sparse_layers(own, bias, exists, x, model.token_positions(inputs.tokens, **inputs.where))

        def of(outputs: Outputs) -> StepSums:
            with jax.named_scope("loss"):
                objective, sums = loss(outputs, inputs, whole)
            load = {k: v for k, v in expert_load(outputs).items() if k != SPARSE}
            return StepSums(objective, sums, load, exchanges(outputs))

        how = inputs.where | {"detach_mtp": loss.detach_mtp}
        last_stage = lambda x: of(cast(Any, apply)(x, inputs.further_tokens, method="last_stage", **how))
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(last_stage, x))
        total = again(lambda x: lax.cond(stage == stages - 1, last_stage, lambda _: nothing, x))(x)
        here = of(Outputs(None, (), stats, ()))
        total = total.replace(
            objective=total.objective + here.objective,
            loss=jax.tree.map(jnp.add, total.loss, here.loss),
            exchanges=total.exchanges + here.exchanges,
        )
        return x, total.objective, total, jnp.sum(stats.load, axis=-2)

    sharding = current_sharding(runtime)
    batch, parts = sharding.axes("batch"), sharding.size("batch")
    by_xla = {a for name in ("sequence", "vocab", "heads", "ffn", "expert_ffn") for a in sharding.axes(name)}
    if len(by_xla) > 1:  # which abort XLA's partitioner
        names = " and ".join(f"mesh.{axis}" for axis in sorted(by_xla))
        raise ConfigError(f"{names} can't both be combined with mesh.stage: choose one of them")
    held = sharding.all_but(by_xla)
    sequences, length = pieces["tokens"].shape[1:]
    d_own, d_shared, sums, load = pipeline_gradients(
        on_stage,
        own,
        shared,
        pieces,
        ((bias, exists), (router, whole)),
        take=take,
        dtypes=jax.tree.map(
            lambda a, logical: runtime.dtype if "experts" in logical and runtime.precision == "dtype" else a.dtype,
            own,
            names,
        ),
        stages=stages,
        specs=(
            jax.tree.map(
                lambda a, logical: only(stored.spec("a layer's parameter", a.shape, logical), held), own, names
            ),
            _specs(shared, runtime, axes),
        ),
        batch=batch,
        activation=jax.ShapeDtypeStruct((sequences // parts, length, config.hidden_size), jnp.dtype(runtime.dtype)),
        schedule=runtime.pipeline,
        held=held,
    )
    place = np.argsort(layers, axis=None, kind="stable")[: config.num_moe_layers]
    sparse_load = load.reshape(-1, load.shape[-1])[place]
    return d_shared | {SPARSE: d_own}, sums.replace(load=sums.load | {SPARSE: sparse_load})


def _specs(shared: Any, runtime: Runtime, axes: Mapping[tuple[str, ...], Logical]) -> Any:
    """Returns PartitionSpecs of the parameters that every stage has: replicated, except for experts."""
    sharding = current_sharding(runtime)

    def spec(path: Any, a: jax.Array) -> PartitionSpec:
        logical = tuple(name if name == "experts" else None for name in axes[keys(path)])
        return sharding.spec(jax.tree_util.keystr(path), a.shape, logical)

    return jax.tree_util.tree_map_with_path(spec, shared)
