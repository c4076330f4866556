"""The paged latent cache: one pool for all sequences, each with a table of its pages.

A page holds the latents and rope keys of 64 tokens in one layer. A token takes L (R + P) numbers: there are no heads,
and no padding except in the last page.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.auto import PAGE
from dsv3_jax.model.cache import Cache, Keys, Pages, TokenPositions
from dsv3_jax.parallel.sharding import constrain, current_mesh
from dsv3_jax.runtime import Runtime

SCRATCH = 0
"""The page for unused entries of tables. It is never written to."""


@struct.dataclass
class LayersPool:
    """Pages of all layers of one kind. latent: (L, pages, PAGE, R). rope_key: (L, pages, PAGE, P)."""

    latent: jax.Array
    rope_key: jax.Array


@struct.dataclass
class PagePool:
    """Pages of a model: of its dense layers, its sparse layers, and its MTP modules; None if there are none."""

    dense: LayersPool | None
    moe: LayersPool | None
    mtp: LayersPool | None

    @property
    def bytes(self) -> int:
        """Bytes of all pages, allocated or abstract."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def init_pool(config: ModelConfig, runtime: Runtime, pages: int, *, mtp: bool = False, dtype: Any = None) -> PagePool:
    """Makes an empty pool.

    Args:
      pages: number of pages of 64 tokens, the scratch page included.
      mtp: whether to include pages for the first multi-token prediction module.
      dtype: of the latents, by default the runtime's; float8_e4m3fn takes 5/9 of bfloat16's bytes. Rope keys have the
        runtime's.
    """

    def layers(count: int) -> LayersPool | None:
        latent = jnp.zeros((count, pages, PAGE, config.kv_lora_rank), jnp.dtype(dtype or runtime.dtype))
        rope = jnp.zeros((count, pages, PAGE, config.qk_rope_head_dim), jnp.dtype(runtime.dtype))
        return LayersPool(latent, rope) if count else None

    return PagePool(layers(config.num_dense_layers), layers(config.num_moe_layers), layers(1 if mtp else 0))


def spread(pool: PagePool, runtime: Runtime) -> PagePool:
    """Each page on one of the devices that share a batch: their number must divide the pool's."""
    return cast(PagePool, jax.tree.map(lambda x: constrain(x, runtime, None, "batch", None, None), pool))


@struct.dataclass
class PagedCache:
    """The pages of a batch, as a cache for the model's layers.

    pool: all pages. tables: (B, n) int32, the pages of each sequence in order. new: (B,) int32, the number of real
    tokens in a call; the others are padding, and aren't written.
    """

    pool: LayersPool
    tables: jax.Array
    new: jax.Array

    def append(
        self, latent: jax.Array, rope_key: jax.Array, where: TokenPositions, layer: jax.Array
    ) -> tuple[PagedCache, Keys]:
        assert where.cached is not None, "a cache needs to know how many tokens it holds"
        (batch, count, _), (slots, size) = latent.shape, (self.tables.shape[1], self.tables.shape[1] * PAGE)
        token = jnp.arange(count, dtype=jnp.int32)
        place = where.cached[:, None] + token
        page = jnp.take_along_axis(self.tables, jnp.minimum(place // PAGE, slots - 1), axis=1)
        page = jnp.where((token < self.new[:, None]) & (place < size), page, self.pool.latent.shape[1])  # else dropped

        def write(pages: jax.Array, new: jax.Array) -> jax.Array:
            return pages.at[layer, page, place % PAGE].set(new.astype(pages.dtype), mode="drop")

        def read(pages: jax.Array) -> jax.Array:
            return pages[layer, self.tables].reshape(batch, size, -1).astype(latent.dtype)

        pool = LayersPool(write(self.pool.latent, latent), write(self.pool.rope_key, rope_key))
        places = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (batch, size))
        # On a mesh a text's pages lie anywhere: what is read then is the copy, on the text's own device.
        as_stored = pool.latent.dtype == latent.dtype and current_mesh() is None
        pages = Pages(pool.latent, pool.rope_key, layer, self.tables) if as_stored else None
        held = where.cached + count
        return dataclasses.replace(self, pool=pool), Keys(
            read(pool.latent), read(pool.rope_key), places, None, held, pages
        )


def batch_cache(pool: PagePool, tables: jax.Array, length: jax.Array, new: jax.Array) -> Cache:
    """The cache of a batch whose sequences have `length` (B,) tokens, for a call with `new` (B,) real tokens."""
    of: Any = lambda layers: None if layers is None else PagedCache(layers, tables, new)
    return Cache(of(pool.dense), of(pool.moe), () if pool.mtp is None else (of(pool.mtp),), length)


def pool_of(cache: Cache) -> PagePool:
    """Returns the pool after a call."""
    of: Any = lambda layers: None if layers is None else layers.pool
    return PagePool(of(cache.dense), of(cache.moe), of(cache.mtp[0]) if cache.mtp else None)
