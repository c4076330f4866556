"""Random decoding problems for tests and benchmarks, with NaN and invalid indices wherever a kernel must not read."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

PAGE, WIDTH = 64, 576


def random_problem(
    rng: np.random.Generator, lengths: Sequence[int], tokens: int, heads: int, spare: int = 3
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the arguments q, cache, block_tables and lengths of `api.mla_decode`, bfloat16, standard normal.

    Pages are shuffled among `spare` unused ones, empty cache slots are NaN, and table entries beyond the end of a
    sequence are far out of range.
    """
    sizes = np.asarray(lengths, np.int32)
    pages = -(-sizes // PAGE)
    table = np.full((len(sizes), max(1, int(pages.max()))), 1 << 30, np.int32)
    table[np.arange(table.shape[1]) < pages[:, None]] = rng.permutation(pages.sum() + spare)[: pages.sum()]
    used = np.zeros((pages.sum() + spare, PAGE), bool)
    for row, length, count in zip(table, sizes, pages, strict=False):
        used[row[:count]] = True
        used[row[count - 1 : count]] = np.arange(PAGE) < length - PAGE * (count - 1)
    key = jax.random.key(int(rng.integers(1 << 31)))
    cache = jnp.where(used[..., None], jax.random.normal(key, (*used.shape, WIDTH), jnp.bfloat16), jnp.nan)
    q = jax.random.normal(jax.random.fold_in(key, 1), (len(sizes), tokens, heads, WIDTH), jnp.bfloat16)
    return q, cache, jnp.asarray(table), jnp.asarray(sizes)
