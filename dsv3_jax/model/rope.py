"""Rotary position embedding of the decoupled heads, with YaRN (report section 4.3; arXiv 2309.00071)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig, Yarn


def _mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature, sqrt(t) = 0.1 m ln(s) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Factor of q.k before the softmax: 1/sqrt(d_h + d_h^R) (eq. 10) times the square of YaRN's temperature."""
    scale: float = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    yarn = config.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= _mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each rotated pair, float32 (qk_rope_head_dim / 2,)."""
    dim = config.qk_rope_head_dim
    # float32 throughout, as the reference computes it: at position 100,000 the last bit shows.
    pair = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    extrapolated = np.float32(1.0) / (np.float32(config.rope_theta) ** pair)
    yarn = config.rope_scaling
    if yarn is None:
        return extrapolated
    interpolated = np.float32(1.0) / (np.float32(yarn.factor) * np.float32(config.rope_theta) ** pair)
    low, high = _ramp_ends(config, yarn)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    blended: np.ndarray = interpolated * ramp + extrapolated * (1 - ramp)
    return blended


def _ramp_ends(config: ModelConfig, yarn: Yarn) -> tuple[float, float]:
    """The range of pairs over which YaRN changes from extrapolation (fast pairs) to interpolation (slow ones)."""
    dim = config.qk_rope_head_dim

    def pair_of(rotations: float) -> float:  # the pair that turns this often in the original context
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def rotation_scale(config: ModelConfig) -> float:
    """Factor of cos and sin: 1, unless YaRN's temperature isn't entirely in the softmax scale."""
    yarn = config.rope_scaling
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor)


@jax.named_scope("rope")
def apply_rope(x: jax.Array, positions: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotates pairs of the last axis by position (eq. 4 and 8).

    Args:
      x: (B, T, H, P), P = qk_rope_head_dim. With `rope_interleave` a pair is two neighbours, as in the released
        weights; otherwise, element i of both halves.
      positions: (B, T) int32, in tokens.

    Returns:
      (B, T, H, P) of `x`'s dtype, in the same layout.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    angle = positions[..., None, None].astype(wide) * jnp.asarray(inverse_frequencies(config), wide)
    scale = rotation_scale(config)
    cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
    halves = (*x.shape[:-1], -1, 2) if config.rope_interleave else (*x.shape[:-1], 2, -1)
    axis = -1 if config.rope_interleave else -2
    a, b = jnp.moveaxis(x.astype(wide).reshape(halves), axis, 0)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis).reshape(x.shape).astype(x.dtype)
