"""Rows that go to several places, and sums of what comes back: by gathers alone, in the gradient too.

Two maps say the same from either end. `source` (M,): the row that place m takes, of N; N for none. `places` (N, K):
where row n went, each place at most once; M for nowhere. The two functions are each other's transpose, so that no
gradient needs a scatter, and every sum is in float32 or wider.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Residuals = tuple[jax.Array, jax.Array, jax.Array]


@jax.custom_vjp
def spread(x: jax.Array, source: jax.Array, places: jax.Array) -> jax.Array:
    """Puts a copy of each row into its places: x (N, D) -> (M, D) of its dtype, zero where `source` has none."""
    return _take(x, source)


@jax.custom_vjp
def collect(y: jax.Array, source: jax.Array, places: jax.Array) -> jax.Array:
    """Adds up each row's places: y (M, D) -> (N, D), float32 or wider."""
    return _take(y, places).sum(1, dtype=jnp.promote_types(y.dtype, jnp.float32))


def _take(a: jax.Array, index: jax.Array) -> jax.Array:
    return a.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _like(x: jax.Array) -> jax.Array:
    """An empty array of `x`'s dtype, which is all that the backward pass needs of `x`."""
    return jnp.zeros((0,), x.dtype)


def _spread_backward(residuals: Residuals, g: jax.Array) -> tuple[jax.Array, None, None]:
    like, source, places = residuals
    return collect(g, source, places).astype(like.dtype), None, None


def _collect_backward(residuals: Residuals, g: jax.Array) -> tuple[jax.Array, None, None]:
    like, source, places = residuals
    return spread(g, source, places).astype(like.dtype), None, None


spread.defvjp(lambda x, *maps: (spread(x, *maps), (_like(x), *maps)), _spread_backward)
collect.defvjp(lambda y, *maps: (collect(y, *maps), (_like(y), *maps)), _collect_backward)
