"""Generation for one batch: an expanded pass over the prompts, then absorbed steps over the latent cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.sampling import Sampling, sample
from dsv3_jax.model.auto import kernels
from dsv3_jax.model.cache import Cache, init_cache
from dsv3_jax.model.transformer import DeepSeekV3, check_token_ids
from dsv3_jax.runtime import AttentionForm

_GREEDY = Sampling(temperature=0)
_TILE = 128


def stream(
    model: DeepSeekV3,
    variables: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = _GREEDY,
    key: jax.Array | None = None,
    cache_length: int | None = None,
    end_ids: Collection[int] = (),
) -> Iterator[np.ndarray]:
    """Draws `max_new_tokens` tokens for every prompt, or until each has reached an end token.

    Args:
      prompts: B token sequences of at least one token each; lengths may differ.
      max_new_tokens: maximum number of tokens to draw.
      sampling: how; greedy by default.
      key: a typed key; needed unless greedy.
      cache_length: capacity of the cache in tokens; by default as much as is needed.
      end_ids: tokens that end a text, such as `config.eos_token_ids`; after one, it is repeated.

    Returns:
      An iterator over (B,) int32. Each is computed on demand.

    Raises:
      ConfigError: a prompt is empty or has a token outside the vocabulary, or prompt and continuation exceed the cache
        or the RoPE range.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    if not len(prompts) or lengths.min() < 1:
        raise ConfigError("a prompt is empty: give it at least one token, for example the tokenizer's bos")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if key is None:
        if sampling.temperature != 0:
            raise ConfigError("sampling at a temperature needs a key: pass key=jax.random.key(seed)")
        key = jax.random.key(0)
    tile, limit = _tile(model), model.config.max_position_embeddings
    width = -(-int(lengths.max()) // tile) * tile
    needed = int(lengths.max()) + max_new_tokens
    room = -(-max(needed, width) // tile) * tile if cache_length is None else cache_length
    if room % tile:
        raise ConfigError(
            f"cache_length is {room}: attention_impl {model.runtime.attention_impl!r} needs a multiple of {tile}"
        )
    if needed > room:
        raise ConfigError(
            f"a prompt of {lengths.max()} tokens and {max_new_tokens} new ones exceed the cache's {room} tokens"
        )
    if room > limit:
        raise ConfigError(
            f"{room} tokens exceed max_position_embeddings ({limit}): shorten the prompt or ask for fewer"
        )
    tokens: Any = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    check_token_ids(tokens, model.config.vocab_size)

    return _steps(model, variables, tokens, lengths, room, max_new_tokens, sampling, key, list(end_ids))


def _steps(
    model: DeepSeekV3,
    variables: Mapping[str, Any],
    tokens: np.ndarray,
    lengths: np.ndarray,
    room: int,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array,
    end_ids: list[int],
) -> Iterator[np.ndarray]:
    """Prefill, then one step per token. tokens: (B, width), right-padded to `lengths` (B,). room: the cache's."""
    cache = init_cache(model.config, model.runtime, len(tokens), room)
    key, first = jax.random.split(key)
    token, cache = _prefill(_in_form(model, "expanded"), sampling, variables, tokens, lengths, cache, first)
    ended, last = np.zeros(len(tokens), bool), np.asarray(token)
    for left in reversed(range(max_new_tokens)):
        last = np.where(ended, last, token)
        yield last
        ended |= np.isin(last, end_ids)
        if not left or ended.all():
            return
        key, now = jax.random.split(key)
        token, cache = _decode(_in_form(model, "absorbed"), sampling, variables, token, cache, now)


def generate(
    model: DeepSeekV3, variables: Mapping[str, Any], prompts: Any, max_new_tokens: int, **how: Any
) -> np.ndarray:
    """Collects `stream` in one array (B, at most max_new_tokens) int32, with the same arguments and errors."""
    return np.stack(list(stream(model, variables, prompts, max_new_tokens, **how)), axis=1)


def longest(model: DeepSeekV3) -> int:
    """Returns the maximum length of a prompt and its continuation in tokens."""
    tile = _tile(model)
    return model.config.max_position_embeddings // tile * tile


def _tile(model: DeepSeekV3) -> int:
    """Pads the lengths of prompts and cache, since kernels process whole tiles of queries and keys."""
    impl = model.runtime.attention_impl
    plain = kernels(model.runtime) is None if impl == "auto" else impl in ("reference", "blockwise")
    return 1 if plain else _TILE


def _in_form(model: DeepSeekV3, form: AttentionForm) -> DeepSeekV3:
    return model.clone(runtime=dataclasses.replace(model.runtime, attention_form=form))


def _continue(
    model: DeepSeekV3, variables: Any, tokens: jax.Array, cache: Cache, last: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Logits (B, V) after the token `last` (B,) of each sequence, by default its only one, and the extended cache."""
    at = None if last is None else last[:, None]
    logits, cache = cast(tuple[jax.Array, Cache], model.apply(variables, tokens, cache, at, method="decode"))
    return logits[:, 0], cache


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _prefill(
    model: DeepSeekV3, sampling: Sampling, variables: Any, tokens: Any, lengths: Any, cache: Cache, key: Any
) -> tuple[jax.Array, Cache]:
    """Fills the cache with right-padded prompts. Padding past `length` is overwritten before it is read."""
    logits, cache = _continue(model, variables, tokens, cache, lengths - 1)
    return sample(logits, sampling, key), dataclasses.replace(cache, length=lengths)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode(
    model: DeepSeekV3, sampling: Sampling, variables: Any, token: Any, cache: Cache, key: Any
) -> tuple[jax.Array, Cache]:
    logits, cache = _continue(model, variables, token[:, None], cache)
    return sample(logits, sampling, key), cache
