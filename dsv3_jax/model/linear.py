"""The linear seam: every dense projection of the model goes through `linear`."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp


def weight(module: nn.Module, name: str, *shape: int) -> jax.Array:
    """Declares a weight as a parameter of `module`, which has a `config` and a `runtime`: N(0, initializer_range)."""
    init = nn.initializers.normal(module.config.initializer_range)  # type: ignore[attr-defined]
    return module.param(name, init, shape, jnp.dtype(module.runtime.param_dtype))  # type: ignore[attr-defined]


def linear(x: jax.Array, w: jax.Array, dtype: str, *, contract: int = 1) -> jax.Array:
    """Contracts the last `contract` axes of `x` with as many first axes of `w`.

    Args:
      x: (..., *I).
      w: (*I, *O): input axes first, the transpose of PyTorch's.
      dtype: what both are cast to, and the result's dtype.
      contract: number of axes in I.

    Returns:
      (..., *O). One two-dimensional product whatever the axes, so that every weight quantises alike.
    """
    batch = x.shape[: x.ndim - contract]
    inputs, outputs = math.prod(w.shape[:contract]), w.shape[contract:]
    y = x.reshape(*batch, inputs).astype(dtype) @ w.reshape(inputs, -1).astype(dtype)
    return y.reshape(*batch, *outputs)
