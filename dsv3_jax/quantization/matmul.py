"""Layers that multiply in FP8, forward and backward, and save activations in FP8 (report section 3.3).

The gradient of a weight is float32 and goes to its master, which the matmuls themselves never read. The backward pass
reads the saved activations, in tiles of 1 x 128, and quantises them again in tiles of 128 x 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.quantization.e5m6 import quantise_e5m6
from dsv3_jax.quantization.fp8 import dequantise_blocks, dequantise_tiles
from dsv3_jax.quantization.products import gate_and_up, multiply, weight_gradient
from dsv3_jax.quantization.recipe import Quantised, Recipe
from pallas_kernels.fp8_quantise import ALIGNMENT

Keep = Callable[[jax.Array], jax.Array]


@struct.dataclass
class QuantisedWeight:
    """A weight in FP8 blocks.

    values: e4m3 (*stack, *I, *O), input axes first. scales: (*stack, ceil(|I| / 128), ceil(|O| / 128)) float32. Both
      are None of a weight that is only held transposed.
    master: the weight before quantisation, which receives the gradient; None if the weight is stored in FP8.
    turned: the same values and scales transposed, (*stack, |O|, |I|), for Fprop, or None: then it transposes them.
    recipe: how it multiplies. contract: the number of axes in I. axes: (*I, *O), if it is only held transposed.
    """

    values: jax.Array | None
    scales: jax.Array | None
    master: jax.Array | None
    turned: Quantised | None = None
    recipe: Recipe = struct.field(pytree_node=False, default=Recipe())
    contract: int = struct.field(pytree_node=False, default=1)
    axes: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @classmethod
    def of(
        cls, w: jax.Array, recipe: Recipe, *, contract: int = 1, stack: int = 0, turned: bool = False
    ) -> QuantisedWeight:
        """Quantises a weight (*stack, *I, *O), where `contract` axes are in I and `stack` axes index matrices.

        turned: whether to transpose it, too, where `Recipe.matrices_and_turned` does.
        """
        axes = w.shape[stack:]
        matrices = w.reshape(*w.shape[:stack], math.prod(axes[:contract]), math.prod(axes[contract:]))
        matrices = jax.lax.stop_gradient(matrices)
        (values, scales), other = recipe.matrices_and_turned(matrices) if turned else (recipe.matrices(matrices), None)
        return cls(values.reshape(w.shape), scales, w, other, recipe, contract)

    @property
    def shape(self) -> tuple[int, ...]:
        if self.values is not None:
            return self.values.shape
        assert self.turned is not None
        return (*self.turned[0].shape[:-2], *self.axes)

    @property
    def stack(self) -> int:
        """The number of axes that index matrices."""
        scales = self.scales if self.turned is None else self.turned[1]
        assert scales is not None
        return scales.ndim - 2

    def __len__(self) -> int:
        return self.shape[0]

    def dequantise(self, dtype: Any) -> jax.Array:
        """Returns the weight in `dtype`. Its gradient goes to the master unchanged."""
        w = _Operands.of(self.matrix())
        values, scales = w.blocks or jax.tree.map(lambda a: a.mT, w.turned)
        return _dequantise(dtype, w.master, values, scales).reshape(self.shape)

    def matrix(self) -> QuantisedWeight:
        """The same, of shape (*stack, |I|, |O|)."""
        values, master = (None if a is None else a.reshape(self.matrix_shape) for a in (self.values, self.master))
        axes = self.matrix_shape[-2:]
        return QuantisedWeight(values, self.scales, master, self.turned, self.recipe, axes=axes)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(*stack, |I|, |O|)."""
        stack, axes = self.shape[: self.stack], self.shape[self.stack :]
        return (*stack, math.prod(axes[: self.contract]), math.prod(axes[self.contract :]))


class _Operands(NamedTuple):
    """The arrays of a weight, or their cotangents, which only the master has."""

    master: jax.Array | None
    blocks: Any = None
    turned: Quantised | None = None

    @classmethod
    def of(cls, w: QuantisedWeight) -> _Operands:
        return cls(w.master, None if w.values is None else (w.values, w.scales), w.turned)

    def for_gradient(self) -> _Operands:
        """Without what Dgrad doesn't need."""
        return _Operands(None, self.blocks, self.turned if self.blocks is None else None)


class _How(NamedTuple):
    recipe: Recipe
    power_of_two: bool
    keep: Keep
    e5m6: bool = False


def linear(x: jax.Array, w: QuantisedWeight, *, after_attention: bool = False, keep: Keep = lambda a: a) -> jax.Array:
    """Multiplies x (M, K) with a matrix (K, N): (M, N) of `x`'s dtype.

    Args:
      after_attention: whether the scales of x are powers of two, so that requantising from tiles of 1 x 128 to 128 x 1
        is exact, and x is saved in the recipe's `attention_output`.
      keep: applied to the saved form of x, to name it for a rematerialisation policy.
    """
    e5m6 = after_attention and w.recipe.attention_output == "e5m6"
    rows = len(x)
    return _linear(_How(w.recipe, after_attention, keep, e5m6), _whole(x, w.recipe), _Operands.of(w))[:rows]


def _whole(x: jax.Array, recipe: Recipe) -> jax.Array:
    """Rows filled up with zeros to a multiple of 8, as kernels take them: once, for all that they do."""
    return jnp.pad(x, ((0, -len(x) % ALIGNMENT), (0, 0))) if recipe.implementation == "gpu" else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(how: _How, x: jax.Array, w: _Operands) -> jax.Array:
    return _linear_forward(how, x, w)[0]


def _linear_forward(how: _How, x: jax.Array, w: _Operands) -> tuple[jax.Array, tuple[Any, ...]]:
    wide = quantise_e5m6(x) if how.e5m6 else None
    rows = how.recipe.rows(dequantise_tiles(*wide, dtype=x.dtype) if wide else x, power_of_two=how.power_of_two)
    y = _forward(how, rows, w).astype(x.dtype)
    return y, (tuple(map(how.keep, wide or rows)), w.for_gradient(), _like(x), _like(w.master))


def _linear_backward(how: _How, saved: tuple[Any, ...], dy: jax.Array) -> tuple[Any, ...]:
    (values, scales), w, like_x, like = saved
    dy_rows, dy_columns = _of_gradient(how, dy, like)
    dx = _backward(how, dy_rows, w)
    x = dequantise_tiles(values, scales, dtype=like_x.dtype) if how.e5m6 else (values, scales)
    x_columns = how.recipe.columns(x, power_of_two=how.power_of_two)
    return dx.astype(like_x.dtype), _Operands(_of_master(how, x_columns, dy_columns, w, like))


_linear.defvjp(_linear_forward, _linear_backward)


def swiglu(
    x: jax.Array,
    gate: QuantisedWeight,
    up: QuantisedWeight,
    down: QuantisedWeight,
    group_sizes: jax.Array | None = None,
    *,
    keep: Keep = lambda a: a,
) -> jax.Array:
    """Computes down(silu(gate(x)) * up(x)): x (M, D) -> (M, D) of its dtype.

    Saves x and the outputs of gate and up in FP8; the backward pass recomputes their product (report section 3.3.3).

    Args:
      gate, up: (D, F), or (G, D, F) with groups. down: (..., F, D).
      group_sizes: (G,) int32, rows of each expert. Rows after the last group give zero.
      keep: applied to the saved outputs of gate and up.
    """
    how, rows = _How(gate.recipe, group_sizes is not None, keep), len(x)
    x = _whole(x, gate.recipe)
    return _swiglu(how, x, tuple(map(_Operands.of, (gate, up, down))), group_sizes)[:rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(how: _How, x: jax.Array, weights: tuple[_Operands, ...], group_sizes: jax.Array | None) -> jax.Array:
    gate, up, down = weights
    rows = how.recipe.rows(x, power_of_two=how.power_of_two)
    if how.recipe.implementation == "emulation" or gate.turned is None or up.turned is None:
        # The emulation's products are float32, and the result alone is rounded, as by the kernel for few rows. Other
        # kernels round both products to bfloat16, and so does a forward pass that saves them for a gradient.
        g, u = (_forward(how, rows, w, group_sizes).astype(jnp.float32) for w in (gate, up))
        hidden = jax.nn.silu(g) * u
    else:
        hidden = gate_and_up(how.recipe, rows, gate.turned, up.turned, group_sizes)
    return _forward(how, how.recipe.rows(hidden.astype(x.dtype)), down, group_sizes).astype(x.dtype)


def _swiglu_forward(
    how: _How, x: jax.Array, weights: tuple[_Operands, ...], group_sizes: jax.Array | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    gate, up, down = weights
    rows = how.recipe.rows(x, power_of_two=how.power_of_two)

    def product(rows: Quantised, w: _Operands) -> jax.Array:
        return _forward(how, rows, w, group_sizes).astype(x.dtype)

    g, u = product(rows, gate), product(rows, up)
    y = product(how.recipe.rows(jax.nn.silu(g) * u), down)
    saved = tuple(tuple(map(how.keep, how.recipe.rows(a))) for a in (g, u))
    masters = tuple(_like(w.master) for w in weights)
    return y, (rows, saved, tuple(w.for_gradient() for w in weights), masters, group_sizes, _like(x))


def _swiglu_backward(how: _How, residuals: tuple[Any, ...], dy: jax.Array) -> tuple[Any, ...]:
    rows, (g, u), (gate, up, down), likes, group_sizes, like_x = residuals
    g, u = (dequantise_tiles(*a).astype(like_x.dtype) for a in (g, u))
    hidden, undo = jax.vjp(lambda g, u: jax.nn.silu(g) * u, g, u)

    def back(dy: jax.Array, w: _Operands, like: Any) -> tuple[jax.Array, Quantised | None]:
        dy_rows, dy_columns = _of_gradient(how, dy, like, group_sizes)
        return _backward(how, dy_rows, w, group_sizes), dy_columns

    d_hidden, of_down = back(dy, down, likes[2])
    d_gate, d_up = undo(d_hidden.astype(hidden.dtype))
    (dx_gate, of_gate), (dx_up, of_up) = back(d_gate, gate, likes[0]), back(d_up, up, likes[1])
    x_columns = how.recipe.columns(rows, group_sizes, power_of_two=how.power_of_two)
    hidden_columns = how.recipe.columns(hidden, group_sizes)
    products = ((x_columns, of_gate, gate), (x_columns, of_up, up), (hidden_columns, of_down, down))
    gradients = [_of_master(how, *p, like, group_sizes) for p, like in zip(products, likes, strict=True)]
    dx = dx_gate.astype(jnp.float32) + dx_up
    return dx.astype(like_x.dtype), tuple(map(_Operands, gradients)), None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _forward(how: _How, rows: Quantised, w: _Operands, group_sizes: jax.Array | None = None) -> jax.Array:
    if w.turned is None:
        return multiply(how.recipe, rows, w.blocks, group_sizes)
    return multiply(how.recipe, rows, w.turned, group_sizes, transposed=True)


def _backward(how: _How, dy_rows: Quantised, w: _Operands, group_sizes: jax.Array | None = None) -> jax.Array:
    if w.turned is None:
        return multiply(how.recipe, dy_rows, w.blocks, group_sizes, transposed=True)
    return multiply(how.recipe, dy_rows, w.turned, group_sizes)


def _of_gradient(
    how: _How, dy: jax.Array, like: Any, group_sizes: jax.Array | None = None
) -> tuple[Quantised, Quantised | None]:
    """Quantises a cotangent for Dgrad and, if the weight has a gradient, for Wgrad."""
    if like is None:
        return how.recipe.rows(dy, gradient=True), None
    return how.recipe.rows_and_columns(dy, group_sizes, gradient=True)


def _of_master(
    how: _How,
    x_columns: Quantised,
    dy_columns: Quantised | None,
    w: _Operands,
    like: Any,
    group_sizes: jax.Array | None = None,
) -> jax.Array | None:
    if dy_columns is None:
        return None
    depth, columns = w.blocks[0].shape[-2:]
    return weight_gradient(how.recipe, x_columns, dy_columns, (depth, columns), group_sizes).astype(like.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dequantise(dtype: Any, master: Any, values: jax.Array, scales: jax.Array) -> jax.Array:
    return dequantise_blocks(values, scales, dtype=dtype)


_dequantise.defvjp(
    lambda dtype, master, values, scales: (_dequantise(dtype, master, values, scales), _like(master)),
    lambda dtype, like, g: (None if like is None else g.astype(like.dtype), None, None),
)


def _like(x: Any) -> Any:
    """Returns an empty array of the dtype of x, which is all that the backward pass needs of it."""
    return None if x is None else jnp.zeros((0,), x.dtype)
