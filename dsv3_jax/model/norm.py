"""Root mean square layer normalisation."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3_jax.model.module import Module


def norm_scale(module: Module, name: str, size: int) -> jax.Array:
    """Declares the scale (size,) of a norm as a parameter of `module`; ones at init."""
    return module.declare(name, nn.initializers.ones, (size,), (None,))


@jax.named_scope("rms_norm")
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * scale` over the last axis: x (..., D), scale (D,) -> (..., D) of `x`'s dtype.

    The mean is taken in float32 or wider, and the quotient is rounded to the dtype of x before it is scaled, as in the
    released code.
    """
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return _scaled(y.astype(x.dtype), scale)


@jax.custom_vjp
def _scaled(y: jax.Array, scale: jax.Array) -> jax.Array:
    """`y * scale` in `y`'s dtype. The gradient of the scale is summed over the tokens in float32 or wider."""
    return y * scale.astype(y.dtype)


def _scaled_forward(y: jax.Array, scale: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _scaled(y, scale), (y, scale)


def _scaled_backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, scale = residuals
    wide = jnp.promote_types(y.dtype, jnp.float32)
    d_scale = jnp.sum(g.astype(wide) * y.astype(wide), axis=tuple(range(y.ndim - 1)))
    return g * scale.astype(y.dtype), d_scale.astype(scale.dtype)


_scaled.defvjp(_scaled_forward, _scaled_backward)
