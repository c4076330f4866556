"""Copying rows to several places, and summing what returns: by gathers alone, also in the gradient.

Two maps describe the copies from either end. `source` (M,): the row of N for place m; N for none. `places` (N, K): the
places of row n, each at most once; M for none. The two functions are each other's transpose, so that no gradient needs
a scatter, and all sums are in float32 or wider.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp

Residuals = tuple[jax.Array, jax.Array, jax.Array]


@jax.custom_vjp
def spread(x: jax.Array, source: jax.Array, places: jax.Array) -> jax.Array:
    """Copies each row to its places: x (N, D) -> (M, D) of the same dtype, zero if `source` has none."""
    return _take(x, source)


@jax.custom_vjp
def collect(y: jax.Array, source: jax.Array, places: jax.Array) -> jax.Array:
    """Sums over the places of each row: y (M, D) -> (N, D), float32 or wider."""
    wide = jnp.promote_types(y.dtype, jnp.float32)
    # Not a gather of (N, K, D) and its sum, which XLA computes many times as slowly on a CPU.
    return functools.reduce(operator.add, (_take(y, place).astype(wide) for place in places.T))


def _take(a: jax.Array, index: jax.Array) -> jax.Array:
    return a.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _like(x: jax.Array) -> jax.Array:
    """Returns an empty array of the dtype of x, which is all that the backward pass needs of it."""
    return jnp.zeros((0,), x.dtype)


def _spread_backward(residuals: Residuals, g: jax.Array) -> tuple[jax.Array, None, None]:
    like, source, places = residuals
    return collect(g, source, places).astype(like.dtype), None, None


def _collect_backward(residuals: Residuals, g: jax.Array) -> tuple[jax.Array, None, None]:
    like, source, places = residuals
    return spread(g, source, places).astype(like.dtype), None, None


spread.defvjp(lambda x, *maps: (spread(x, *maps), (_like(x), *maps)), _spread_backward)
collect.defvjp(lambda y, *maps: (collect(y, *maps), (_like(y), *maps)), _collect_backward)
