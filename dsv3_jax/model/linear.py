"""The linear seam: one call declares a weight, all-gathers it and multiplies with it.

Every matmul with a weight goes through it: `linear`, `linear_einsum` for matrices per head, `grouped_swiglu` for
experts. They take a `Weight`, whose representation is private to this file, so that a runtime may quantise before the
all-gather. `weight` is for what is never quantised: embedding, head, router.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, TypeGuard, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3_jax.model import fp8_linear
from dsv3_jax.model.auto import fp8_recipe
from dsv3_jax.model.module import Module
from dsv3_jax.model.remat import save_activation
from dsv3_jax.parallel.sharding import Logical, WeightUse, current_sharding
from dsv3_jax.quantization import matmul as fp8
from dsv3_jax.quantization.matmul import QuantisedWeight
from dsv3_jax.quantization.recipe import Quantised, Recipe
from pallas_kernels import grouped_matmul
from pallas_kernels.devices import platform

type Weight = jax.Array | QuantisedWeight
"""A weight ready for matmuls, all-gathered along `embed`: in the runtime's dtype, or in FP8 blocks.

In the first case its array may have a wider dtype, that of its gradient, which matmuls then don't round.
"""


_Saved = tuple[jax.Array, jax.Array, jax.Array]
"""Returns x, w in the dtype of x, and an empty array of w's dtype."""

SCALES = "scales"
"""The Linen collection of the scales of weights stored in FP8 blocks, at the same paths: float32
(*stack, ceil(|I| / 128), ceil(|O| / 128)). If it is absent, weights are stored in the runtime's `param_dtype`."""

TURNED = "turned"
"""The Linen collection of weights held in FP8 blocks as Hopper's kernels multiply them, (*stack, |O|, |I|), at the same
paths, which then aren't in `params`; their scales are transposed, too."""


def turn(values: jax.Array, scales: jax.Array, *, contract: int = 1) -> Quantised:
    """Transposes a weight (*stack, *I, *O), whose I has `contract` axes, and its scales: for `TURNED`."""
    w = QuantisedWeight(values, scales, None, contract=contract).matrix()
    return w.values.mT, w.scales.mT  # type: ignore[union-attr]


def weight(module: Module, name: str, shape: tuple[int, ...], logical: Logical, dtype: Any = None) -> jax.Array:
    """Declares a weight as a parameter of `module`: N(0, initializer_range).

    Args:
      shape: input axes first, then output axes.
      logical: the logical axis of each, or None; see `parallel.rules.Rules`.

    Returns it rounded to `dtype`, by default the runtime's, and all-gathered along `embed` (FSDP). The array has the
    stored dtype if that is wider, so that its gradient isn't rounded.
    """
    stored = module.declare(name, nn.initializers.normal(module.config.initializer_range), shape, logical)
    return _gathered(module, stored, name, logical, dtype or module.runtime.dtype)


def _gathered(module: Module, stored: jax.Array, name: str, logical: Logical, dtype: Any) -> jax.Array:
    # Never narrower than the parameter where the user asked for nothing: float64 stays so.
    least = module.runtime.gradient_dtype
    gradient = least if least == "bfloat16" else jnp.promote_types(stored.dtype, least)
    return current_sharding(module.runtime).all_gather_weight(stored, name, logical, WeightUse(dtype, gradient))


def linear_weight(
    module: Module, name: str, shape: tuple[int, ...], logical: Logical, *, contract: int = 1, stack: int = 0
) -> Weight:
    """Declares a weight as `weight` does, for `multiply`, `weight_einsum` and `grouped_swiglu`.

    In FP8 it is quantised where it is stored and then all-gathered, and its gradient goes to the stored weight. Policy
    `paper` saves the blocks, so that recomputation doesn't quantise again. A weight stored in FP8 blocks is used as it
    is or, if the runtime's precision is `dtype`, dequantised here.

    Args:
      contract: number of axes that matmuls contract. stack: number of leading axes, which index matrices.
    """
    runtime, in_blocks = module.runtime, module.has_variable(SCALES, name)
    if module.has_variable(TURNED, name):
        recipe = fp8_recipe(runtime) if runtime.precision == "fp8" else Recipe()
        turned: Quantised = module.get_variable(TURNED, name), module.get_variable(SCALES, name)
        w = QuantisedWeight(None, None, None, turned, recipe, contract, shape[stack:])
        return w if runtime.precision == "fp8" else w.dequantise(runtime.dtype)
    if runtime.precision != "fp8" and not in_blocks:
        return weight(module, name, shape, logical)
    stored = module.declare(name, nn.initializers.normal(module.config.initializer_range), shape, logical)
    sharding = current_sharding(runtime)
    if in_blocks:
        recipe = fp8_recipe(runtime) if runtime.precision == "fp8" else Recipe()
        w = QuantisedWeight(stored, module.get_variable(SCALES, name), None, recipe=recipe, contract=contract)
    else:
        alone = sharding.mesh is None
        w = QuantisedWeight.of(stored, fp8_recipe(runtime), contract=contract, stack=stack, turned=alone)
        master = _gathered(module, stored, name, logical, stored.dtype)
        values, scales, turned = jax.tree.map(save_activation, (w.values, w.scales, w.turned))
        w = dataclasses.replace(w, values=values, scales=scales, master=master, turned=turned)
    w = fp8_linear.all_gather_blocks(sharding, name, w, logical)
    return w if runtime.precision == "fp8" else w.dequantise(runtime.dtype)


def linear(
    module: Module,
    name: str,
    x: jax.Array,
    shape: tuple[int, ...],
    logical: Logical,
    *,
    contract: int = 1,
    keep_input: bool = False,
    whole_sequence: bool = False,
) -> jax.Array:
    """Declares a weight (*I, *O) of `module` and multiplies x (..., *I) with it: (..., *O) of the runtime's dtype.

    Args:
      shape: of the weight, input axes first: the transpose of PyTorch's.
      logical: the logical axis of each, or None; see `parallel.rules.Rules`.
      contract: number of axes in I.
      keep_input: whether x is attention's output, which policy `paper` saves in `Runtime.fp8_attention_output` if it
        multiplies in FP8.
      whole_sequence: whether every device that shares a sequence has all tokens of x, (B, S, ...).
    """
    with jax.named_scope(name):
        w = linear_weight(module, name, shape, logical, contract=contract)
        if isinstance(w, QuantisedWeight):
            compute = functools.partial(
                fp8.linear, after_attention=keep_input, keep=save_activation if keep_input else _as_is
            )
            return fp8_linear.linear(module.runtime, compute, x, w, logical, whole_sequence=whole_sequence)
        return multiply(x, w, contract=contract)


def swiglu(module: Module, x: jax.Array, width: int) -> jax.Array:
    """Declares gate_proj, up_proj and down_proj and computes down(silu(gate(x)) * up(x)): (B, T, D) -> (B, T, D)."""
    d = x.shape[-1]
    into, out = ((d, width), ("embed", "ffn")), ((width, d), ("ffn", "embed"))
    gate, up, down = (linear_weight(module, n, *w) for n, w in zip(_SWIGLU, (into, into, out), strict=True))
    if _in_blocks(weights := (gate, up, down)):
        return fp8_linear.swiglu(module.runtime, functools.partial(fp8.swiglu, keep=save_activation), x, weights)

    def named(name: str, x: jax.Array, w: Weight) -> jax.Array:
        with jax.named_scope(name):
            return multiply(x, w)

    hidden = jax.nn.silu(save_activation(named("gate_proj", x, gate))) * save_activation(named("up_proj", x, up))
    return named("down_proj", hidden, down)


_SWIGLU = ("gate_proj", "up_proj", "down_proj")


def _in_blocks(weights: tuple[Weight, ...]) -> TypeGuard[tuple[QuantisedWeight, QuantisedWeight, QuantisedWeight]]:
    return all(isinstance(w, QuantisedWeight) for w in weights)


def _as_is(x: jax.Array) -> jax.Array:
    return x


def linear_einsum(
    module: Module, name: str, equation: str, x: jax.Array, shape: tuple[int, ...], logical: Logical
) -> jax.Array:
    """Like `linear`, for an einsum: "bthn,rhn->bthr", for example, maps the output axis of a head back to its input."""
    with jax.named_scope(name):
        w = linear_weight(module, name, shape, logical)
        return weight_einsum(equation, _enough_rows(x, 1), w)[:, : x.shape[1]]


@jax.named_scope("grouped_swiglu")
def grouped_swiglu(
    x: jax.Array,
    gate: Weight,
    up: Weight,
    down: Weight,
    factors: jax.Array,
    group_sizes: jax.Array,
    *,
    implementation: str,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Applies experts to the rows sent to them, (M, D) sorted by expert -> (M, D); see `pallas_kernels.grouped_matmul`.

    Args:
      gate, up: (G, D, F). down: (G, F, D).
      factors: (M, 1) float32, what each row's result is multiplied by.
      group_sizes: (G,) int32, rows of each expert.
      first: () int32, the first expert's place, where the weights are of more experts.
    """
    if _in_blocks(weights := (gate, up, down)):
        return fp8.swiglu(x, *weights, group_sizes, keep=save_activation) * factors
    product = functools.partial(grouped_matmul.grouped_swiglu, implementation=implementation, keep=save_activation)
    gate, up, down = (cast(jax.Array, w).astype(x.dtype) for w in weights)
    y: jax.Array = product(x, gate, up, down, factors, group_sizes, first=first)
    return y


def weight_einsum(equation: str, x: jax.Array, w: Weight) -> jax.Array:
    """`jnp.einsum` of x and a weight, which is dequantised first if it is in FP8."""
    if isinstance(w, QuantisedWeight):
        return jnp.einsum(equation, x, w.dequantise(x.dtype))
    return _einsum(equation, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`jnp.einsum` in the dtype of x, with a float32 gradient of w. Each axis must be in two of the three arrays."""
    return jnp.einsum(equation, x, w.astype(x.dtype))


def _einsum_forward(equation: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, _Saved]:
    return _einsum(equation, x, w), (x, w.astype(x.dtype), jnp.zeros((0,), w.dtype))


def _einsum_backward(equation: str, saved: _Saved, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w, like = saved
    of_x, of_w, of_y = equation.replace("->", ",").split(",")
    dw = jnp.einsum(f"{of_x},{of_y}->{of_w}", x, g, preferred_element_type=_wide(x))
    return jnp.einsum(f"{of_y},{of_w}->{of_x}", g, w), dw.astype(like.dtype)


_einsum.defvjp(_einsum_forward, _einsum_backward)


def multiply(x: jax.Array, w: Weight, *, contract: int = 1) -> jax.Array:
    """Contracts the last `contract` axes of x (..., *I) with as many first axes of w (*I, *O): (..., *O).

    A single two-dimensional matmul in the dtype of x whatever the axes, so that all weights are quantised alike.
    """
    if isinstance(w, QuantisedWeight):
        return fp8_linear.local(fp8.linear, x, w)
    batch = x.shape[: x.ndim - contract]
    inputs, outputs = math.prod(w.shape[:contract]), w.shape[contract:]
    y = _product(x.reshape(*batch, inputs), w.reshape(inputs, -1), False)
    return y.reshape(*batch, *outputs)


def wide_linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """`multiply` without rounding the result: (..., I) and (I, O) -> (..., O), float32 or wider."""
    return _product(x, w, True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: jax.Array, wide: bool) -> jax.Array:
    """(..., I) @ (I, O) in the dtype of x or, if `wide`, float32 or wider. Cotangents are in the dtype of x.

    The gradient of `w`, a sum over all tokens, is accumulated in float32: by default XLA rounds partial sums to
    bfloat16 on a CPU, if a matmul contracts several axes.
    """
    rows = _enough_rows(x, x.ndim - 2) if x.ndim > 1 else x
    y = jnp.matmul(rows, w.astype(x.dtype), preferred_element_type=_wide(x) if wide else None)
    return y if rows is x else y[..., :1, :]


def _enough_rows(x: jax.Array, axis: int) -> jax.Array:
    """Pads x along `axis` if this and all axes before have length 1, on a GPU.

    There XLA multiplies one row with a matrix elementwise, and rounds and stores all products before it sums them:
    three times the bytes of the matrix.
    """
    if platform() != "gpu" or math.prod(x.shape[: axis + 1]) != 1:
        return x
    return jnp.pad(x, [(0, _ROWS - 1 if i == axis else 0) for i in range(x.ndim)])


_ROWS = 16
"""Rows of the least tile of the matrix units."""


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _product_forward(x: jax.Array, w: jax.Array, wide: bool) -> tuple[jax.Array, _Saved]:
    return _product(x, w, wide), (x, w.astype(x.dtype), jnp.zeros((0,), w.dtype))


def _product_backward(wide: bool, saved: _Saved, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w, like = saved
    g, tokens = g.astype(x.dtype), tuple(range(x.ndim - 1))
    dw = jnp.tensordot(x, g, (tokens, tokens), preferred_element_type=_wide(x))
    return g @ w.T, dw.astype(like.dtype)


_product.defvjp(_product_forward, _product_backward)
