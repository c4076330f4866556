"""Splits ragged sequences into pieces of similar length, to distribute the work evenly over multiprocessors."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

WHOLE, NONE = -1, -2
"""Values instead of a slot: the piece is a whole sequence; there is no piece."""


class Plan(NamedTuple):
    """The work of thread blocks in one decoding step. It depends only on the lengths, so that all layers share it.

    work: (pieces, 4) int32: the sequence, first page and end page of each piece, and the slot of its partial result, or
      WHOLE or NONE. Longest first, so that the hardware's scheduling balances well.
    slots: (B, 2) int32: the first slot of each sequence, and its number of slots.
    """

    work: jax.Array
    slots: jax.Array


def plan(lengths: jax.Array, *, page_size: int, pieces: int) -> Plan:
    """Splits the pages of each sequence into equal pieces no longer than a bound, or an eighth more for a single piece.

    With the bound c = ceil(all pages / (pieces - B)) there are sum(ceil(p / c)) <= all pages / c + B <= `pieces` of
    them. An empty sequence has one empty piece.

    Args:
      lengths: (B,) int32, in tokens.
      page_size: tokens per page.
      pieces: maximum number of pieces: B, in which case no sequence is split, or more.
    """
    batch = lengths.shape[0]
    if pieces < batch:
        raise ValueError(f"a plan needs at least one piece a sequence, but got {pieces} for {batch} sequences")
    pages = (lengths + page_size - 1) // page_size
    if pieces == batch:
        count = jnp.ones_like(pages)
    else:
        bound = -(-jnp.sum(pages) // (pieces - batch))
        # One that is hardly longer stays whole: as many turns, and nothing to merge.
        count = jnp.where(pages <= bound + bound // 8, 1, -(-pages // jnp.maximum(bound, 1)))
    ends = jnp.cumsum(count)
    slots = jnp.stack([ends - count, count], axis=1)

    index = jnp.arange(pieces)
    sequence = jnp.sum(index[:, None] >= ends, axis=1)  # equals B past the last piece
    real = sequence < batch
    sequence = jnp.minimum(sequence, batch - 1)
    share = -(-pages // count)
    share = (share + 1) // 2 * 2  # pages are worked on in pairs
    begin = jnp.minimum((index - slots[sequence, 0]) * share[sequence], pages[sequence])
    end = jnp.minimum(begin + share[sequence], pages[sequence])
    slot = jnp.where(real, jnp.where(count[sequence] > 1, index, WHOLE), NONE)
    work = jnp.stack([sequence, begin, end, slot], axis=1)
    order = jnp.argsort(jnp.where(real, begin - end, 1), stable=True)
    return Plan(work[order].astype(jnp.int32), slots.astype(jnp.int32))


def merge(out: jax.Array, lse: jax.Array, schedule: Plan) -> tuple[jax.Array, jax.Array]:
    """Merges the results of pieces by their log-sum-exps.

    Args:
      out: (pieces, rows, R) float32, in the order of `schedule.work`.
      lse: (pieces, rows) float32.

    Returns:
      (B, rows, R) and (B, rows) float32; 0 and -inf for rows without keys.
    """
    batch = schedule.slots.shape[0]
    sequence = jnp.where(schedule.work[:, 3] == NONE, batch, schedule.work[:, 0])  # batch: dropped
    top = jax.ops.segment_max(lse, sequence, batch + 1)
    weight = jnp.where(jnp.isneginf(lse), 0, jnp.exp(lse - jnp.maximum(top, -1e30)[sequence]))
    total = jax.ops.segment_sum(weight, sequence, batch + 1)[:batch]
    merged = jax.ops.segment_sum(weight[..., None] * out, sequence, batch + 1)[:batch]
    seen = total > 0
    safe = jnp.where(seen, total, 1)
    return merged / safe[..., None], jnp.where(seen, top[:batch] + jnp.log(safe), -jnp.inf)
