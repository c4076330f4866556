"""Diagnosis of non-finite numbers: finds the first part of the model where they occur, after too many skipped steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsv3_jax.model.block import Block
from dsv3_jax.model.router import ROUTER
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.training.losses import Batch, Loss, model_inputs
from dsv3_jax.training.step import TrainState, make_eval_step, make_train_step

_STACKS = ("dense_layers", "moe_layers")
_LOSS = "the head or the loss"


def make_forward_check(model: DeepSeekV3, loss: Loss) -> Callable[[TrainState, Batch], dict[str, jax.Array]]:
    """Builds `check(state, batch)`: whether the outputs of each part of the model are finite, in order.

    (L,) bool for a stack of layers, otherwise a scalar.
    """

    def check(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        inputs = model_inputs(model, batch)
        index = model.token_positions(inputs.tokens, **inputs.where)
        x: Any = model.apply(state.variables, inputs.tokens, method="_embed")
        found = {"embed_tokens": _finite(x)}
        for name in _STACKS:
            if name not in state.params:
                continue
            block = Block(model.config, model.runtime, is_moe=name == "moe_layers")

            def layer(x: jax.Array, weights: Any, block: Block = block) -> tuple[jax.Array, jax.Array]:
                params, router = weights
                y, _ = block.apply({"params": params, ROUTER: router}, x, index, None)
                return y, _finite(y)

            x, found[name] = jax.lax.scan(layer, x, (state.params[name], state.router.get(name, {})))
        sums = make_eval_step(model, loss)(state, batch)
        return found | {_LOSS: jnp.isfinite(sums.objective)}

    return check


def make_gradient_check(model: DeepSeekV3, loss: Loss, microbatches: int) -> Callable[..., dict[str, jax.Array]]:
    """Builds `check(state, batch)`: whether the gradient of each parameter is finite; (L,) for a stack."""

    def check(state: TrainState, *batch: Any) -> dict[str, jax.Array]:
        def record(grads: Any, _: Any, params: Any = None) -> tuple[Any, Any]:
            flags = jax.tree_util.tree_map_with_path(
                lambda path, g: _finite(g, keep=1 if path[0].key in _STACKS else 0), grads
            )
            return jax.tree.map(jnp.zeros_like, grads), flags

        recorder = optax.GradientTransformation(lambda params: (), record)
        step = make_train_step(model, recorder, loss, microbatches=microbatches, skip_non_finite=False)
        after, _ = step(dataclasses.replace(state, opt_state=()), *batch)
        leaves = jax.tree_util.tree_leaves_with_path(after.opt_state)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}

    return check


def _finite(x: jax.Array, keep: int = 0) -> jax.Array:
    return jnp.isfinite(x).all(axis=tuple(range(keep, x.ndim)))


def first_in_forward(found: dict[str, Any]) -> str | None:
    """Names the first part of the model whose outputs aren't finite, or None."""
    order = sorted(found, key=lambda name: ("embed_tokens", *_STACKS, _LOSS).index(name))
    for name in order:
        bad = np.flatnonzero(~np.atleast_1d(np.asarray(found[name])))
        if bad.size:
            return f"layer {name}/{bad[0]}" if name in _STACKS else name
    return None


def first_in_backward(found: dict[str, Any]) -> str | None:
    """Names the parameter nearest to the loss whose gradient isn't finite, or None."""
    place: Callable[[str], int] = lambda name: (
        -1 if name == "embed_tokens" else next((i for i, s in enumerate(_STACKS) if name.startswith(s)), 2)
    )
    worst: tuple[int, int, str] | None = None
    for name, flags in found.items():
        for layer in np.flatnonzero(~np.atleast_1d(np.asarray(flags))):
            stack = name.split("/")[0]
            label = name if stack not in _STACKS else f"{stack}/{layer}/{name.split('/', 1)[1]}"
            candidate = (place(name), int(layer), label)
            worst = candidate if worst is None or candidate[:2] > worst[:2] else worst
    return worst[2] if worst else None
