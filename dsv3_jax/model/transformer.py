"""DeepSeek-V3: embedding, dense and sparse blocks, head, and multi-token prediction modules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dsv3_jax.model.auto import unrolls
from dsv3_jax.model.block import Block
from dsv3_jax.model.cache import Cache, LayerCache, LayersCache, TokenPositions
from dsv3_jax.model.linear import SCALES, TURNED, weight
from dsv3_jax.model.logits import Logits
from dsv3_jax.model.module import LAYERS, Module, logical_axes
from dsv3_jax.model.moe import EXPERT_PLACEMENT, LAYER, STACKS
from dsv3_jax.model.mtp import MTPModule
from dsv3_jax.model.norm import norm_scale, rms_norm
from dsv3_jax.model.remat import rematerialise
from dsv3_jax.model.router import CHOICES, ROUTER, RouterStats
from dsv3_jax.parallel.dispatch import SLACKS
from dsv3_jax.parallel.sharding import Logical, constrain
from dsv3_jax.runtime import Runtime


@struct.dataclass
class Outputs:
    """Outputs of one forward pass that training needs.

    logits: of the next token; None for a pipeline stage without the head. mtp_logits: for each MTP depth.
    stats: routing of the sparse layers, with a leading axis of layers; None if there are none.
    mtp_stats: routing for each MTP depth.
    """

    logits: Logits | None
    mtp_logits: tuple[Logits, ...]
    stats: RouterStats | None
    mtp_stats: tuple[RouterStats, ...]


def router_stats(outputs: Outputs) -> dict[str, RouterStats]:
    """Routing statistics of all sparse modules, keyed as the `router` collection: {"moe_layers": ..., "mtp_0": ...}."""
    stats = {} if outputs.stats is None else {"moe_layers": outputs.stats}
    return stats | {f"mtp_{k}": s for k, s in enumerate(outputs.mtp_stats)}


def only_of(outputs: Outputs, real: jax.Array) -> Outputs:
    """Restricts the routing statistics to the sequences selected by `real`, (B,) bool."""

    def only(stats: RouterStats) -> RouterStats:
        mask = real[:, None]
        return dataclasses.replace(
            stats, load=stats.load * mask, fraction=stats.fraction * mask, affinity=stats.affinity * mask
        )

    stats = None if outputs.stats is None else only(outputs.stats)
    return dataclasses.replace(outputs, stats=stats, mtp_stats=tuple(map(only, outputs.mtp_stats)))


def expert_load(outputs: Outputs) -> dict[str, jax.Array]:
    """Counts tokens of the batch sent to each expert: {"moe_layers": (L, E), "mtp_0": (E,), ...}, float32."""
    return {name: jnp.sum(s.load, axis=-2) for name, s in router_stats(outputs).items()}


def exchanges(outputs: Outputs) -> jax.Array:
    """Counts token exchanges, each once per sparse layer and device that has tokens.

    Returns float32 (2 + len(SLACKS),): those that took several rounds, those that would have with each of
    `parallel.dispatch.SLACKS`, and all.
    """
    counts = jnp.zeros((2 + len(SLACKS),), jnp.float32)
    for stats in router_stats(outputs).values():
        layers = jnp.sum(stats.load, axis=(-2, -1)) > 0
        *_, rows, columns, kinds = stats.exchanges.shape
        total = jnp.sum(layers, dtype=jnp.float32) * rows * columns
        counts += jnp.append(stats.exchanges.reshape(-1, kinds).sum(0), total)
    return counts


class DeepSeekV3(Module):
    """The model as pure functions.

    ```
    model = DeepSeekV3(ModelConfig.preset("tiny"))
    variables = model.init(key, tokens)      # {"params": ..., "router": ...}
    logits = model.apply(variables, tokens)  # float32 (B, T, V)
    ```
    """

    runtime: Runtime = Runtime()
    source: str | None = None
    """Directory of the checkpoint that `load_pretrained` read, whose tokenizer `generate` uses."""

    def setup(self) -> None:
        c, r = self.config, self.runtime
        # Looked up before it is rounded: so the gradient of a row, which may have many thousand addends, is float32.
        wide = jnp.promote_types(r.dtype, jnp.float32)
        self.embed_tokens = weight(self, "embed_tokens", (c.vocab_size, c.hidden_size), ("vocab", "embed"), dtype=wide)
        alone: Any = lambda layers: layers == 1 and not unrolls(1, r)  # what is unrolled saves time, not memory
        if c.num_dense_layers:
            self.dense_layers = rematerialise(Block, r, alone=alone(c.num_dense_layers))(c, r, is_moe=False)
        if c.num_moe_layers:
            self.moe_layers = rematerialise(Block, r, alone=alone(c.num_moe_layers))(c, r, is_moe=True)
        self.norm = norm_scale(self, "norm", c.hidden_size)
        self.lm_head = weight(self, "lm_head", (c.hidden_size, c.vocab_size), ("embed", "vocab"))
        module = rematerialise(MTPModule, r, alone=True)
        self.mtp = [module(c, r, name=f"mtp_{k}") for k in range(c.num_nextn_predict_layers)]

    def __call__(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """Logits of the next token.

        Args:
          tokens: (B, T) int32.
          positions: (B, T) int32 for RoPE, in tokens; by default 0 to T-1.
          segments: (B, T) int32: tokens attend within their segment only; by default all are of one.

        Returns:
          (B, T, V) float32.

        Raises:
          ValueError: T exceeds `max_position_embeddings`, or `tokens` holds an id outside the vocabulary. Under `jit`,
            where values can't be inspected, the logits of such a token are NaN instead.
        """
        where = self.token_positions(tokens, positions, segments)
        hidden, _, _ = self._trunk(tokens, where, None)
        if self.is_initializing():
            self._predict_further(hidden, (tokens,) * len(self.mtp), where)
        return self._head(hidden).array()

    def forward(
        self,
        tokens: jax.Array,
        further_tokens: tuple[jax.Array, ...],
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        order: jax.Array | None = None,
        detach_mtp: bool = False,
    ) -> Outputs:
        """Computes everything that training needs: logits, MTP predictions and routing statistics.

        Args:
          tokens, positions, segments: as in `__call__`.
          further_tokens: for each MTP depth k in use, (B, T) int32: `tokens` shifted k to the left.
          order: (T,) int32, the place of each token in its sequence, if they aren't in this order.
          detach_mtp: stop the gradient of the MTP predictions at the MTP modules.
        """
        where = self.token_positions(tokens, positions, segments, order)
        hidden, _, stats = self._trunk(tokens, where, None)
        return self._outputs(hidden, stats, further_tokens, where, detach_mtp)

    def first_stage(self, tokens: jax.Array, **where: jax.Array | None) -> jax.Array:
        """The part of `forward` before the sparse layers, for the first pipeline stage: returns (B, T, D)."""
        x, layers = self._embed(tokens), self.config.num_dense_layers
        return _through(self.dense_layers, layers, x, self.token_positions(tokens, **where), None)[0] if layers else x

    def last_stage(
        self,
        x: jax.Array,
        further_tokens: tuple[jax.Array, ...],
        *,
        detach_mtp: bool = False,
        **where: jax.Array | None,
    ) -> Outputs:
        """The part of `forward` after the sparse layers, for the last pipeline stage: takes x (B, T, D)."""
        hidden = rms_norm(x, self.norm, self.config.rms_norm_eps)
        return self._outputs(hidden, None, further_tokens, self.token_positions(x[:, :, 0], **where), detach_mtp)

    def decode(self, tokens: jax.Array, cache: Cache, at: jax.Array | None = None) -> tuple[jax.Array, Cache]:
        """Computes logits of the next T >= 1 tokens of each sequence, which follow those in the cache.

        Args:
          tokens: (B, T) int32.
          cache: as from `init_cache`. It must have room for T more tokens.
          at: (B, N) int32, from 0 to T - 1: the tokens of each sequence whose logits to return; by default all.

        Returns:
          logits (B, N, V) float32, by default (B, T, V), and the extended cache.
        """
        hidden, extended = self.extend(tokens, cache)
        if at is not None:
            hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
        return self.head(hidden), extended

    def extend(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`decode` without the head: hidden states (B, T, D) after the last norm, and the extended cache."""
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        hidden, extended, _ = self._trunk(tokens, TokenPositions(positions, cached=cache.length), cache)
        assert extended is not None  # since `cache` is
        return hidden, extended

    def draft(self, hidden: jax.Array, following: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Applies the first MTP module to the tokens after those in the cache, for speculative decoding (report section
        5.4.3).

        Args:
          hidden: (B, T, D), of the T tokens after `cache.length`: from `extend` or, for a further token, from this
            method.
          following: (B, T) int32, the token after each.

        Returns: hidden states (B, T, D), from which `head` computes the logits of the token after `following`; and the
          cache with the module's entry extended and `length` unchanged.
        """
        positions = cache.length[:, None] + jnp.arange(following.shape[1], dtype=jnp.int32)
        where = TokenPositions(positions, cached=cache.length)
        hidden, entry, _ = self.mtp[0](hidden, self._embed(following), where, LayerCache(cache.mtp[0], 0))
        assert entry is not None
        return hidden, dataclasses.replace(cache, mtp=(entry.layers, *cache.mtp[1:]))

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits (..., V), float32 or wider, of hidden states (B, T, D)."""
        return self._head(hidden).array()

    @nn.nowrap
    def token_positions(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        order: jax.Array | None = None,
    ) -> TokenPositions:
        """Positions of tokens (B, T), with the arguments of `forward`. Raises as `__call__`."""
        limit = self.config.max_position_embeddings
        if tokens.ndim != 2:
            raise ValueError(f"tokens have shape {tokens.shape}: they must be (batch, sequence)")
        if tokens.shape[1] > limit:
            raise ValueError(f"the sequence has {tokens.shape[1]} tokens, but max_position_embeddings is {limit}")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return TokenPositions(positions, segments, order)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        check_token_ids(tokens, self.config.vocab_size)
        table = jnp.asarray(self.embed_tokens)  # which may be NumPy's
        x = table.at[tokens].get(mode="fill", wrap_negative_indices=False)  # NaN where there is no row
        return constrain(x.astype(self.runtime.dtype), self.runtime, "batch", "sequence", None)

    def _trunk(
        self, tokens: jax.Array, where: TokenPositions, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None, RouterStats | None]:
        """Returns hidden states (B, T, D) after the final norm, the extended cache, and the sparse layers' routing."""
        x, stats = self._embed(tokens), None
        dense, moe = (cache.dense, cache.moe) if cache is not None else (None, None)
        if self.config.num_dense_layers:
            x, dense, _ = _through(self.dense_layers, self.config.num_dense_layers, x, where, dense)
        if self.config.num_moe_layers:
            x, moe, stats = _through(self.moe_layers, self.config.num_moe_layers, x, where, moe)
        if cache is not None:
            cache = dataclasses.replace(cache, dense=dense, moe=moe, length=cache.length + tokens.shape[1])
        return rms_norm(x, self.norm, self.config.rms_norm_eps), cache, stats

    def _outputs(
        self,
        hidden: jax.Array,
        stats: RouterStats | None,
        further_tokens: tuple[jax.Array, ...],
        where: TokenPositions,
        detach_mtp: bool,
    ) -> Outputs:
        """Logits and MTP predictions from hidden states (B, T, D) after the final norm."""
        shared = (hidden, self.lm_head)
        before, head = jax.lax.stop_gradient(shared) if detach_mtp else shared
        further, mtp_stats = self._predict_further(before, further_tokens, where, detach=detach_mtp)
        mtp_logits = tuple(Logits(h, head, self.runtime) for h in further)
        return Outputs(self._head(hidden), mtp_logits, stats, mtp_stats)

    def _predict_further(
        self,
        hidden: jax.Array,
        further_tokens: tuple[jax.Array, ...],
        where: TokenPositions,
        *,
        detach: bool = False,
    ) -> tuple[list[jax.Array], tuple[RouterStats, ...]]:
        """Eq. 21 and 22: returns the normalised hidden states (B, T, D) of each depth, and its routing."""
        further, stats = [], []
        for module, ahead in zip(self.mtp, further_tokens, strict=False):
            embedded = self._embed(ahead)
            hidden, _, routing = module(hidden, jax.lax.stop_gradient(embedded) if detach else embedded, where)
            further.append(hidden)
            stats.append(routing)
        return further, tuple(stats)

    def _head(self, hidden: jax.Array) -> Logits:
        return Logits(hidden, self.lm_head, self.runtime)


@functools.cache
def parameter_axes(model: DeepSeekV3) -> Mapping[tuple[str, ...], Logical]:
    """Returns the logical axes of the model's parameters, by path."""
    # Of one token, which no mesh cuts: also where one is in use.
    alone = dataclasses.replace(model.runtime, sharding="single", sharding_overrides=())
    return logical_axes(model.clone(runtime=alone), jnp.zeros((1, 1), jnp.int32))


def check_token_ids(tokens: jax.Array | np.ndarray, vocab_size: int) -> None:
    """Raises ValueError if a token id is outside the vocabulary. Does nothing under `jit`."""
    if isinstance(tokens, jax.core.Tracer) or not getattr(tokens, "is_fully_addressable", True) or not tokens.size:
        return
    values = np.asarray(tokens)  # not jnp, which would trace inside another function's jit
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the vocabulary: ids go from 0 to {vocab_size - 1}"
        )


def _through(
    block: nn.Module, layers: int, x: jax.Array, where: TokenPositions, cache: LayersCache | None
) -> tuple[jax.Array, LayersCache | None, RouterStats | None]:
    """Applies `layers` blocks of one kind to x (B, T, D). Returns x, the extended cache, and the routing of each layer.

    Blocks are scanned: parameters have a leading axis of layers, and compile time doesn't grow with depth, except where
    `unrolls` says so. The cache of all layers is carried rather than split and stacked, so that each layer extends it
    in place.
    """

    def layer(block: Any, carry: Any, where: TokenPositions, index: jax.Array) -> tuple[Any, RouterStats | None]:
        x, cache = carry
        x, (of_layer, stats) = block(x, where, None if cache is None else LayerCache(cache, index))
        return (x, None if cache is None else of_layer.layers), stats

    tokens = None if cache is None else x.shape[1]
    scanned = nn.scan(
        layer,
        variable_axes=dict.fromkeys(("params", SCALES, TURNED, ROUTER, EXPERT_PLACEMENT, CHOICES, LAYER), 0),
        variable_broadcast=STACKS,
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        out_axes=0,
        length=layers,
        unroll=layers if unrolls(layers, block.runtime, tokens=tokens) else 1,
        metadata_params=LAYERS,
    )
    (x, cache), stats = scanned(block, (x, cache), where, jnp.arange(layers, dtype=jnp.int32))
    return x, cache, stats
