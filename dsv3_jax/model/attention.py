"""Multi-head latent attention (report section 2.1.1, eq. 1 to 11), in expanded and absorbed form.

Keys and values are up-projections of one latent vector per token, so a cache holds that latent and one rotated key
for all heads. `expanded` applies the up-projections to the latent; `absorbed` moves them to the other side of the
two products, q.(W^UK c) = (W^UK^T q).c and sum_j p_j (W^UV c_j) = W^UV (sum_j p_j c_j), and attends to the latent
itself: the same function, with more FLOPs but far fewer bytes, as decoding requires.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from dsv3_jax.model.attend import arrange, attend
from dsv3_jax.model.cache import Keys, LayerCache, TokenPositions
from dsv3_jax.model.linear import linear, linear_einsum
from dsv3_jax.model.module import Module
from dsv3_jax.model.norm import norm_scale, rms_norm
from dsv3_jax.model.remat import save_activation
from dsv3_jax.model.rope import apply_rope, softmax_scale
from dsv3_jax.parallel.sharding import constrain

LATENT_NORM_EPS = 1e-6
"""Epsilon of the two norms inside attention, fixed in the released code whatever `rms_norm_eps` is."""


class MultiHeadLatentAttention(Module):
    """MLA. Parameters have the released checkpoints' names; `k_b_proj` and `v_b_proj` are the halves of kv_b_proj."""

    @nn.compact
    def __call__(
        self, x: jax.Array, where: TokenPositions, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends from x (B, T, D), at positions `where`, to itself or, with a cache, to all tokens in it.

        Returns (B, T, D) of the runtime's dtype, and the extended cache, which must have room.
        """
        c = self.config
        d, heads, rank = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
        nope, rope = c.qk_nope_head_dim, c.qk_rope_head_dim

        # Queries (eq. 6 to 9): compressed, normed, expanded to heads; a rotated part beside the plain one.
        if c.q_lora_rank is None:
            q = linear(self, "q_proj", x, (d, heads, nope + rope), ("embed", "heads", None))
        else:
            c_q = save_activation(linear(self, "q_a_proj", x, (d, c.q_lora_rank), ("embed", None)))
            c_q = rms_norm(c_q, norm_scale(self, "q_a_layernorm", c.q_lora_rank), LATENT_NORM_EPS)
            q = linear(self, "q_b_proj", c_q, (c.q_lora_rank, heads, nope + rope), ("embed", "heads", None))
        q = constrain(q, self.runtime, "batch", "sequence", "heads", None)
        q_nope, q_rope = q[..., :nope], apply_rope(q[..., nope:], where.positions, c)

        # The latent (eq. 1) and the one rotated key of all heads (eq. 3): all that a cache needs.
        kv = save_activation(linear(self, "kv_a_proj_with_mqa", x, (d, rank + rope), ("embed", None)))
        latent = rms_norm(kv[..., :rank], norm_scale(self, "kv_a_layernorm", rank), LATENT_NORM_EPS)
        k_rope = apply_rope(kv[..., None, rank:], where.positions, c)[:, :, 0]

        # Where sequences are sharded, devices exchange this, which is small, and no keys or values.
        latent = constrain(latent, self.runtime, "batch", None, None)
        k_rope = constrain(k_rope, self.runtime, "batch", None, None)
        if cache is None:
            keys = Keys(latent, k_rope, where.places, where.segments)
        else:
            with jax.named_scope("cache"):
                cache, keys = cache.append(latent, k_rope, where)
        keys = arrange(keys, where, c, self.runtime)

        up = ("embed", "heads", None)
        w_uk, w_uv = (rank, heads, nope), (rank, heads, c.v_head_dim)
        absorbed = self.runtime.attention_form == "absorbed"
        if absorbed:
            q_nope = linear_einsum(self, "k_b_proj", "bthn,rhn->bthr", q_nope, w_uk, up)
            k_nope = v = keys.latent[:, :, None]
        else:  # eq. 2 and 5
            k_nope = linear(self, "k_b_proj", keys.latent, w_uk, up, whole_sequence=True)
            v = linear(self, "v_b_proj", keys.latent, w_uv, up, whole_sequence=True)
        plain = self.is_initializing()
        out = attend(q_nope, q_rope, k_nope, v, keys, where, c, self.runtime, scale=softmax_scale(c), reference=plain)
        if absorbed:
            out = linear_einsum(self, "v_b_proj", "bthr,rhv->bthv", out, w_uv, up)

        w_o = (heads, c.v_head_dim, d)
        y = linear(self, "o_proj", out, w_o, ("heads", None, "embed"), contract=2, keep_input=True)  # eq. 11
        return save_activation(y), cache
