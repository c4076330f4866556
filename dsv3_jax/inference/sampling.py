"""Sampling of the next token from logits."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dsv3_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling parameters: greedy at temperature 0, otherwise sampling from the modified distribution.

    Penalties and biases are applied first, then temperature, top-k, top-p on the remaining tokens, and min-p, as in
    transformers and vLLM.
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
    """Seed, which makes a text reproducible whatever else runs; by default each text has its own."""
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
        column((s.top_k or 0 for s in samplings), np.int32),
        column((s.top_p for s in samplings), np.float32),
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
    return _cut(logits, jax.tree.map(jnp.asarray, column))


def sample_rows(logits: jax.Array, how: Rows, positions: jax.Array) -> jax.Array:
    """Draws one token per row, with sampling parameters per row.

    Random numbers depend only on the row's seed and the position of the token in its text, so that the tokens of a text
    are the same whatever else is in the batch, and after a restart.

    Args:
      logits: (B, V) float32. positions: (B,) int32, of the tokens to draw.

    Returns (B,) int32.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = functools.partial(_draw, logits, how, positions)
    drawn = jax.lax.cond(jnp.any(how.temperature > 0), draw, lambda: best)
    return jnp.where(how.temperature > 0, drawn, best)


def _draw(logits: jax.Array, how: Rows, positions: jax.Array) -> jax.Array:
    cut = _cut(logits, how)
    keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(jnp.asarray(how.seed), positions)
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, cut.shape[1:]))(keys)
    return jnp.argmax(cut + gumbel, axis=-1).astype(jnp.int32)


def _cut(logits: jax.Array, how: Rows) -> jax.Array:
    """`cut` with sampling parameters per row. The caller must ignore rows with temperature 0."""
    logits = logits.astype(jnp.float32)
    temperature = jnp.where(how.temperature > 0, how.temperature, 1)[:, None]
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature  # no overflow at small temperatures
    logits = jax.lax.cond(jnp.any(how.top_k > 0), _cut_top_k, lambda logits, k: logits, logits, jnp.asarray(how.top_k))
    logits = jax.lax.cond(jnp.any(how.top_p < 1), _cut_top_p, lambda logits, p: logits, logits, jnp.asarray(how.top_p))
    return jnp.where(logits < jnp.log(how.min_p)[:, None], -jnp.inf, logits)


def _cut_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    wanted = jnp.where(k > 0, jnp.minimum(k, logits.shape[-1]), logits.shape[-1])
    ordered = _ordered(logits)
    least = _least(ordered, lambda above: jnp.sum(above, axis=-1, dtype=jnp.int32) >= wanted)
    return jnp.where(ordered >= least[:, None], logits, -jnp.inf)


def _cut_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    chances, ordered = jax.nn.softmax(logits, axis=-1), _ordered(logits)

    def total(mask: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, chances, 0), axis=-1)

    least = _least(ordered, lambda above: total(above) >= p)[:, None]
    # Of equally likely tokens at the limit, the first.
    last = ordered == least
    before = total(ordered > least)[:, None] + jnp.cumsum(jnp.where(last, chances, 0), axis=-1) - chances
    allowed = (ordered > least) | (last & (before < p[:, None]))
    return jnp.where(allowed | (p >= 1)[:, None], logits, -jnp.inf)


def _ordered(logits: jax.Array) -> jax.Array:
    """Maps float32 logits to unsigned integers in the same order."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _least(ordered: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns the largest threshold (B,) for which the entries at or above it, a mask (B, V), are `enough` (B,).

    It is found bit by bit in 32 passes over the vocabulary, many times faster than a sort.
    """

    def decide(i: jax.Array, least: jax.Array) -> jax.Array:
        candidate = least | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(ordered >= candidate[:, None]), candidate, least)

    least: jax.Array = jax.lax.fori_loop(0, 32, decide, jnp.zeros(len(ordered), jnp.uint32))
    return least


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
