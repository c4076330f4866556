"""The contiguous cache, plain and packed: what was appended is what is attended to, and other layers keep theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.auto import PAGE
from dsv3_jax.model.cache import ContiguousCache, TokenPositions
from pallas_kernels.mla_decode import join, pack_rope
from pallas_kernels.mla_decode.cache import SplitCache
from tests.conftest import new_rng

L, B, S, R, P = 3, 2, 3 * PAGE, 8, 64


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 100])
def test_appending(packed, tokens):
    rng, layer = new_rng(), 1
    latents, ropes = (rng.standard_normal((L, B, S, w), np.float32) for w in (R, P))
    new, new_rope = (rng.standard_normal((B, tokens, w), np.float32) for w in (R, P))
    in_pages = lambda x: jnp.asarray(x).reshape(-1, PAGE, x.shape[-1])
    stored = pack_rope(in_pages(ropes)).reshape(L, B, -1, PAGE // 2, 2 * P) if packed else jnp.asarray(ropes)
    held = jnp.asarray([PAGE - 1, 3 * PAGE // 2 - tokens // 2], jnp.int32)
    where = TokenPositions(held[:, None] + jnp.arange(tokens), cached=held)
    append = jax.jit(lambda c: c.append(jnp.asarray(new), jnp.asarray(new_rope), where, jnp.int32(layer)))
    cache, keys = append(ContiguousCache(jnp.asarray(latents), stored))
    for b in range(B):
        at = slice(int(held[b]), int(held[b]) + tokens)
        latents[layer, b, at], ropes[layer, b, at] = new[b], new_rope[b]
    np.testing.assert_array_equal(keys.latent, latents[layer])
    np.testing.assert_array_equal(keys.rope_key, ropes[layer])
    np.testing.assert_array_equal(keys.lengths, held + tokens)
    whole = SplitCache(*(x.reshape(-1, *x.shape[3:]) for x in (keys.pages.latent, keys.pages.rope_key)))
    both = join(whole)
    latent, rope = both[..., :-P], both[..., -P:]
    np.testing.assert_array_equal(latent.reshape(latents.shape), latents)
    np.testing.assert_array_equal(rope.reshape(ropes.shape), ropes)
    assert cache.rope_key.shape == stored.shape
