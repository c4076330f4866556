"""The device programs of the engine: a piece of a prompt, a step of all texts, and what is drawn after either.

A step makes drafts and verifies them. With k drafts a text's last token and its drafts pass through the model
together; the model's own choice at each of these positions is drawn as without drafts, and stands as long as the
drafts before it are what was drawn. So the tokens, greedy or sampled, are those of plain decoding, and one pass gives
1 to k + 1 of them. The first MTP module makes the drafts, applied to its own output for those after the first.

The module's cache follows the model's, in steps without drafts too, so that any step may have them. This takes little:
where only the cache is wanted, XLA leaves out the module's attention and experts.

Drawing is a program of its own: it has many variants, which compile fast, and the passes through the model have none.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dsv3_jax.inference.paged_cache import PagePool, batch_cache, pool_of, spread
from dsv3_jax.inference.sampling import Edits, Rows, edit, sample_rows
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.sharding import constrain

MOST_LOGPROBS = 20
"""Maximum number of alternatives with log-probabilities."""


def _apply(model: DeepSeekV3, *arguments: Any, method: str) -> Any:
    return model.apply(*arguments, method=method)


@struct.dataclass
class Slots:
    """Texts being generated, one per slot; the last slot is for padding.

    token: (S,) int32, the last token, not in the cache yet. length: (S,) int32, tokens in the cache.
    drafts: (S, k) int32, drafted tokens after the last one, which are being verified. Of the last step's tokens
    `hidden`: (S, k + 1, D), and `following`: (S, k + 1) int32, the token after each; of them `unseen`: (S,) int32,
    aren't in the MTP module's cache yet. Without drafts the last three are empty.
    """

    token: jax.Array
    length: jax.Array
    drafts: jax.Array
    hidden: jax.Array
    following: jax.Array
    unseen: jax.Array


@struct.dataclass
class Scores:
    """Log-probabilities by the model's logits, of the token and of the most likely ones. float32.

    token: (..., ) of the token. ids, values: (..., MOST_LOGPROBS), most likely first.
    """

    token: jax.Array
    ids: jax.Array
    values: jax.Array


@struct.dataclass
class Drawn:
    """Results of a step.

    result: (B, k + 3) int32, one array, which the host reads at once: k + 1 tokens, how many of them hold, and whether
    all logits were finite, of rejected drafts too. scores: of the tokens; None unless asked for.
    """

    result: jax.Array
    scores: Scores | None = None

    @property
    def tokens(self) -> jax.Array:
        return self.result[:, :-2]

    @property
    def count(self) -> jax.Array:
        return self.result[:, -2]

    @property
    def finite(self) -> jax.Array:
        return self.result[:, -1]


type Packed = tuple[jax.Array, ...]
"""A `Batch` on its way to the device: (B, 9) int32 and, for passes through the model, its tables."""


@struct.dataclass
class Batch:
    """Texts of a step, (B,) each.

    slot: int32, the last one for padding. cached: int32, of a prompt's piece the tokens before it. new: int32, its
    tokens; of a decoding step 1; 0 for padding. plain: whether drafts don't count. how: sampling. tables: (B, n)
    int32, pages.
    """

    slot: Any
    cached: Any
    new: Any
    plain: Any
    how: Rows
    tables: Any

    def pack(self) -> tuple[np.ndarray, np.ndarray]:
        """Packs on the host: few arrays, since each takes its time to hand over."""
        how = [self.how.temperature, self.how.top_k, self.how.top_p, self.how.min_p, self.how.seed]
        as_int: Any = lambda x: x.view(np.int32) if x.dtype in (np.float32, np.uint32) else x.astype(np.int32)
        columns = [as_int(np.asarray(c)) for c in (self.slot, self.cached, self.new, self.plain, *how)]
        return np.stack(columns, axis=1), self.tables

    @staticmethod
    def unpack(packed: Packed) -> Batch:
        """The opposite, on the device."""
        columns, *tables = packed
        slot, cached, new, plain, temperature, top_k, top_p, min_p, seed = columns.T
        floats: Any = lambda x: jax.lax.bitcast_convert_type(x, jnp.float32)
        seeds = jax.lax.bitcast_convert_type(seed, jnp.uint32)
        how = Rows(floats(temperature), top_k, floats(top_p), floats(min_p), seeds)
        return Batch(slot, cached, new, plain != 0, how, *tables or (None,))


def init_slots(model: DeepSeekV3, count: int, drafts: int) -> Slots:
    """Returns empty slots, with one more for padding."""
    slots, tokens = count + 1, drafts + 1 if drafts else 0
    zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
    hidden = jnp.zeros((slots, tokens, model.config.hidden_size), jnp.dtype(model.runtime.dtype))
    return Slots(zeros(slots), zeros(slots), zeros((slots, drafts)), hidden, zeros((slots, tokens)), zeros(slots))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def prefill(
    model: DeepSeekV3,
    variables: Any,
    pool: PagePool,
    slots: Slots,
    tokens: jax.Array,
    following: jax.Array,
    packed: Packed,
) -> tuple[PagePool, Slots, jax.Array, jax.Array]:
    """Adds pieces of prompts to their pages, and says so in their slots, as if their last tokens were yet to be drawn.

    tokens: (B, T) int32, padded on the right. following: (B, T) int32, the token after each; -1 where it isn't known.

    Returns pool and slots, hidden states (B, T, D), and logits (B, 1, V) after the pieces.
    """
    b = Batch.unpack(packed)
    hidden, cache = _apply(model, variables, tokens, batch_cache(pool, b.tables, b.cached, b.new), method="extend")
    pool = pool_of(cache)
    if pool.mtp is not None:
        known = jnp.sum(following >= 0, axis=1, dtype=jnp.int32)
        _, pool = _draft(model, variables, pool, hidden, jnp.maximum(following, 0), b.tables, b.cached, known)
    at_last = jnp.take_along_axis(hidden, (b.new - 1)[:, None, None], axis=1)
    length = jnp.maximum(b.cached + b.new - 1, 0)  # of padding 0
    slots = _with_hidden(model, slots, b.slot, at_last)
    slots = dataclasses.replace(slots, length=slots.length.at[b.slot].set(length))
    return spread(pool, model.runtime), slots, hidden, _apply(model, variables, at_last, method="head")


@functools.partial(jax.jit, static_argnums=0)
def score_prompt(model: DeepSeekV3, variables: Any, hidden: jax.Array, following: jax.Array) -> Scores:
    """Scores (B, T) of tokens (B, T) int32 by the hidden states (B, T, D) before each."""
    return _scores(_apply(model, variables, hidden, method="head"), following)


@functools.partial(jax.jit, static_argnums=0, static_argnames="drafts", donate_argnums=(2, 3))
def decode(
    model: DeepSeekV3, variables: Any, pool: PagePool, slots: Slots, packed: Packed, *, drafts: int
) -> tuple[PagePool, Slots, jax.Array]:
    """One step of the texts of a `Batch`, up to their logits.

    drafts: how many are made and verified: as many as slots hold, or none.

    Returns pool and slots, and logits (B, 1 + drafts, V).
    """
    b = Batch.unpack(packed)
    token, length = slots.token[b.slot][:, None], slots.length[b.slot]
    tokens = [token]
    if pool.mtp is not None:
        hidden, following, unseen = (x[b.slot] for x in (slots.hidden, slots.following, slots.unseen))
        new = jnp.where(b.new > 0, unseen, 0)
        before = hidden.shape[1] - 1 if drafts else hidden.shape[1]  # the last one makes the first draft
        new = jnp.maximum(new - 1, 0) if drafts else new
        at = jnp.maximum(length - unseen, 0)
        _, pool = _draft(model, variables, pool, hidden[:, :before], following[:, :before], b.tables, at, new)
        hidden = jnp.take_along_axis(hidden, (unseen - 1)[:, None, None], axis=1)
        for i in range(drafts):
            at = jnp.maximum(length - 1 + i, 0)
            hidden, pool = _draft(model, variables, pool, hidden, tokens[-1], b.tables, at, b.new)
            tokens.append(jnp.argmax(_apply(model, variables, hidden, method="head"), axis=-1).astype(jnp.int32))
    if drafts:
        slots = dataclasses.replace(slots, drafts=slots.drafts.at[b.slot].set(jnp.concatenate(tokens[1:], axis=1)))
    cache = batch_cache(pool, b.tables, length, b.new * (1 + drafts))
    hidden, cache = _apply(model, variables, jnp.concatenate(tokens, axis=1), cache, method="extend")
    logits = _apply(model, variables, hidden, method="head")
    return spread(pool_of(cache), model.runtime), _with_hidden(model, slots, b.slot, hidden), logits


def _with_hidden(model: DeepSeekV3, slots: Slots, slot: jax.Array, hidden: jax.Array) -> Slots:
    """Keeps hidden states (B, T, D) for the MTP module, if slots have room for them."""
    if not slots.hidden.size:
        return slots
    kept = slots.hidden.at[slot, : hidden.shape[1]].set(hidden)
    return dataclasses.replace(slots, hidden=constrain(kept, model.runtime, None, None, None))


def _draft(
    model: DeepSeekV3,
    variables: Any,
    pool: PagePool,
    hidden: jax.Array,
    following: jax.Array,
    tables: jax.Array,
    cached: jax.Array,
    new: jax.Array,
) -> tuple[jax.Array, PagePool]:
    """Passes tokens through the MTP module, which has its own pages.

    hidden (B, T, D), following (B, T): of the tokens after `cached` (B,), of which `new` (B,) are real.

    Returns hidden states (B, T, D) of the tokens after the `following` ones, and the pool.
    """
    cache = batch_cache(pool, tables, cached, new)
    hidden, cache = _apply(model, variables, hidden, following, cache, method="draft")
    return hidden, pool_of(cache)


@functools.partial(jax.jit, static_argnames=("kind", "scored"), donate_argnums=0)
def draw(
    slots: Slots, logits: jax.Array, packed: Packed, edits: Edits | None, *, kind: int, scored: bool
) -> tuple[Slots, Drawn]:
    """Draws after a piece or a step, accepts drafts, and writes the last token and the length into the slots.

    logits: (B, 1 + drafts, V). edits: of the first position; texts that have any don't count drafts.
    kind: as `sampling.kind` says. scored: whether log-probabilities are wanted.
    """
    b = Batch.unpack(packed)
    raw, (batch, count, _) = logits, logits.shape
    if edits is not None:
        logits = logits.at[:, 0].set(edit(logits[:, 0], edits))
    cached, drafted = slots.length[b.slot], slots.drafts[b.slot][:, : count - 1]
    positions = cached[:, None] + 1 + jnp.arange(count, dtype=jnp.int32)
    repeat = lambda x: jnp.repeat(x, count, axis=0)
    flat = sample_rows(logits.reshape(batch * count, -1), jax.tree.map(repeat, b.how), positions.ravel(), kind)
    tokens = flat.reshape(batch, count)
    right = (tokens[:, :-1] == drafted) & ~b.plain[:, None]
    accepted = jnp.cumprod(right, axis=1).sum(axis=1).astype(jnp.int32)
    last = jnp.take_along_axis(tokens, accepted[:, None], axis=1)[:, 0]
    length = jnp.where(b.new > 0, cached + accepted + 1, 0)  # padding never grows longer than its pages
    slots = dataclasses.replace(
        slots, token=slots.token.at[b.slot].set(last), length=slots.length.at[b.slot].set(length)
    )
    if slots.following.size:
        following = slots.following.at[b.slot, :count].set(tokens)
        slots = dataclasses.replace(slots, following=following, unseen=slots.unseen.at[b.slot].set(accepted + 1))
    finite = jnp.isfinite(raw).all((1, 2)).astype(jnp.int32)
    result = jnp.concatenate([tokens, (accepted + 1)[:, None], finite[:, None]], axis=1)
    return slots, Drawn(result, _scores(raw, tokens) if scored else None)


def _scores(logits: jax.Array, tokens: jax.Array) -> Scores:
    """logits (B, N, V), tokens (B, N); a token outside the vocabulary has no score."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    values, ids = jax.lax.top_k(logprobs, min(MOST_LOGPROBS, logits.shape[-1]))
    of_token = jnp.take_along_axis(logprobs, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
    return Scores(of_token, ids.astype(jnp.int32), values)


@functools.partial(jax.jit, donate_argnums=0)
def clear(pool: PagePool, pages: jax.Array) -> PagePool:
    """Zeroes pages (n,) int32, since non-finite values would affect their next holder (zero times NaN is NaN)."""
    return cast(PagePool, jax.tree.map(lambda x: x.at[:, pages].set(0), pool))
