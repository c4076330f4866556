"""Causal attention with decoupled heads in plain JAX, one block of queries and one block of keys at a time.

The online softmax of FlashAttention-2 (Dao, 2023, algorithms 1 and 2) as one scan over pairs of blocks: memory is
linear in the number of tokens, on any backend, in any dtype. Pairs above the diagonal aren't in the scan, and pairs
that segments or indices mask are skipped at run time. The backward pass recomputes scores from their log-sum-exps.

Arrays are first split into blocks, (blocks, B, K, rows, width), so that each step of the scan is a batched matmul. K is
H, or 1 where all heads share keys and values (the absorbed form): then a token's queries are H rows of one matrix.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mla_prefill.residuals import residual

BLOCK = 256
"""Tokens per block of queries and of keys, or fewer if there aren't as many; twice as many from `LONG` on."""
LONG = 4096
"""On accelerators few large steps are faster; small steps skip more of a short sequence's triangle."""
UNSEEN = -1e30
"""The score of masked pairs. Differences of minus infinity would be NaN."""


Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
"""Queries, plain and rotated; keys, plain and rotated; values."""


class Places(NamedTuple):
    """Positions and segments: (B or 1, T) int32 each, or in blocks, (blocks, B or 1, rows)."""

    position: jax.Array
    segment: jax.Array


def attention(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *,
    q_index: jax.Array | None = None,
    k_index: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    scale: float,
) -> jax.Array:
    """Attention of each query to keys that don't come after it. Differentiable, once, in the five arrays.

    Args:
      q_nope, q_rope: (B, T, H, N) and (B, T, H, P).
      k_nope: (B, S, H, N); or (B, S, 1, N), one key for all heads: the absorbed form.
      k_rope: (B, S, P), shared by all heads.
      v: (B, S, H, V), or (B, S, 1, V).
      q_index, k_index: (B or 1, T) and (B or 1, S) int32: a query attends to keys whose index is at most its own. None
        for both: the queries are the last T of S tokens in order.
      q_segments, k_segments: (B or 1, T) and (B or 1, S) int32: and whose segment equals its own. None for both: a
        single segment.
      scale: what multiplies the scores.

    Returns:
      (B, T, H, V) of `v`'s dtype. Statistics and sums are in float32, or in float64 if the inputs are. A query without
      keys gets zeros.
    """
    tokens, keys = q_nope.shape[1], k_nope.shape[1]
    in_order, one_segment = q_index is None, q_segments is None
    if q_index is None or k_index is None:
        q_index, k_index = keys - tokens + jnp.arange(tokens)[None], jnp.arange(keys)[None]
    if q_segments is None or k_segments is None:
        q_segments, k_segments = jnp.zeros((1, tokens), jnp.int32), jnp.zeros((1, keys), jnp.int32)
    # What fills up the last block of keys comes after all queries.
    places = _cut_places(q_index, q_segments), _cut_places(k_index, k_segments, np.iinfo(np.int32).max)
    out: jax.Array = _attention((q_nope, q_rope, k_nope, k_rope, v), places, float(scale), in_order, one_segment)
    return out


def mla_prefill(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    segments: jax.Array | None = None,
) -> jax.Array:
    """See `api.mla_prefill`."""
    mine = None if segments is None else segments[:, k_nope.shape[1] - q_nope.shape[1] :]
    return attention(q_nope, q_rope, k_nope, k_rope, v, q_segments=mine, k_segments=segments, scale=scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _attention(
    arrays: Arrays, places: tuple[Places, Places], scale: float, in_order: bool, one_segment: bool
) -> jax.Array:
    return _forward(arrays, places, scale, in_order, one_segment)[0]


def _forward(
    arrays: Arrays, places: tuple[Places, Places], scale: float, in_order: bool, one_segment: bool
) -> tuple[jax.Array, jax.Array]:
    """The output (B, T, H, V), and the log-sum-exps of scores (blocks of queries, B, K, rows) for the gradient."""
    arrays, (places, pairs) = _as_one(arrays, (places, _pairs(arrays, places, in_order, by_keys=False)))
    q, k_nope, k_rope, v = _cut_all(arrays)
    wide, value = jnp.promote_types(q.dtype, jnp.float32), arrays[4]
    zeros = jnp.zeros(q.shape[1:-1], wide)
    fresh = zeros + UNSEEN, zeros, jnp.zeros((*zeros.shape, v.shape[-1]), wide)

    def step(carry: Any, pair: Any) -> tuple[Any, None]:
        i, j, first, seen = pair

        def attend(state: Any) -> Any:
            top, total, acc = state
            scores, mask = _scores(q[i], _key(k_nope[j], k_rope[j]), places, i, j, scale)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0)
            fade = jnp.exp(top - new_top)
            total = fade * total + jnp.sum(weights, axis=-1)
            acc = fade[..., None] * acc + _matmul(weights.astype(v.dtype), v[j])
            return new_top, total, acc

        state, out, lse = carry
        state = jax.tree.map(lambda new, old: jnp.where(first, new, old), fresh, state)
        state = attend(state) if in_order and one_segment else lax.cond(seen, attend, lambda state: state, state)
        top, total, acc = state
        total = jnp.where(total > 0, total, 1)
        out = out.at[i].set((acc / total[..., None]).astype(out.dtype))
        return (state, out, lse.at[i].set(top + jnp.log(total))), None

    out, lse = jnp.zeros((*q.shape[:-1], v.shape[-1]), value.dtype), jnp.zeros(q.shape[:-1], wide)
    (_, out, lse), _ = lax.scan(step, (fresh, out, lse), pairs)
    return _join(out, (*arrays[0].shape[:3], v.shape[-1])), lse


def _vjp_forward(
    arrays: Arrays, places: tuple[Places, Places], scale: float, in_order: bool, one_segment: bool
) -> tuple[jax.Array, Any]:
    out, lse = map(residual, _forward(arrays, places, scale, in_order, one_segment))
    return out, (arrays, places, out, lse)


def _vjp_backward(
    scale: float, in_order: bool, one_segment: bool, residuals: Any, dout: jax.Array
) -> tuple[Arrays, None]:
    arrays, places, out, lse = residuals
    arrays, (places, pairs) = _as_one(arrays, (places, _pairs(arrays, places, in_order, by_keys=True)))
    q, k_nope, k_rope, v = _cut_all(arrays)
    wide, heads = lse.dtype, v.shape[2]
    delta = jnp.einsum("bthv,bthv->bth", dout.astype(wide), out.astype(wide))
    delta, dout = _cut(delta[..., None], heads)[..., 0], _cut(dout.astype(v.dtype), heads)
    nope = k_nope.shape[-1]

    def step(carry: Any, pair: Any) -> tuple[Any, None]:
        i, j, first, seen = pair

        def attend(sums: Any) -> Any:
            dk, dv, dq = sums
            key = _key(k_nope[j], k_rope[j])
            scores, mask = _scores(q[i], key, places, i, j, scale)
            weights = jnp.where(mask, jnp.exp(scores - lse[i][..., None]), 0)
            dv += _matmul(weights.astype(dout.dtype).mT, dout[i])
            dweights = _matmul(dout[i], v[j].mT)
            dscores = (weights * (dweights - delta[i][..., None]) * scale).astype(q.dtype)
            return dk + _matmul(dscores.mT, q[i]), dv, dq.at[i].add(_matmul(dscores, key))

        (dk, dv, dq), (dk_nope_all, dk_rope_all, dv_all) = carry
        sums = jnp.where(first, 0, dk), jnp.where(first, 0, dv), dq
        sums = attend(sums) if in_order and one_segment else lax.cond(seen, attend, lambda sums: sums, sums)
        dk, dv, _ = sums
        done = (
            dk_nope_all.at[j].set(dk[..., :nope].astype(k_nope.dtype)),
            dk_rope_all.at[j].set(jnp.sum(dk[..., nope:], axis=1, keepdims=True).astype(k_rope.dtype)),
            dv_all.at[j].set(dv.astype(v.dtype)),
        )
        return (sums, done), None

    zeros = functools.partial(jnp.zeros, dtype=wide)
    sums = zeros((*k_nope.shape[1:-1], q.shape[-1])), zeros(v.shape[1:]), zeros(q.shape)
    done = tuple(map(jnp.zeros_like, (k_nope, k_rope, v)))
    ((_, _, dq), (dk_nope, dk_rope, dv)), _ = lax.scan(step, (sums, done), pairs)
    q_nope, keys = arrays[0], arrays[2:]
    dq = _join(dq.astype(q.dtype), (*q_nope.shape[:3], q.shape[-1]))
    dk_rope = _join(dk_rope, (*keys[1].shape[:2], 1, keys[1].shape[2]))[:, :, 0]
    return (dq[..., :nope], dq[..., nope:], _join(dk_nope, keys[0].shape), dk_rope, _join(dv, keys[2].shape)), None


_attention.defvjp(_vjp_forward, _vjp_backward)


def _as_one(arrays: Arrays, known: Any) -> tuple[Arrays, Any]:
    """Returns both values, with an optimisation barrier between them.

    Otherwise, differentiating a scan around this one would hoist and save the masks of all pairs of blocks.
    """
    both: tuple[Arrays, Any] = lax.optimization_barrier((arrays, known))
    return both


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _key(nope: jax.Array, rope: jax.Array) -> jax.Array:
    """A block of keys (B, K, rows, N + P)."""
    return jnp.concatenate([nope, jnp.broadcast_to(rope, (*nope.shape[:3], rope.shape[-1]))], axis=-1)


def _scores(
    q: jax.Array, key: jax.Array, places: tuple[Places, Places], i: jax.Array, j: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Scores of blocks i and j: (B, K, query rows, key rows), `UNSEEN` outside the mask; and the mask."""
    q_places, k_places = places
    mask = k_places.position[j][:, None] <= q_places.position[i][:, :, None]
    mask &= k_places.segment[j][:, None] == q_places.segment[i][:, :, None]
    mask = jnp.tile(mask, (1, q.shape[2] // mask.shape[1], 1))[:, None]
    return jnp.where(mask, _matmul(q, key.mT) * scale, UNSEEN), mask


def _block(tokens: int) -> int:
    return min(tokens, BLOCK if tokens < LONG else 2 * BLOCK)


def _cut(x: jax.Array, heads: int) -> jax.Array:
    """(B, T, H, D) as (blocks, B, heads, rows, D), filled up with zeros; a token has H / heads rows."""
    batch, tokens, all_heads, width = x.shape
    block = _block(tokens)
    x = jnp.pad(x, ((0, 0), (0, -tokens % block), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, block, heads, all_heads // heads, width).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(len(x), batch, heads, -1, width)


def _cut_all(arrays: Arrays) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Queries, plain keys, rope keys and values."""
    q_nope, q_rope, k_nope, k_rope, v = arrays
    heads = k_nope.shape[2]
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    return _cut(q, heads), _cut(k_nope, heads), _cut(k_rope[:, :, None], 1), _cut(v, heads)


def _cut_places(index: jax.Array, segment: jax.Array, later: int | None = None) -> Places:
    """Two (B or 1, T) as (blocks, B or 1, rows). The last block is filled up with its last place, or `later`."""
    block = _block(index.shape[1])

    def cut(x: jax.Array, **how: Any) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), **how)
        return x.reshape(len(x), -1, block).swapaxes(0, 1)

    index = cut(index, mode="edge") if later is None else cut(index, constant_values=later)
    return Places(index, cut(segment, mode="edge"))


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_cut`: (B, T, H, D) of a shape."""
    batch, tokens, all_heads, width = shape
    count, _, heads = x.shape[:3]
    x = x.reshape(count, batch, heads, all_heads // heads, -1, width).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, -1, all_heads, width)[:, :tokens]


def _pairs(arrays: Arrays, places: tuple[Places, Places], in_order: bool, by_keys: bool) -> tuple[jax.Array, ...]:
    """The scan's pairs: a block of queries, one of keys, whether a row of pairs starts, whether anything may be seen.

    A row of pairs has one block of queries; or of keys, `by_keys`.
    """
    tokens, keys = arrays[0].shape[1], arrays[2].shape[1]
    q, k = places
    i, j = (x.reshape(-1) for x in np.indices((len(q.position), len(k.position))))
    if in_order:
        below = j * k.position.shape[2] < keys - tokens + np.minimum((i + 1) * q.position.shape[2], tokens)
        i, j = i[below], j[below]
    if by_keys:
        order = np.lexsort((i, j))
        i, j = i[order], j[order]
    row = j if by_keys else i
    first = np.append(True, row[1:] != row[:-1])
    seen = jnp.min(k.position, axis=2)[j] <= jnp.max(q.position, axis=2)[i]
    seen &= jnp.min(k.segment, axis=2)[j] <= jnp.max(q.segment, axis=2)[i]
    seen &= jnp.min(q.segment, axis=2)[i] <= jnp.max(k.segment, axis=2)[j]
    return jnp.asarray(i), jnp.asarray(j), jnp.asarray(first), jnp.any(seen, axis=1)
