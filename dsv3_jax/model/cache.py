"""The latent cache: two vectors per token, and the keys that queries attend to.

The caches of all layers of one kind are one pytree with `append`, which is carried through the layers so that each
extends it in place. The model passes a layer's new tokens and gets back the tokens to attend to; the memory layout,
paged or padded, is internal to the cache.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol, Self, cast

import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.auto import PAGE, attention_impl
from dsv3_jax.runtime import Runtime
from pallas_kernels.mla_decode import pack_rope


@struct.dataclass
class TokenPositions:
    """Positions of the B x T tokens of a call.

    positions: (B, T) int32, for RoPE.
    segments: (B, T) int32 or None: tokens attend only within their segment; None for no such mask.
    order: (T,) int32 or None: the place of each token in its sequence, if tokens aren't stored in this order.
    cached: (B,) int32 or None: with a cache, the tokens of each sequence in it before this call.
    """

    positions: jax.Array
    segments: jax.Array | None = None
    order: jax.Array | None = None
    cached: jax.Array | None = None

    @property
    def places(self) -> jax.Array:
        """(B, T) int32: the place of each token in its sequence, including the tokens in the cache."""
        batch, tokens = self.positions.shape
        order = jnp.arange(tokens, dtype=jnp.int32) if self.order is None else self.order
        places = jnp.broadcast_to(order, (batch, tokens))
        return places if self.cached is None else places + self.cached[:, None]


@struct.dataclass
class Keys:
    """The tokens that queries attend to, as latents: those of the call, or of the cache that the call has extended.

    latent: (B, S, R), normalised. rope_key: (B, S, P), rotated.
    places: (B, S) int32, places in the sequence: a query sees the keys whose place is at most its own.
    segments: (B, S) int32 or None: and whose segment is its own.
    lengths: (B,) int32 or None: the tokens in a cache; keys beyond are padding.
    pages: the same tokens in place, for kernels that read a cache without copying; None if it isn't paged.
    """

    latent: jax.Array
    rope_key: jax.Array
    places: jax.Array
    segments: jax.Array | None = None
    lengths: jax.Array | None = None
    pages: Pages | None = None


@struct.dataclass
class Pages:
    """A cache as the decoding kernels read it: the pages of all L layers, of which a call reads one.

    latent: (L, B, n, page, R), n pages of each sequence in their order; or (L, pages, page, R), where `tables` says
    which are a sequence's. rope_key: the same with P, or as `pallas_kernels.mla_decode.pack_rope` packs it.
    layer: () int32. tables: (B, n) int32, pages of a layer, or None.
    """

    latent: jax.Array
    rope_key: jax.Array
    layer: jax.Array
    tables: jax.Array | None = None


class LayersCache(Protocol):
    """The caches of all layers of one kind."""

    def append(
        self, latent: jax.Array, rope_key: jax.Array, where: TokenPositions, layer: jax.Array
    ) -> tuple[Self, Keys]:
        """Appends latent (B, T, R) and rope_key (B, T, P) after the `where.cached` tokens of a layer.

        `layer` is () int32. Returns the extended cache, which must have room, and all tokens of this layer.
        """
        ...


@struct.dataclass
class LayerCache:
    """Returns the cache of one layer, () int32."""

    layers: LayersCache
    layer: jax.Array | int

    def append(self, latent: jax.Array, rope_key: jax.Array, where: TokenPositions) -> tuple[LayerCache, Keys]:
        """Appends to this layer; see `LayersCache.append`."""
        layers, keys = self.layers.append(latent, rope_key, where, jnp.asarray(self.layer, jnp.int32))
        return LayerCache(layers, self.layer), keys


@struct.dataclass
class ContiguousCache:
    """One buffer per layer and sequence, filled from the left.

    latent: (L, B, S, R). rope_key: (L, B, S, P); or, where TPUs decode from it, (L, B, S / 64, 32, 2 P), as
    `pallas_kernels.mla_decode.pack_rope` packs pages of 64 tokens.
    """

    latent: jax.Array
    rope_key: jax.Array

    def append(
        self, latent: jax.Array, rope_key: jax.Array, where: TokenPositions, layer: jax.Array
    ) -> tuple[ContiguousCache, Keys]:
        assert where.cached is not None, "a cache needs to know how many tokens it holds"
        write = _write_packed if self.rope_key.ndim == 5 else _write
        cache = ContiguousCache(
            _write(self.latent, latent, layer, where.cached), write(self.rope_key, rope_key, layer, where.cached)
        )
        batch, size = self.latent.shape[1:3]
        pages = Pages(_in_pages(cache.latent), _in_pages(cache.rope_key), layer) if size % PAGE == 0 else None
        of_layer = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        ropes = of_layer(cache.rope_key)
        latents, ropes = of_layer(cache.latent), _unpack(ropes) if ropes.ndim == 4 else ropes
        places = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (batch, size))
        held = where.cached + latent.shape[1]
        return cache, Keys(latents.astype(latent.dtype), ropes.astype(latent.dtype), places, None, held, pages)


def _in_pages(x: jax.Array) -> jax.Array:
    """Views (L, B, S, W) as (L, B, S / PAGE, PAGE, W). Packed pages are returned unchanged."""
    return x.reshape(*x.shape[:2], -1, PAGE, x.shape[-1]) if x.ndim == 4 else x


def _write(buffer: jax.Array, new: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
    """Writes `new` (B, T, W) into a layer of `buffer` (L, B, S, W), from `at` (B,) on."""
    batch = jnp.arange(len(at), dtype=jnp.int32)
    index = jnp.stack([jnp.broadcast_to(layer, batch.shape), batch, at], axis=-1)
    windows = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(0, 1), scatter_dims_to_operand_dims=(0, 1, 2)
    )
    new, unique = new.astype(buffer.dtype), dict(indices_are_sorted=True, unique_indices=True)
    return jax.lax.scatter(buffer, index, new, windows, mode="clip", **unique)


def _write_packed(buffer: jax.Array, new: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
    """`_write` for packed pages: (L, B, n, PAGE / 2, 2 W)."""
    (batch, tokens, width), half = new.shape, PAGE // 2
    new = new.astype(buffer.dtype)
    if tokens > half:  # many writes of a row each would take longer than to unpack the layer, and to pack it again
        ropes = _unpack(jax.lax.dynamic_index_in_dim(buffer, layer, keepdims=False))
        ropes = _write(ropes[None], new, jnp.int32(0), at)[0].reshape(-1, PAGE, width)
        packed = pack_rope(ropes).reshape(buffer.shape[1:])
        return cast(jax.Array, jax.lax.dynamic_update_index_in_dim(buffer, packed, layer, 0))
    place = at[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    sequence = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], place.shape)
    column = place % PAGE // half * width
    index = jnp.stack([jnp.broadcast_to(layer, place.shape), sequence, place // PAGE, place % half, column], axis=-1)
    windows = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2,), inserted_window_dims=(0, 1, 2, 3), scatter_dims_to_operand_dims=(0, 1, 2, 3, 4)
    )
    return jax.lax.scatter(buffer, index, new, windows, mode="clip", unique_indices=True)


def _unpack(rope_key: jax.Array) -> jax.Array:
    """(B, n, PAGE / 2, 2 P) -> (B, n PAGE, P)."""
    halves = jnp.concatenate(jnp.split(rope_key, 2, axis=-1), axis=2)
    return halves.reshape(len(halves), -1, halves.shape[-1])


@struct.dataclass
class Cache:
    """The latent cache of a batch: R + P numbers per token and layer (report section 2.1.1).

    dense, moe: caches of the dense and the sparse layers; None if there are none.
    mtp: a cache of one layer for each multi-token prediction module in use. length: (B,) int32, tokens per sequence.
    """

    dense: LayersCache | None
    moe: LayersCache | None
    mtp: tuple[LayersCache, ...]
    length: jax.Array


def init_cache(config: ModelConfig, runtime: Runtime, batch: int, length: int, *, mtp: bool = False) -> Cache:
    """Makes an empty contiguous cache in the runtime's dtype.

    Args:
      batch: sequences. length: capacity in tokens per sequence.
      mtp: whether to include the multi-token prediction modules.

    Raises ValueError if `length` exceeds the RoPE range, `max_position_embeddings`.
    """
    if length > config.max_position_embeddings:
        raise ValueError(
            f"a cache of {length} tokens exceeds max_position_embeddings ({config.max_position_embeddings})"
        )

    decodes_on_tpu = dataclasses.replace(runtime, attention_form="absorbed")
    impl = attention_impl(decodes_on_tpu, config, tokens=1, keys=length, cached=True)
    packed = impl.startswith("tpu") and length % PAGE == 0

    def zeros(layers: int) -> ContiguousCache:
        rope, dtype = config.qk_rope_head_dim, jnp.dtype(runtime.dtype)
        of_sequence = (length // PAGE, PAGE // 2, 2 * rope) if packed else (length, rope)
        latent = jnp.zeros((layers, batch, length, config.kv_lora_rank), dtype)
        return ContiguousCache(latent, jnp.zeros((layers, batch, *of_sequence), dtype))

    return Cache(
        dense=zeros(config.num_dense_layers) if config.num_dense_layers else None,
        moe=zeros(config.num_moe_layers) if config.num_moe_layers else None,
        mtp=tuple(zeros(1) for _ in range(config.num_nextn_predict_layers)) if mtp else (),
        length=jnp.zeros((batch,), jnp.int32),
    )
