"""Multi-token prediction: one more block per depth, predicting one token further (report section 2.2, eq. 21 to 23)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv3_jax.model.block import Block
from dsv3_jax.model.cache import LayerCache, TokenPositions
from dsv3_jax.model.linear import linear
from dsv3_jax.model.module import Module
from dsv3_jax.model.norm import norm_scale, rms_norm
from dsv3_jax.model.router import RouterStats


class MTPModule(Module):
    """The module of depth k: maps hidden states of depth k-1 and embeddings of the tokens k ahead to those of depth k.

    Two details follow the released weights rather than eq. 21 as printed: the projection's input is
    [norm(embedding); norm(hidden)] in this order, and a hidden state is taken after its final norm.
    """

    @nn.compact
    def __call__(
        self, hidden: jax.Array, embedded: jax.Array, where: TokenPositions, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None, RouterStats]:
        """hidden, embedded (B, T, D) -> hidden states (B, T, D) after this depth's norm, the cache, router stats.

        Position i takes h_i of depth k-1 and the embedding of token i+k; the shared head then predicts token i+k+1.
        """
        c, r = self.config, self.runtime

        def norm(name: str, x: jax.Array) -> jax.Array:
            return rms_norm(x, norm_scale(self, name, c.hidden_size), c.rms_norm_eps)

        both = jnp.concatenate([norm("enorm", embedded), norm("hnorm", hidden)], axis=-1)
        x = linear(self, "eh_proj", both, (2 * c.hidden_size, c.hidden_size), (None, "embed"))
        x, (cache, stats) = Block(c, r, is_moe=True, name="block")(x, where, cache)
        assert stats is not None  # since the block is sparse
        return norm("norm", x), cache, stats
