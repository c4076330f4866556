"""Multi-head latent attention (report section 2.1.1, eq. 1 to 11), expanded and absorbed.

Keys and values are up-projections of one latent vector a token, so a cache holds that latent and one rotated key
for all heads. `expanded` applies the up-projections to the latent; `absorbed` moves them to the other side of the
two products, q.(W^UK c) = (W^UK^T q).c and sum_j p_j (W^UV c_j) = W^UV (sum_j p_j c_j), and attends to the
latent itself: the same function, with more arithmetic and far fewer bytes, which is what decoding wants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.model import attention_impls
from dsv3_jax.model.linear import linear, weight
from dsv3_jax.model.module import Module
from dsv3_jax.model.norm import norm_scale, rms_norm
from dsv3_jax.model.remat import kept
from dsv3_jax.model.rope import apply_rope, softmax_scale
from dsv3_jax.parallel.sharding import constrain

LATENT_NORM_EPS = 1e-6
"""The two norms inside the attention have this epsilon in the reference, whatever `rms_norm_eps` says."""


@struct.dataclass
class Index:
    """Where the tokens of a call stand.

    positions: (B, T) int32, for RoPE.
    segments: (B, T) int32 or None: tokens attend only within their segment; None for no such mask.
    order: (T,) int32 or None: each token's place in its sequence, if they don't stand in this order.
    start: (B,) int32 or None: with a cache, how many of its entries are filled before this call.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    order: jax.Array | None = None
    start: jax.Array | None = None


@struct.dataclass
class LayerCache:
    """What attention keeps of the past: `latent` (B, S, R) after its norm and `rope_key` (B, S, P) after rotation."""

    latent: jax.Array
    rope_key: jax.Array


def attention(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *,
    q_index: jax.Array,
    k_index: jax.Array,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    scale: float,
) -> jax.Array:
    """Causal attention over decoupled heads (eq. 9 and 10), written plainly: the reference of the attention seam.

    Args:
      q_nope, q_rope: (B, T, H, N) and (B, T, H, P).
      k_nope: (B, S, H, N); or (B, S, 1, N), one key for all heads: the absorbed form, where N = R.
      k_rope: (B, S, P), shared by all heads.
      v: (B, S, H, V), or (B, S, 1, V).
      q_index, k_index: (B, T) and (B, S) int32: a query sees the keys whose index is at most its own.
      q_segments, k_segments: (B, T) and (B, S) int32 or None: and whose segment is its own.
      scale: what multiplies the scores.

    Returns:
      (B, T, H, V) of `v`'s dtype. The softmax is in float32. A query that sees no key gets the mean of all values.
    """
    wide = jnp.promote_types(q_nope.dtype, jnp.float32)
    heads = "h" if k_nope.shape[2] == q_nope.shape[2] else ""
    if not heads:
        k_nope, v = k_nope[:, :, 0], v[:, :, 0]
    scores = jnp.einsum(f"bthn,bs{heads}n->bhts", q_nope, k_nope, preferred_element_type=wide)
    scores += jnp.einsum("bthp,bsp->bhts", q_rope, k_rope, preferred_element_type=wide)
    mask = k_index[:, None, :] <= q_index[:, :, None]
    if q_segments is not None and k_segments is not None:
        mask &= k_segments[:, None, :] == q_segments[:, :, None]
    scores = jnp.where(mask[:, None], scores * scale, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum(f"bhts,bs{heads}v->bthv", weights, v)


class MultiHeadLatentAttention(Module):
    """MLA. Parameters carry the released checkpoint's names; `k_b_proj` and `v_b_proj` are the halves of kv_b_proj."""

    @nn.compact
    def __call__(
        self, x: jax.Array, index: Index, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Args: x (B, T, D); where its tokens stand; the cache to read and extend, if any.

        Returns (B, T, D) of the runtime's dtype, and the extended cache. The caller makes sure that it has room.
        """
        c = self.config
        heads, nope, rope, rank = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank

        # Queries (eq. 6 to 9): compressed, normed, expanded to heads; a rotated part beside the plain one.
        if c.q_lora_rank is None:
            q = linear(x, weight(self, "q_proj", (c.hidden_size, heads, nope + rope), ("embed", "heads", None)))
        else:
            c_q = kept(linear(x, weight(self, "q_a_proj", (c.hidden_size, c.q_lora_rank), ("embed", None))))
            c_q = rms_norm(c_q, norm_scale(self, "q_a_layernorm", c.q_lora_rank), LATENT_NORM_EPS)
            q = linear(c_q, weight(self, "q_b_proj", (c.q_lora_rank, heads, nope + rope), ("embed", "heads", None)))
        q = constrain(q, self.runtime, "batch", "sequence", "heads", None)
        q_nope, q_rope = q[..., :nope], apply_rope(q[..., nope:], index.positions, c)

        # The latent (eq. 1) and the one rotated key of all heads (eq. 3): all that a cache needs.
        kv = kept(linear(x, weight(self, "kv_a_proj_with_mqa", (c.hidden_size, rank + rope), ("embed", None))))
        latent = rms_norm(kv[..., :rank], norm_scale(self, "kv_a_layernorm", rank), LATENT_NORM_EPS)
        k_rope = apply_rope(kv[..., None, rank:], index.positions, c)[:, :, 0]

        # Where a sequence is cut over devices, they exchange this, which is small, and no keys or values.
        latent = constrain(latent, self.runtime, "batch", None, None)
        k_rope = constrain(k_rope, self.runtime, "batch", None, None)

        order = jnp.arange(x.shape[1]) if index.order is None else index.order
        q_index = k_index = jnp.broadcast_to(order, x.shape[:2])
        k_segments, lengths = index.segments, None
        if cache is not None:
            assert index.start is not None, "a cache needs to know where it is filled to"
            latent, k_rope = _extend(cache.latent, latent, index.start), _extend(cache.rope_key, k_rope, index.start)
            cache = LayerCache(latent, k_rope)
            latent, k_rope, k_segments = latent.astype(x.dtype), k_rope.astype(x.dtype), None
            q_index += index.start[:, None]
            k_index = jnp.broadcast_to(jnp.arange(latent.shape[1]), latent.shape[:2])
            lengths = index.start + x.shape[1]

        w_uk = weight(self, "k_b_proj", (rank, heads, nope), ("embed", "heads", None))
        w_uv = weight(self, "v_b_proj", (rank, heads, c.v_head_dim), ("embed", "heads", None))
        if self.runtime.attention_impl == "reference" or self.is_initializing():
            where: dict[str, Any] = dict(
                q_index=q_index, k_index=k_index, q_segments=index.segments, k_segments=k_segments
            )
            attend: Callable[..., jax.Array] = functools.partial(attention, **where, scale=softmax_scale(c))
        else:
            if lengths is not None and self.runtime.attention_form == "expanded":
                latent, k_rope, k_segments = attention_impls.turn(latent, k_rope, lengths)
            attend = attention_impls.kernel(
                self.runtime, order=index.order, segments=k_segments, lengths=lengths, scale=softmax_scale(c)
            )
        if self.runtime.attention_form == "expanded":  # eq. 2, 5 and 10
            k_nope, v = linear(latent, w_uk), linear(latent, w_uv)
            out = attend(q_nope, q_rope, k_nope, k_rope, v)
        else:
            shared = latent[:, :, None]
            q_latent = jnp.einsum("bthn,rhn->bthr", q_nope, w_uk)
            out = attend(q_latent, q_rope, shared, k_rope, shared)
            out = jnp.einsum("bthr,rhv->bthv", out, w_uv)

        w_o = weight(self, "o_proj", (heads, c.v_head_dim, c.hidden_size), ("heads", None, "embed"))
        return kept(linear(kept(out), w_o, contract=2)), cache  # eq. 11


def _extend(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes `new` (B, T, X) into `cache` (B, S, X) from entry `start` (B,) on, each sequence at its own place."""
    write = jax.vmap(lambda c, n, s: jax.lax.dynamic_update_slice_in_dim(c, n, s, axis=0))
    return write(cache, new.astype(cache.dtype), start)
