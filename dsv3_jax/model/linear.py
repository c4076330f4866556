"""The linear seam: every dense projection of the model goes through `linear`."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3_jax.parallel.rules import in_use


def weight(module: nn.Module, name: str, *shape: int, dtype: Any = None) -> jax.Array:
    """Declares a weight as a parameter of `module`, which has a `config` and a `runtime`: N(0, initializer_range).

    Returns it as it is used: in `dtype`, by default the runtime's, and put together again if it is stored in pieces.
    """
    config, runtime = module.config, module.runtime  # type: ignore[attr-defined]
    init = nn.initializers.normal(config.initializer_range)
    stored = module.param(name, init, shape, jnp.dtype(runtime.param_dtype))
    return in_use(stored.astype(dtype or runtime.dtype), runtime, name)


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
    y = x.reshape(*batch, inputs).astype(w.dtype) @ w.reshape(inputs, -1)
    return y.reshape(*batch, *outputs)


@jax.custom_vjp
def wide_linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """`linear` whose result stays as it was summed up: (..., I) and (I, O) of one dtype -> (..., O), float32 or wider.

    The products of its gradient take the cotangent in `x`'s dtype, as `linear`'s do, and are rounded once.
    """
    return _wide_einsum("...i,io->...o", x, w)


def _wide_linear_forward(x, w):
    return wide_linear(x, w), (x, w)


def _wide_linear_backward(residuals, g):
    x, w = residuals
    g = g.astype(x.dtype)
    dx, dw = (
        _wide_einsum("...o,io->...i", g, w),
        _wide_einsum("ni,no->io", *(a.reshape(-1, a.shape[-1]) for a in (x, g))),
    )
    return dx.astype(x.dtype), dw.astype(w.dtype)


def _wide_einsum(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


wide_linear.defvjp(_wide_linear_forward, _wide_linear_backward)
