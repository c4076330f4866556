"""What training minimises: next token, further tokens, balance (report eq. 17 to 20 and 24 to 25)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.model.router import RouterStats
from dsv3_jax.model.transformer import DeepSeekV3, Outputs
from dsv3_jax.parallel.context import sequence_order

Batch = Mapping[str, jax.Array]
"""`tokens` and `targets` (B, T) int32, the latter one token ahead, or `IGNORE` where nothing is to be predicted;
`segments` and `positions` (B, T) int32 if attention stays within documents."""

_KEYS = ("tokens", "targets", "segments", "positions")

IGNORE = -100
"""The target of a position that isn't trained: PyTorch's and transformers' value."""


@struct.dataclass
class Tally:
    """Sums over the tokens of a batch, so that pieces of a batch add up. float32 scalars, except the loads.

    cross_entropy: of the next token, in nats. mtp_cross_entropy: of the further tokens, a mean over depths.
    tokens, mtp_tokens: how many were predicted. mtp_correct: of those, predicted right by the argmax.
    balance: eq. 17 without its factor, summed over sequences and layers. sequences: how many.
    load: tokens sent to each expert, keyed as the `router` collection is: {"moe_layers": (L, E), "mtp_0": (E,), ...}.
    """

    cross_entropy: jax.Array
    tokens: jax.Array
    mtp_cross_entropy: jax.Array
    mtp_tokens: jax.Array
    mtp_correct: jax.Array
    balance: jax.Array
    sequences: jax.Array
    load: dict[str, jax.Array]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target), in nats: logits (..., V) float, targets (...) int32 -> (...) float32 or wider.

    NaN for a target outside the vocabulary, `IGNORE` too: that is for the caller to mask.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    index = jnp.where(targets < 0, logits.shape[-1], targets)  # negative ones would count from the end
    chosen = jnp.take_along_axis(logits, index[..., None], axis=-1, mode="fill")[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def balance_loss(stats: RouterStats) -> jax.Array:
    """The sequence-wise balance loss, sum_i f_i P_i (eq. 17 without alpha): stats of (..., B, E) -> (..., B)."""
    return jnp.sum(stats.fraction * stats.affinity, axis=-1)


def shift_left(x: jax.Array, by: int) -> jax.Array:
    """x[:, i] becomes x[:, i + by]; the last `by` entries repeat the last one and are for the caller to mask."""
    return jnp.concatenate([x[:, by:], jnp.repeat(x[:, -1:], by, axis=1)], axis=1) if by else x


def predictable(batch: Batch, ahead: int) -> jax.Array:
    """Which positions (B, T) have a target `ahead` tokens on: within the sequence and, with segments, the document.

    The row's last target, which lies just past it, counts to the document of the row's last token, unless it is
    `IGNORE`. Nor does any other target that is.
    """
    tokens, segments, targets = batch["tokens"], batch.get("segments"), batch.get("targets")
    there = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < tokens.shape[1] - (ahead - 1), tokens.shape)
    if segments is not None:
        there &= shift_left(segments, ahead) == segments
    if targets is not None:
        there &= shift_left(targets, ahead - 1) != IGNORE
    return there


@struct.dataclass
class LaidOut:
    """A batch as the model takes it: its tokens in the order in which they lie over devices.

    further_tokens: (B, T) each, the tokens 1 to D ahead, which the MTP modules take. targets, masks: (B, T) each, of
    the next token and of the one k further, for k up to D; `masks` says which of them there are. where: `positions`,
    `segments` and `order`, as the model's methods take them.
    """

    tokens: jax.Array
    further_tokens: tuple[jax.Array, ...]
    targets: tuple[jax.Array, ...]
    masks: tuple[jax.Array, ...]
    where: dict[str, Any]


def lay_out(model: DeepSeekV3, batch: Batch) -> LaidOut:
    """Everything that looks along the sequence, which comes before its tokens are laid out over devices.

    Raises:
      ValueError: the batch has a key that isn't known: what it is meant to change would be left out in silence.
    """
    if unknown := sorted(set(batch) - set(_KEYS)):
        raise ValueError(f"a batch has {unknown[0]!r}: its keys are {', '.join(_KEYS)}")
    tokens, ahead = batch["tokens"], range(model.config.num_nextn_predict_layers + 1)
    last = batch["targets"][:, -1:]
    following = jnp.concatenate([tokens[:, 1:], jnp.where(last == IGNORE, tokens[:, -1:], last)], axis=1)
    order = sequence_order(tokens.shape[1], model.runtime)
    lie = lambda x: x if order is None else x[:, order]
    positions, segments = batch.get("positions"), batch.get("segments")
    if order is not None and positions is None:
        positions = jnp.broadcast_to(jnp.arange(len(order), dtype=jnp.int32), tokens.shape)
    return LaidOut(
        lie(tokens),
        tuple(lie(shift_left(following, k)) for k in ahead[:-1]),
        tuple(lie(shift_left(batch["targets"], k)) for k in ahead),
        tuple(lie(predictable(batch, k + 1)) for k in ahead),
        {
            "positions": None if positions is None else lie(positions),
            "segments": None if segments is None else lie(segments),
            "order": None if order is None else jnp.asarray(order),
        },
    )


def forward_tally(model: DeepSeekV3, variables: Mapping[str, Any], batch: Batch) -> Tally:
    """Runs the model on a batch and sums everything that the objective and the metrics need."""
    laid = lay_out(model, batch)
    out = model.apply(variables, laid.tokens, laid.further_tokens, method="forward", **laid.where)
    return tally_of(cast(Outputs, out), laid)


def tally_of(out: Outputs, laid: LaidOut) -> Tally:
    """Sums over a batch what the model made of it."""
    mask, depths = laid.masks[0], len(out.mtp_logits)
    total = lambda logits, targets, mask: jnp.sum(jnp.where(mask, cross_entropy(logits, targets), 0))
    nll = total(out.logits, laid.targets[0], mask)
    zero = jnp.zeros_like(nll)
    mtp_nll, mtp_count, mtp_correct = zero, zero, zero
    for logits, target, mask_k in zip(out.mtp_logits, laid.targets[1:], laid.masks[1:], strict=True):
        mtp_nll += total(logits, target, mask_k) / depths
        mtp_count += jnp.sum(mask_k)
        mtp_correct += jnp.sum((logits.argmax(-1) == target) & mask_k)

    stats = {} if out.stats is None else {"moe_layers": out.stats}
    stats |= {f"mtp_{k}": s for k, s in enumerate(out.mtp_stats)}
    return Tally(
        cross_entropy=nll,
        tokens=jnp.sum(mask).astype(nll.dtype),
        mtp_cross_entropy=mtp_nll,
        mtp_tokens=mtp_count,
        mtp_correct=mtp_correct,
        balance=sum((jnp.sum(balance_loss(s)) for s in stats.values()), zero),
        sequences=jnp.asarray(mask.shape[0], nll.dtype),
        load={name: jnp.sum(s.load, axis=-2) for name, s in stats.items()},
    )


def objective(tally: Tally, alpha: float, mtp_weight: jax.Array | float, tokens: jax.Array, sequences: jax.Array):
    """The training loss: CE + lambda/D sum_k CE_k (eq. 24, 25) + alpha sum over layers of the balance loss (eq. 17).

    Each CE_k is divided by the number of next-token targets, as eq. 24 divides by T; the balance loss is a mean
    over sequences. `tokens` and `sequences` are those of the whole batch, of which `tally` may be a piece. Without any
    target there is no CE to learn from: 0.
    """
    predicted = (tally.cross_entropy + mtp_weight * tally.mtp_cross_entropy) / jnp.maximum(tokens, 1)
    return predicted + alpha * tally.balance / sequences
