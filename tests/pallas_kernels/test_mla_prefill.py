"""MLA prefill: the reference against jax.nn, the libraries against the reference where a CPU can run them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla_prefill import mla_prefill
from tests.pallas_kernels.targets import TPUS, compile_for_tpu

SCALE = 192**-0.5


def arrays(batch, tokens, keys, heads, dtype=jnp.bfloat16, nope=128, rope=64, wide=128):
    rng = np.random.default_rng()
    shapes = (
        (batch, tokens, heads, nope), (batch, tokens, heads, rope),
        (batch, keys, heads, nope), (batch, keys, rope), (batch, keys, heads, wide),
    )  # fmt: skip
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def segments_of(batch, keys):
    cuts = np.sort(np.random.default_rng().integers(1, keys, (batch, 3)))
    return jnp.asarray((np.arange(keys) >= cuts[..., None]).sum(1), jnp.int32)


def error(out, ref):
    out, ref = (np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in (out, ref))
    return np.linalg.norm(out - ref) / np.linalg.norm(ref)


@pytest.mark.parametrize(("tokens", "keys"), [(96, 96), (40, 96), (600, 600)])
@pytest.mark.parametrize("packed", [False, True])
def test_reference_is_attention(tokens, keys, packed):
    q_nope, q_rope, k_nope, k_rope, v = a = arrays(2, tokens, keys, 3, jnp.float32, 16, 8, 12)
    segments = segments_of(2, keys) if packed else None
    mask = np.tril(np.ones((tokens, keys), bool), keys - tokens)[None]
    if packed:
        mask = mask & np.asarray(segments[:, None] == segments[:, keys - tokens :, None])
    q, k = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, jnp.stack([k_rope] * 3, 2)], -1)
    # The library wants values as wide as keys.
    v_wide = jnp.pad(v, ((0, 0),) * 3 + ((0, 12),))
    expected = jax.nn.dot_product_attention(q, k, v_wide, mask=jnp.asarray(mask)[:, None], scale=0.2)[..., :12]
    out = mla_prefill(*a, scale=0.2, segments=segments, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize(("keys", "packed"), [(256, False), (384, True)])
def test_splash(keys, packed):
    a = arrays(1, 256, keys, 2)
    segments = segments_of(1, keys) if packed else None
    cotangent = arrays(1, 256, 256, 2)[-1].astype(jnp.float32)

    def loss(implementation, *a):
        out = mla_prefill(*a, scale=SCALE, segments=segments, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    grad = functools.partial(jax.grad, argnums=(1, 2, 3, 4, 5), has_aux=True)
    ours, out = grad(loss)("splash_interpret", *a)
    theirs, ref = grad(loss)("reference", *(x.astype(jnp.float32) for x in a))
    assert error(out, ref) < 6e-3
    for x, y in zip(ours, theirs, strict=False):
        assert error(x, y) < 1e-2


def real_shapes(tokens, keys, heads=128):
    sd = jax.ShapeDtypeStruct
    return [sd(x.shape, x.dtype) for x in jax.eval_shape(lambda: arrays(1, tokens, keys, heads))]


@pytest.mark.parametrize("generation", TPUS)
def test_splash_compiles(generation):
    def loss(*a):
        return jnp.sum(mla_prefill(*a, scale=SCALE, implementation="splash").astype(jnp.float32))

    compile_for_tpu(generation, jax.grad(loss, argnums=range(5)), *real_shapes(4096, 4096, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="flash"), "reference, tokamax"),
        (dict(implementation="tokamax"), "Hopper"),
        (dict(implementation="splash"), "TPU v5"),
        (dict(implementation="splash_interpret", tokens=100), "multiples of 128"),
        (dict(implementation="splash_interpret", dtype=jnp.float32), "bfloat16"),
        (dict(tokens=256), "S >= T"),
    ],
)
def test_refusals(change, message):
    c = dict(implementation="reference", tokens=128, dtype=jnp.bfloat16) | change
    a = arrays(1, c["tokens"], 128, 2, c["dtype"])
    with pytest.raises(ValueError, match=message):
        mla_prefill(*a, scale=1.0, implementation=c["implementation"])
