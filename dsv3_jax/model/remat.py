"""Rematerialisation: activations that the backward pass recomputes instead of saving (report section 3.2.3)."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.runtime import Runtime
from pallas_kernels.mla_prefill import RESIDUALS

_SAVED = "saved"


def save_activation(x: jax.Array) -> jax.Array:
    """Marks an activation that policy `paper` saves: outputs of matmuls other than MLA's up-projections.

    Norms, up-projections, rotations and SwiGLU products are recomputed. So is attention in FP8, where its output is
    saved in FP8; else that is saved with what its gradient needs.
    """
    if x.dtype == jnp.float8_e4m3fn:  # JAX rounds what it saves to a format with infinities, in which 448 is one
        bits = checkpoint_name(lax.bitcast_convert_type(x, jnp.uint8), _SAVED)
        return lax.bitcast_convert_type(bits, x.dtype)
    named: jax.Array = checkpoint_name(x, _SAVED)
    return named


def rematerialise(
    module: Callable[..., nn.Module], runtime: Runtime, *, alone: bool = False
) -> Callable[..., nn.Module]:
    """Applies the runtime's policy to `module`: `none`, `block` (save only inputs) or `paper` (`save_activation`).

    alone: whether it is applied outside a loop over layers, where XLA would merge what is recomputed with what was
    computed before, and so keep it.
    """
    if runtime.remat == "none":
        return module
    names = (_SAVED,) if runtime.precision == "fp8" else (_SAVED, RESIDUALS)
    policy = jax.checkpoint_policies.save_only_these_names(*names) if runtime.remat == "paper" else None
    return nn.remat(module, policy=policy, prevent_cse=alone)
