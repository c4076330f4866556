"""The linear seam: every dense projection of the model goes through `linear`."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3_jax.model.module import Module
from dsv3_jax.parallel.sharding import Logical, current_sharding


def weight(module: Module, name: str, shape: tuple[int, ...], logical: Logical, dtype: Any = None) -> jax.Array:
    """Declares a weight as a parameter of `module`: N(0, initializer_range).

    Args:
      shape: input axes first, then output axes.
      logical: the logical axis of each, or None; see `parallel.rules.Rules`.

    Returns it as it is used: in `dtype`, by default the runtime's, and all-gathered along `embed` (FSDP).
    """
    stored = module.declare(name, nn.initializers.normal(module.config.initializer_range), shape, logical)
    used = stored.astype(dtype or module.runtime.dtype)
    return current_sharding(module.runtime).all_gather_weight(used, name, logical)


def linear(x: jax.Array, w: jax.Array, *, contract: int = 1) -> jax.Array:
    """Contracts the last `contract` axes of `x` with as many first axes of `w`.

    Args:
      x: (..., *I).
      w: (*I, *O): input axes first, the transpose of PyTorch's. Its dtype is what `x` is cast to.
      contract: number of axes in I.

    Returns:
      (..., *O) of `w`'s dtype. One two-dimensional product whatever the axes, so that every weight quantises alike.
    """
    batch = x.shape[: x.ndim - contract]
    inputs, outputs = math.prod(w.shape[:contract]), w.shape[contract:]
    y = _product(x.reshape(*batch, inputs).astype(w.dtype), w.reshape(inputs, -1), False)
    return y.reshape(*batch, *outputs)


def wide_linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """`linear` whose result isn't rounded: (..., I) and (I, O) of one dtype -> (..., O), float32 or wider."""
    return _product(x, w, True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: jax.Array, wide: bool) -> jax.Array:
    """(..., I) @ (I, O), of their dtype or, if `wide`, float32 or wider. The backward pass takes it in `x`'s dtype.

    The gradient of `w`, a sum over all tokens, is float32 until it is whole: left to itself, XLA rounds partial sums to
    bfloat16 on a CPU, where a product runs over several axes.
    """
    return jnp.matmul(x, w, preferred_element_type=_wide(x) if wide else None)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _product_forward(x, w, wide):
    return _product(x, w, wide), (x, w)


def _product_backward(wide, residuals, g):
    x, w = residuals
    g, tokens = g.astype(x.dtype), tuple(range(x.ndim - 1))
    dw = jnp.tensordot(x, g, (tokens, tokens), preferred_element_type=_wide(x))
    return g @ w.T, dw.astype(w.dtype)


_product.defvjp(_product_forward, _product_backward)
