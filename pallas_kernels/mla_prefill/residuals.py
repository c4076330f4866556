"""Names for what the gradient of attention needs besides its inputs, so that a rematerialisation policy can save it."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

RESIDUALS = "attention"
"""The name, for `jax.checkpoint_policies`. Without these residuals the backward pass repeats the forward pass."""


def residual(x: jax.Array) -> jax.Array:
    """Marks an output, or its log-sum-exps."""
    named: jax.Array = checkpoint_name(x, RESIDUALS)
    return named
