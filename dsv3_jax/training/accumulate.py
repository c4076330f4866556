"""Gradients of a batch as float32 sums: over its tokens, its microbatches, and the devices that share it.

Devices with sequences of their own that hold the same parameter add its gradient up once a step, after the last
microbatch. What cuts a parameter further (FSDP, experts) takes its gradient apart in each microbatch, as it put the
parameter together. Over `tensor`, and over all axes with others whose devices share sequences, XLA places the sums.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from dsv3_jax.config import ConfigError
from dsv3_jax.model.module import keys
from dsv3_jax.model.router import ROUTER
from dsv3_jax.model.transformer import DeepSeekV3, exchanges, expert_load, only_of, parameter_axes
from dsv3_jax.parallel.sharding import current_sharding, only
from dsv3_jax.quantization.fp8 import TILE
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import Batch, Loss, StepSums, Whole, forward, model_inputs


def accumulated_gradients(
    model: DeepSeekV3,
    loss: Loss,
    variables: Mapping[str, Any],
    batch: Batch,
    microbatches: int,
    whole: Whole,
    sequences: jax.Array | None = None,
) -> tuple[Any, StepSums]:
    """Computes gradients of the objective with respect to the parameters, and the sums of the whole batch, in float32
    or wider.

    variables: the model's two collections. microbatches, sequences: see `make_train_step`.
    """

    def of_pieces(params: Any, router: Any, pieces: Any, whole: Whole, sequences: Any) -> tuple[Any, StepSums]:
        def objective(params: Any, piece: Batch, row: jax.Array) -> tuple[jax.Array, StepSums]:
            real = None if sequences is None else row < sequences
            sums = batch_sums(model, loss, {"params": params, ROUTER: router}, piece, whole, real)
            return sums.objective, sums

        grad = functools.partial(jax.grad(objective, has_aux=True), params)
        sums: tuple[Any, StepSums] = sum_over_pieces(grad, pieces, None if sequences is None else -(-sequences // size))
        return sums

    size = batch["tokens"].shape[0] // microbatches
    rows = jnp.arange(microbatches * size).reshape(microbatches, size)
    arguments = (
        variables["params"],
        variables.get(ROUTER, {}),
        (cut_batch(model.runtime, batch, microbatches), rows),
        whole,
        sequences,
    )
    sharding = current_sharding(model.runtime)
    axes = sharding.axes("batch")
    rest = set(sharding.automatic) - set(axes)
    cuts_blocks = model.runtime.precision == "fp8" and _cuts_blocks(model, variables["params"])
    # Several axes that a `shard_map` leaves to XLA can abort its partitioner.
    if not axes or not rest <= {"tensor"} or cuts_blocks:
        return of_pieces(*arguments)

    def on_device(*arguments: Any) -> tuple[Any, StepSums]:
        grads, sums = of_pieces(*arguments)
        return jax.tree.map(functools.partial(_add_up, model, axes), grads, specs), lax.psum(sums, axes)

    held = sharding.all_but(rest)
    specs, whole_array = parameter_specs(model, variables["params"], held), PartitionSpec()
    takes = (specs, whole_array, PartitionSpec(None, axes), whole_array, whole_array)
    run = jax.shard_map(on_device, in_specs=takes, out_specs=(specs, whole_array), axis_names=held, check_vma=False)
    return run(*arguments)


def _cuts_blocks(model: DeepSeekV3, params: Any) -> bool:
    """Whether FP8 weights are stored in parts that end within a block: then XLA puts them together."""
    parts, axes = current_sharding(model.runtime).stored().size("embed"), parameter_axes(model)
    paths = jax.tree_util.tree_leaves_with_path(params)
    cut = (a.shape[i] for path, a in paths for i, name in enumerate(axes[keys(path)]) if name == "embed")
    return parts > 1 and any(n % (parts * TILE) for n in cut)


def parameter_specs(model: DeepSeekV3, params: Any, held: frozenset[str]) -> Any:
    """How the parameters are stored over the mesh axes `held`: a PartitionSpec for each."""
    stored, axes = current_sharding(model.runtime).stored(), parameter_axes(model)

    def spec(path: Any, a: jax.Array) -> PartitionSpec:
        return only(stored.spec(jax.tree_util.keystr(path), a.shape, axes[keys(path)]), held)

    return jax.tree_util.tree_map_with_path(spec, params)


def _add_up(model: DeepSeekV3, axes: tuple[str, ...], gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Sums a gradient over the devices with other sequences that hold the same part of the parameter."""
    same = tuple(a for a in axes if a not in jax.tree.leaves(tuple(spec)))
    lowered = gradient.astype(model.runtime.gradient_dtype) if model.runtime.gradient_dtype == "bfloat16" else gradient
    return lax.psum(lowered, same).astype(gradient.dtype) if same else gradient


def cut_batch(runtime: Runtime, batch: Batch, microbatches: int) -> dict[str, jax.Array]:
    """Adds a leading axis of microbatches to a batch, each sharded over devices like the batch.

    Raises ConfigError if they don't divide over the devices.
    """
    sharding = current_sharding(runtime)
    axes, parts, size = sharding.axes("batch"), sharding.size("batch"), len(batch["tokens"]) // microbatches
    if size % parts:
        raise ConfigError(f"a microbatch of {size} sequences doesn't divide over {' x '.join(axes)} = {parts}")

    def cut(x: jax.Array) -> jax.Array:
        return sharding.constrain(x.reshape(microbatches, size, *x.shape[1:]), None, "batch", *(None,) * (x.ndim - 1))

    return {name: jax.tree.map(cut, x) for name, x in batch.items()}


def evaluated_sums(
    model: DeepSeekV3, loss: Loss, variables: Mapping[str, Any], batch: Batch, microbatches: int, whole: Whole
) -> StepSums:
    """Sums over the whole batch in float32 or wider, one microbatch at a time."""
    pieces = cut_batch(model.runtime, batch, microbatches), jnp.zeros((microbatches, 0))
    sums: StepSums = sum_over_pieces(lambda piece, _: batch_sums(model, loss, variables, piece, whole), pieces, None)
    return sums


def batch_sums(
    model: DeepSeekV3,
    loss: Loss,
    variables: Mapping[str, Any],
    piece: Batch,
    whole: Whole,
    real: jax.Array | None = None,
) -> StepSums:
    """Runs the model on a piece of the batch and applies the loss. `real`: see `model_inputs`."""
    inputs = model_inputs(model, piece, loss.batch_keys, real)
    outputs = forward(model, variables, inputs, loss.detach_mtp)
    sent = exchanges(outputs)  # padding is sent, too
    if real is not None:
        outputs = only_of(outputs, real)
    with jax.named_scope("loss"):
        return StepSums(*loss(outputs, inputs, whole), expert_load(outputs), sent)


def sum_over_pieces(function: Any, pieces: tuple[dict[str, jax.Array], jax.Array], count: jax.Array | None) -> Any:
    """Sums `function(piece, rows)` over microbatches, one at a time, in float32 or wider.

    count: the number of microbatches to compute; by default all.
    """

    def of_piece(*piece: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x, jnp.float32)), function(*piece))

    first = jax.tree.map(lambda x: x[0], pieces)
    if len(pieces[1]) == 1 and count is None:
        return of_piece(*first)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_piece, *first))

    def add(total: Any, piece: Any) -> Any:
        return jax.tree.map(jnp.add, total, of_piece(*piece))

    if count is None:
        return lax.scan(lambda total, piece: (add(total, piece), None), zeros, pieces)[0]

    def at(i: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[i], pieces)

    total: Any = lax.fori_loop(0, count, lambda i, total: add(total, at(i)), zeros)
    return total
