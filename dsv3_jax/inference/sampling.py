"""Sampling of the next token from logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dsv3_jax.config import ConfigError
from pallas_kernels.devices import platform


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling parameters: greedy at temperature 0, otherwise sampling from the modified distribution.

    As in transformers, penalties and biases are applied first, then temperature, top-k, top-p on the remaining tokens,
    and min-p.
    """

    temperature: float = 1.0
    """Divides the logits; 0 selects the most likely token."""
    top_k: int | None = None
    """Samples only from this many most likely tokens, and ties with the last of them."""
    top_p: float = 1.0
    """Samples only from the most likely tokens that together have this fraction of the probability left by top_k."""
    min_p: float = 0.0
    """Samples only from tokens with at least this fraction of the probability of the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens in the prompt or the text."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the text."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens once per occurrence in the text."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    """Added to the logits of these tokens."""
    seed: int | None = None
    """Seed, which makes a text reproducible whatever else runs, with drafts or without, up to the rounding of logits:
    it differs a little between sizes of batches. By default each text has its own."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a text, besides the model's end tokens."""
    ignore_eos: bool = False
    """Continue after the model's end tokens."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0, math.inf),
            ("min_p", 0, 1),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
        ):
            value = getattr(self, name)
            if not low <= value <= high or math.isinf(value):
                limits = f"from {low} to {high}" if high < math.inf else "0 (greedy) or positive"
                raise ConfigError(f"{name} is {value}: it must be {limits}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}: it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}: it must be positive")

    @property
    def edits(self) -> bool:
        """Whether there are penalties or biases."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(penalties or self.logit_bias)


GREEDY, DRAWN, TOP_P, ALL = range(4)
"""How much of `Sampling` a batch wants: the most likely tokens; drawing by temperature; top-p; top-k and min-p too.

The host knows it and chooses the program: a condition on the device would have it wait for the logits there."""


def kind(samplings: Iterable[Sampling]) -> int:
    """The least of GREEDY, DRAWN, TOP_P and ALL that draws as each of a batch wants."""
    drawn = [s for s in samplings if s.temperature > 0]
    if any(s.top_k is not None or s.min_p > 0 for s in drawn):
        return ALL
    return TOP_P if any(s.top_p < 1 for s in drawn) else DRAWN if drawn else GREEDY


@struct.dataclass
class Rows:
    """`Sampling` for a batch, each (B,): float32, int32 top_k with 0 for none, uint32 seed."""

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray


def rows(samplings: Sequence[Sampling], seeds: Sequence[int]) -> Rows:
    """Collects the sampling parameters of a batch on the host."""

    def column(values: Iterable[float], dtype: type[np.generic]) -> np.ndarray:
        return np.array(list(values), dtype)

    return Rows(
        column((s.temperature for s in samplings), np.float32),
        column((min(s.top_k or 0, 2**31 - 1) for s in samplings), np.int32),
        column((max(s.top_p, 1e-9) for s in samplings), np.float32),  # as 0 it would leave no token
        column((s.min_p for s in samplings), np.float32),
        column((seed % 2**32 for seed in seeds), np.uint32),
    )


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Draws one token per row: logits (B, V) float, a typed key -> (B,) int32. Ignores penalties and biases."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, cut(logits, sampling), axis=-1).astype(jnp.int32)


def cut(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the logits of the sampled distribution at a positive temperature, -inf for excluded tokens.

    (B, V) float -> (B, V) float32.
    """
    column = rows([sampling] * len(logits), [0] * len(logits))
    return _cut(logits, jax.tree.map(jnp.asarray, column), kind([sampling]))


def sample_rows(logits: jax.Array, how: Rows, positions: jax.Array, kind: int = ALL) -> jax.Array:
    """Draws one token of each row by the row's own sampling.

    Random numbers depend only on the row's seed and the position of the token in its text, so that the tokens of a text
    are the same whatever else is in the batch, and after a restart.

    Args:
      logits: (B, V) float32. positions: (B,) int32, of the tokens to draw.
      kind: at least what `kind` says of the rows.

    Returns (B,) int32.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if kind == GREEDY:
        return best
    allowed = _cut(logits, how, kind)
    keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(jnp.asarray(how.seed), positions)
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, allowed.shape[1:]))(keys)
    drawn = jnp.argmax(allowed + gumbel, axis=-1).astype(jnp.int32)
    return jnp.where(how.temperature > 0, drawn, best)


def _cut(logits: jax.Array, how: Rows, kind: int) -> jax.Array:
    """`cut` by each row's sampling; rows of temperature 0 are for the caller to leave out."""
    logits = logits.astype(jnp.float32)
    temperature = jnp.where(how.temperature > 0, how.temperature, 1)[:, None]
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature  # no overflow at small temperatures
    if kind >= ALL:
        logits = _cut_top_k(logits, jnp.asarray(how.top_k))
    if kind >= TOP_P:
        logits = _cut_top_p(logits, jnp.asarray(how.top_p))
    return jnp.where(logits < jnp.log(how.min_p)[:, None], -jnp.inf, logits) if kind >= ALL else logits


def _cut_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    wanted = jnp.where(k > 0, jnp.minimum(k, logits.shape[-1]), logits.shape[-1])
    ordered = _ordered(logits)
    least = _least(ordered, jnp.int32(1), wanted)
    return jnp.where(ordered >= least[:, None], logits, -jnp.inf)


def _cut_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    vocabulary, ordered = logits.shape[-1], _ordered(logits)
    chances = jnp.exp(logits)
    chances /= chances.sum(axis=-1, keepdims=True)
    least = _least(ordered, chances, p)[:, None]
    # Of equally likely tokens at the limit, the first: as many as it takes.
    last = ordered == least
    before = jnp.sum(jnp.where(ordered > least, chances, 0), axis=-1)
    each = jnp.max(jnp.where(last, chances, 0), axis=-1)
    wanted = jnp.maximum(jnp.ceil((p - before) / each), 1)
    from_end = jnp.where(last, jnp.uint32(vocabulary) - jnp.arange(vocabulary, dtype=jnp.uint32), 0)
    first = _least(from_end, jnp.float32(1), wanted, bits=vocabulary.bit_length())[:, None]
    allowed = (ordered > least) | (last & (from_end >= first))
    return jnp.where(allowed | (p >= 1)[:, None], logits, -jnp.inf)


def _ordered(logits: jax.Array) -> jax.Array:
    """Maps float32 logits to unsigned integers in the same order."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _least(
    keys: jax.Array, weights: jax.Array, wanted: jax.Array, bits: int = 32, at_a_time: int | None = None
) -> jax.Array:
    """The largest value (B,) uint32 for which the weights of the keys at or above it add up to `wanted` (B,).

    It is found some bits at a time, with a pass over the vocabulary each: a sort would take many times as long.

    Args:
      keys: (B, V) uint32 below 2^bits. weights: (B, V) or () of `wanted`'s dtype, not negative.
      at_a_time: 1, 2 or 4 bits; by default 4, whose 15 sums a pass adds up while it waits for memory, on a CPU 1.
    """
    size = at_a_time or (1 if platform() == "cpu" else 4)
    passes = -(-bits // size)

    def decide(i: jax.Array, least: jax.Array) -> jax.Array:
        shift = jnp.uint32(size) * (passes - 1 - i).astype(jnp.uint32)
        candidates = [least | (jnp.uint32(digit) << shift) for digit in range(1, 1 << size)]
        sums = _sums([jnp.where(keys >= c[:, None], weights, jnp.zeros((), wanted.dtype)) for c in candidates])
        digit: jax.Array = jnp.stack([s >= wanted for s in sums]).sum(axis=0, dtype=jnp.uint32)
        found: jax.Array = least | (digit << shift)
        return found

    start = jnp.zeros(len(keys), jnp.uint32)
    least: jax.Array = jax.lax.fori_loop(0, passes, decide, start, unroll=size > 1)
    return least


def _sums(of: list[jax.Array]) -> Sequence[jax.Array]:
    """Sums over the last axis of arrays (B, V), in one pass for all."""
    zero = jnp.zeros((), of[0].dtype)
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))
    sums: Sequence[jax.Array] = jax.lax.reduce(tuple(of), (zero,) * len(of), add, (1,))
    return sums


@struct.dataclass
class Edits:
    """Changes to the logits of a batch, each (B, V) float32: the repetition `factor`, then the added `bias`."""

    factor: jax.Array | np.ndarray
    bias: jax.Array | np.ndarray


def edit(logits: jax.Array, edits: Edits) -> jax.Array:
    """Returns logits (B, V) after penalties, biases and masks."""
    logits = jnp.where(logits > 0, logits / edits.factor, logits * edits.factor)
    return logits + edits.bias


def edits_of(
    vocabulary: int, sampling: Sampling, prompt: Sequence[int], text: Sequence[int], allowed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """A row of `Edits`, on the host.

    prompt, text: their tokens. allowed: (V,) bool, the tokens that a grammar allows next, or None for all.
    """
    factor, bias = np.ones(vocabulary, np.float32), np.zeros(vocabulary, np.float32)
    if sampling.repetition_penalty != 1:
        factor[np.array([*prompt, *text], int)] = sampling.repetition_penalty
    if text:
        counts = np.bincount(np.array(text, int), minlength=vocabulary)
        bias -= sampling.presence_penalty * (counts > 0) + sampling.frequency_penalty * counts
    for token, value in sampling.logit_bias.items():
        bias[token] += value
    if allowed is not None:
        bias[~allowed] = -np.inf
    return factor, bias
