"""The two device programs of the engine: a chunk of one prompt, and a decoding step for all texts.

A step verifies drafts and makes new ones. With k drafts, the last token of a text and its drafts pass through the model
together. At each of these positions a token is drawn as without drafts, and is accepted as long as the drafts before it
equal the drawn tokens. So the tokens, greedy or sampled, are those of plain decoding, and one pass yields 1 to k + 1 of
them. The drafts come from the first MTP module, which is applied to its own output for those after the first.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.inference.paged_cache import PagePool, batch_cache, pool_of
from dsv3_jax.inference.sampling import Edits, Rows, edit, sample_rows
from dsv3_jax.model.transformer import DeepSeekV3

MOST_LOGPROBS = 20
"""Maximum number of alternatives with log-probabilities."""


def _apply(model: DeepSeekV3, *arguments: Any, method: str) -> Any:
    return model.apply(*arguments, method=method)


@struct.dataclass
class Slots:
    """Texts being generated, one per slot; the last slot is for padding.

    token: (S,) int32, the last token, not in the cache yet. length: (S,) int32, tokens in the cache.
    drafts: (S, k) int32, drafted tokens after the last one.
    """

    token: jax.Array
    length: jax.Array
    drafts: jax.Array


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
    """Results of a step: tokens (B, k + 1) int32, of which the first `count` (B,) are valid; finite (B,): whether
    logits were.

    scores: of the tokens; None unless requested. prompt_scores: of a prompt's next tokens, (B, T), likewise.
    """

    tokens: jax.Array
    count: jax.Array
    finite: jax.Array
    scores: Scores | None = None
    prompt_scores: Scores | None = None


def init_slots(count: int, drafts: int) -> Slots:
    """Returns empty slots, with one more for padding."""
    zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
    return Slots(zeros(count + 1), zeros(count + 1), zeros((count + 1, drafts)))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("scored", "scored_prompt"), donate_argnums=(2, 3))
def prefill(
    model: DeepSeekV3,
    variables: Any,
    pool: PagePool,
    slots: Slots,
    tokens: jax.Array,
    following: jax.Array,
    tables: jax.Array,
    slot: jax.Array,
    cached: jax.Array,
    new: jax.Array,
    last: jax.Array,
    how: Rows,
    edits: Edits | None,
    *,
    scored: bool,
    scored_prompt: bool,
) -> tuple[PagePool, Slots, Drawn]:
    """Processes a chunk of one prompt; after the last chunk, draws the first token into the slot.

    Args:
      tokens, following: (1, T) int32, padded on the right: the chunk, and the token after each.
      tables: (1, n) int32. slot, cached, new: (1,) int32: the slot, the number of cached tokens, and of tokens in the
        chunk. last: (1,) bool.
      how, edits: for the token to draw.
    """
    hidden, cache = _apply(model, variables, tokens, batch_cache(pool, tables, cached, new), method="extend")
    at_last = jnp.take_along_axis(hidden, (new - 1)[:, None, None], axis=1)
    drawn, pool_after, slots = _finish(
        model, variables, pool_of(cache), slots, hidden, at_last, tables, slot, cached, new, how, edits, scored,
        following=following, drafted=None, last=last,
    )  # fmt: skip
    if scored_prompt:
        logits = _apply(model, variables, hidden, method="head")
        drawn = dataclasses.replace(drawn, prompt_scores=_scores(logits, following))
    return pool_after, slots, drawn


@functools.partial(jax.jit, static_argnums=0, static_argnames=("drafts", "scored"), donate_argnums=(2, 3))
def decode(
    model: DeepSeekV3,
    variables: Any,
    pool: PagePool,
    slots: Slots,
    tables: jax.Array,
    slot: jax.Array,
    real: jax.Array,
    plain: jax.Array,
    how: Rows,
    edits: Edits | None,
    *,
    drafts: int,
    scored: bool,
) -> tuple[PagePool, Slots, Drawn]:
    """Takes one decoding step for the texts in `slot` (B,) int32.

    Args:
      tables: (B, n) int32. real: (B,) bool, not padding. plain: (B,) bool, texts whose drafts are ignored.
      drafts: number of drafts to verify, all of the slots' or none.
    """
    drafted = slots.drafts[slot][:, :drafts]
    tokens = jnp.concatenate([slots.token[slot][:, None], drafted], axis=1)
    length, new = slots.length[slot], jnp.where(real, 1 + drafts, 0)
    hidden, cache = _apply(model, variables, tokens, batch_cache(pool, tables, length, new), method="extend")
    drawn, pool, slots = _finish(
        model, variables, pool_of(cache), slots, hidden, hidden, tables, slot, length, new, how, edits, scored,
        following=None, drafted=jnp.where(plain[:, None], -1, drafted), last=real,
    )  # fmt: skip
    return pool, slots, drawn


def _finish(
    model: DeepSeekV3,
    variables: Any,
    pool: PagePool,
    slots: Slots,
    hidden: jax.Array,
    wanted: jax.Array,
    tables: jax.Array,
    slot: jax.Array,
    cached: jax.Array,
    new: jax.Array,
    how: Rows,
    edits: Edits | None,
    scored: bool,
    *,
    following: jax.Array | None,
    drafted: jax.Array | None,
    last: jax.Array,
) -> tuple[Drawn, PagePool, Slots]:
    """Draws from hidden states `wanted` (B, N, D), verifies `drafted` (B, N - 1), drafts, and updates the slots."""
    logits = _apply(model, variables, wanted, method="head")
    raw, (batch, count, _) = logits, logits.shape
    if edits is not None:  # of the first position: texts that have any don't count their drafts
        logits = logits.at[:, 0].set(edit(logits[:, 0], edits))
    first = cached + new if drafted is None else cached + 1
    positions = first[:, None] + jnp.arange(count, dtype=jnp.int32)
    repeat = lambda x: jnp.repeat(jnp.asarray(x), count, axis=0)
    flat = sample_rows(logits.reshape(batch * count, -1), jax.tree.map(repeat, how), positions.ravel())
    tokens = flat.reshape(batch, count)
    accepted = jnp.zeros(batch, jnp.int32)
    if drafted is not None and count > 1:
        accepted = jnp.cumprod(tokens[:, :-1] == drafted, axis=1).sum(axis=1).astype(jnp.int32)
    token = jnp.take_along_axis(tokens, accepted[:, None], axis=1)[:, 0]
    length = cached + (new if drafted is None else accepted + 1)
    drawn = Drawn(tokens, accepted + 1, jnp.isfinite(raw).all((1, 2)), _scores(raw, tokens) if scored else None)

    drafts = slots.drafts[slot]
    if slots.drafts.shape[1] and (drafted is None or count > 1):
        if following is None:
            following, ends, held = tokens, accepted, jnp.where(last, accepted + 1, 0)
        else:
            at_end = jnp.arange(following.shape[1]) == (new - 1)[:, None]
            following = jnp.where(at_end & last[:, None], token[:, None], following)
            ends, held = new - 1, new
        drafts, pool = _draft(model, variables, pool, hidden, following, tables, cached, held, ends, drafts.shape[1])
    new_slots = Slots(token, length, drafts)
    return drawn, pool, jax.tree.map(lambda state, value: state.at[slot].set(value), slots, new_slots)


def _draft(
    model: DeepSeekV3,
    variables: Any,
    pool: PagePool,
    hidden: jax.Array,
    following: jax.Array,
    tables: jax.Array,
    cached: jax.Array,
    new: jax.Array,
    ends: jax.Array,
    count: int,
) -> tuple[jax.Array, PagePool]:
    """Drafts `count` tokens after each text, one after the other. Returns them, and the pool with the module's entries.

    hidden (B, T, D), following (B, T): of the tokens after `cached` (B,), of which `new` (B,) are real; the text ends
    with the `following` one at `ends` (B,).
    """

    def apply(hidden: jax.Array, following: jax.Array, at: jax.Array, new: jax.Array, pool: PagePool) -> Any:
        cache = batch_cache(pool, tables, at, new)
        hidden, cache = _apply(model, variables, hidden, following, cache, method="draft")
        return hidden, pool_of(cache)

    hidden, pool = apply(hidden, following, cached, new, pool)
    hidden, drafts = jnp.take_along_axis(hidden, ends[:, None, None], axis=1), []
    for i in range(count):
        drafts.append(jnp.argmax(_apply(model, variables, hidden, method="head"), axis=-1).astype(jnp.int32))
        if i + 1 < count:
            hidden, pool = apply(hidden, drafts[-1], cached + ends + 1 + i, jnp.minimum(new, 1), pool)
    return jnp.concatenate(drafts, axis=1), pool


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
