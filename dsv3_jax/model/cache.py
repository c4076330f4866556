"""The latent cache: the two vectors per token that decoding keeps, and the tokens that queries attend to.

A layer's cache is any pytree with `append`. The model hands it the new tokens and gets back the tokens to attend to;
how they lie in memory, in pages or padded, is the cache's own matter.
"""

from __future__ import annotations

from typing import Protocol, Self

import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.config import ModelConfig
from dsv3_jax.runtime import Runtime


@struct.dataclass
class TokenPositions:
    """Positions of the B x T tokens of a call.

    positions: (B, T) int32, for RoPE.
    segments: (B, T) int32 or None: tokens attend only within their segment; None for no such mask.
    order: (T,) int32 or None: each token's place in its sequence, if the tokens aren't stored in this order.
    cached: (B,) int32 or None: with a cache, tokens that it holds of each sequence before this call.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    order: jax.Array | None = None
    cached: jax.Array | None = None

    @property
    def places(self) -> jax.Array:
        """(B, T) int32: each token's place in its sequence, those in the cache counted."""
        batch, tokens = self.positions.shape
        order = jnp.arange(tokens, dtype=jnp.int32) if self.order is None else self.order
        places = jnp.broadcast_to(order, (batch, tokens))
        return places if self.cached is None else places + self.cached[:, None]


@struct.dataclass
class Keys:
    """The tokens that queries attend to, as latents: of the call itself, or of a cache that the call has extended.

    latent: (B, S, R) after its norm. rope_key: (B, S, P) after rotation.
    places: (B, S) int32, places in the sequence: a query sees the keys whose place is at most its own.
    segments: (B, S) int32 or None: and whose segment is its own.
    lengths: (B,) int32 or None: of a cache, the tokens that it holds; the keys beyond are padding.
    """

    latent: jax.Array
    rope_key: jax.Array
    places: jax.Array
    segments: jax.Array | None = None
    lengths: jax.Array | None = None


class LayerCache(Protocol):
    """The cache of one layer."""

    def append(self, latent: jax.Array, rope_key: jax.Array, where: TokenPositions) -> tuple[Self, Keys]:
        """Adds the call's tokens, latent (B, T, R) and rope_key (B, T, P), after the `where.cached` that it holds.

        Returns the extended cache, and all tokens that it then holds. The caller makes sure that it has room.
        """
        ...


@struct.dataclass
class ContiguousCache:
    """One buffer per sequence: latent (B, S, R) and rope_key (B, S, P), filled from the left."""

    latent: jax.Array
    rope_key: jax.Array

    def append(self, latent: jax.Array, rope_key: jax.Array, where: TokenPositions) -> tuple[ContiguousCache, Keys]:
        assert where.cached is not None, "a cache needs to know how many tokens it holds"
        write = jax.vmap(lambda buffer, new, at: jax.lax.dynamic_update_slice_in_dim(buffer, new, at, axis=0))
        extend = lambda buffer, new: write(buffer, new.astype(buffer.dtype), where.cached)
        extended = ContiguousCache(extend(self.latent, latent), extend(self.rope_key, rope_key))
        stored = extended.latent.astype(latent.dtype), extended.rope_key.astype(rope_key.dtype)
        places = jnp.broadcast_to(jnp.arange(self.latent.shape[1], dtype=jnp.int32), self.latent.shape[:2])
        return extended, Keys(*stored, places, lengths=where.cached + latent.shape[1])


@struct.dataclass
class Cache:
    """The latent cache of a batch: R + P numbers per token and layer (report section 2.1.1).

    dense, moe: layer caches of the dense and of the sparse layers, stacked along a leading axis; None where there are
    none. mtp: one per multi-token prediction module in use. length: (B,) int32, tokens held of each sequence.
    """

    dense: LayerCache | None
    moe: LayerCache | None
    mtp: tuple[LayerCache, ...]
    length: jax.Array


def init_cache(config: ModelConfig, runtime: Runtime, batch: int, length: int, *, mtp: bool = False) -> Cache:
    """Makes an empty contiguous cache in the runtime's dtype.

    Args:
      batch: sequences. length: tokens per sequence that there is room for.
      mtp: whether the multi-token prediction modules have their entries too.

    Raises ValueError if `length` exceeds the RoPE range, `max_position_embeddings`.
    """
    if length > config.max_position_embeddings:
        raise ValueError(
            f"a cache of {length} tokens exceeds max_position_embeddings ({config.max_position_embeddings})"
        )

    def zeros(*layers: int) -> ContiguousCache:
        make = lambda width: jnp.zeros((*layers, batch, length, width), jnp.dtype(runtime.dtype))
        return ContiguousCache(make(config.kv_lora_rank), make(config.qk_rope_head_dim))

    return Cache(
        dense=zeros(config.num_dense_layers) if config.num_dense_layers else None,
        moe=zeros(config.num_moe_layers) if config.num_moe_layers else None,
        mtp=tuple(zeros() for _ in range(config.num_nextn_predict_layers)) if mtp else (),
        length=jnp.zeros((batch,), jnp.int32),
    )
