"""Root mean square layer normalisation."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


def norm_scale(module: nn.Module, name: str, size: int) -> jax.Array:
    """Declares the scale (size,) of a norm as a parameter of `module`, which has a `runtime`; ones at init."""
    return module.param(name, nn.initializers.ones, (size,), jnp.dtype(module.runtime.param_dtype))  # type: ignore[attr-defined]


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * scale` over the last axis: x (..., D), scale (D,) -> (..., D) of `x`'s dtype.

    The mean is taken in float32 (or wider), and the quotient rounded to `x`'s dtype before it is scaled,
    as the released weights were trained.
    """
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale.astype(x.dtype)
