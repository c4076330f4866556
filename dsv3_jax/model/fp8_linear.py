"""FP8 layers on a mesh: each device quantises and multiplies its part, since XLA can't partition kernels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.sharding import Logical, LogicalSharding, current_sharding
from dsv3_jax.quantization.fp8 import TILE
from dsv3_jax.quantization.matmul import QuantisedWeight
from dsv3_jax.runtime import Runtime

Compute = Callable[..., jax.Array]


def local(compute: Compute, x: jax.Array, w: QuantisedWeight) -> jax.Array:
    """Contracts the last axes of x (..., *I) with w (*I, *O) by `compute`, of matrices: (..., *O)."""
    outputs = w.shape[w.contract :]
    y = compute(x.reshape(-1, math.prod(w.shape[: w.contract])), w.matrix())
    return y.reshape(*x.shape[: x.ndim - w.contract], *outputs)


def linear(
    runtime: Runtime, compute: Compute, x: jax.Array, w: QuantisedWeight, logical: Logical, *, whole_sequence: bool
) -> jax.Array:
    """Applies `local` on the current mesh: x (B, T, *I), w (*I, *O) -> (B, T, *O).

    Raises ConfigError if a mesh axis splits a block of w.
    """
    sharding = current_sharding(runtime).used()
    if sharding.mesh is None or sharding.manual:
        return local(compute, x, w)
    ins, outs = logical[: w.contract], logical[w.contract :]
    partial = tuple(axis for name in ins if name for axis in sharding.axes(name))
    tokens = ("batch", None if whole_sequence else "sequence")
    x_spec = sharding.spec("an activation", x.shape, (*tokens, *ins))
    y_spec = sharding.spec("an activation", (*x.shape[:2], *w.shape[w.contract :]), (*tokens, *outs))

    def on_device(x: jax.Array, w: QuantisedWeight) -> jax.Array:
        y = local(compute, x, w)
        return lax.psum(y, partial) if partial else y

    specs = (x_spec, weight_specs(sharding, w, logical))
    return jax.shard_map(on_device, in_specs=specs, out_specs=y_spec, check_vma=False)(x, w)


def swiglu(
    runtime: Runtime, compute: Compute, x: jax.Array, weights: tuple[QuantisedWeight, QuantisedWeight, QuantisedWeight]
) -> jax.Array:
    """Applies `compute` on the current mesh: x (B, T, D), gate and up (D, F), down (F, D) -> (B, T, D)."""
    sharding = current_sharding(runtime).used()
    flat: Compute = lambda x, *w: compute(x.reshape(-1, x.shape[-1]), *w).reshape(x.shape)
    if sharding.mesh is None or sharding.manual:
        return flat(x, *weights)
    partial = sharding.axes("ffn")
    tokens = sharding.spec("an activation", x.shape, ("batch", "sequence", None))
    into, out = ("embed", "ffn"), ("ffn", "embed")
    specs = [weight_specs(sharding, w, names) for w, names in zip(weights, (into, into, out), strict=True)]
    on_device: Compute = lambda x, *w: lax.psum(flat(x, *w), partial) if partial else flat(x, *w)
    return jax.shard_map(on_device, in_specs=(tokens, *specs), out_specs=tokens, check_vma=False)(x, *weights)


def weight_specs(sharding: LogicalSharding, w: QuantisedWeight, logical: Logical) -> QuantisedWeight:
    """PartitionSpecs of the arrays of a weight; scales are sharded like the first axes of I and O.

    Raises ConfigError if a mesh axis splits a block, as sharding any other axis does.
    """
    spec = sharding.spec("a weight", w.shape, logical)
    stack = w.stack
    heads = [i for i in range(len(spec)) if i <= stack or i == stack + w.contract]
    for i, cut in enumerate(spec):
        parts = sharding.size_left(str(logical[i])) if cut else 1
        inner = math.prod(w.shape[i : stack + w.contract] if i < stack + w.contract else w.shape[i:])
        if i >= stack and parts > 1 and (i not in heads or inner // parts % TILE):
            raise ConfigError(
                f"a weight {w.shape} in FP8 is cut over {cut} within a block: "
                f"{inner} over {parts} devices must be multiples of {TILE}"
            )
    scales = PartitionSpec(*(spec[i] for i in heads))
    specs: Any = dict(values=spec, scales=scales, master=None if w.master is None else spec)
    return dataclasses.replace(w, **specs)


def all_gather_blocks(sharding: LogicalSharding, name: str, w: QuantisedWeight, logical: Logical) -> QuantisedWeight:
    """Prepares a weight for a layer: quantised where it is stored, then all-gathered at one byte per number.

    Raises ConfigError as `weight_specs`, and where a part that is gathered by hand ends within a block.
    """
    if sharding.mesh is None:
        return w
    values, scales, stack = w.values, w.scales, w.stack
    assert values is not None  # on a mesh weights aren't held transposed alone
    for i, axes in sharding.gathered_by_hand(logical):
        inner = math.prod(w.shape[i : stack + w.contract] if i < stack + w.contract else w.shape[i:])
        along = i if i < stack else {stack: stack, stack + w.contract: stack + 1}.get(i)
        if along is None or (i >= stack and inner % TILE):
            raise ConfigError(f"{name} in FP8 is cut over {' x '.join(axes)} within a block of {TILE}")
        values = lax.all_gather(values, axes, axis=i, tiled=True)
        scales = lax.all_gather(scales, axes, axis=along, tiled=True)
    if sharding.automatic:
        state: Compute = jax.lax.with_sharding_constraint
        stored, used = (s.spec(name, values.shape, logical) for s in (sharding.stored(), sharding.used()))
        values = state(state(values, stored), used)
    w = dataclasses.replace(w, values=values, scales=scales)
    if not sharding.manual:
        weight_specs(sharding.used(), w, logical)
    return w
