"""The cache update against float64, interpreted with race detection, and compiled for real shapes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ahead_of_time import compile_for_tpu, lower_for_hopper, vmem_bytes
from pallas_kernels.cache_update import cache_update
from pallas_kernels.mla_decode import SplitCache, join, pack, quantise, split
from pallas_kernels.mla_decode.problem import random_problem
from tests.conftest import new_rng
from tests.pallas_kernels.generations import GENERATIONS

LENGTHS = [0, 1, 2, 63, 64, 65, 130]
EPS = 1e-6
FORMS = {
    "array": lambda cache: cache,
    "split": split,
    "packed": lambda cache: pack(split(cache)),
    "fp8": lambda cache: quantise(split(cache)),
    "packed_fp8": lambda cache: pack(quantise(split(cache))),
}


def problem(tokens, page):
    rng = new_rng()
    _, cache, table, lengths = random_problem(rng, LENGTHS, tokens, 1)
    if page > 64:  # as many pages, each with NaN behind what it holds; a sequence of 130 tokens needs fewer of them
        cache = jnp.concatenate([cache] + [jnp.full_like(cache, jnp.nan)] * (page // 64 - 1), axis=1)
    batch = len(LENGTHS)
    kv = jnp.asarray(3 * rng.standard_normal((batch, tokens, 576)), jnp.bfloat16)
    angle = rng.uniform(0, 6, (batch, tokens, 32))
    cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    return cache, kv, jnp.asarray(rng.uniform(0.5, 2, 512), jnp.bfloat16), cos, sin, table, lengths


def expected(cache, kv, norm, cos, sin, table, lengths, interleave):
    """Row by row in float64, and which slots are new."""
    kv, norm, cos, sin = (np.asarray(x, np.float64) for x in (kv, norm, cos, sin))
    page = cache.shape[1]
    out, new = np.asarray(cache, np.float64).copy(), np.zeros(cache.shape[:2], bool)
    for b, length in enumerate(np.asarray(lengths)):
        for t in range(kv.shape[1]):
            position = length - kv.shape[1] + t
            if position < 0:
                continue
            latent, key = kv[b, t, :512], kv[b, t, 512:]
            pairs = key.reshape(32, 2) if interleave else key.reshape(2, 32).T
            turned = (pairs[:, 0] + 1j * pairs[:, 1]) * (cos[b, t] + 1j * sin[b, t])
            turned = np.stack([turned.real, turned.imag], 1 if interleave else 0).ravel()
            where = table[b, position // page], position % page
            out[where] = np.concatenate([latent / np.sqrt(np.mean(latent**2) + EPS) * norm, turned])
            new[where] = True
    return out, new


@pytest.mark.parametrize(("implementation", "form"), [
    ("reference", "array"), ("reference", "packed"), ("reference", "fp8"), ("reference", "packed_fp8"),
    ("gpu_interpret", "array"), ("gpu_interpret", "split"), ("gpu_interpret", "fp8"), ("tpu_interpret", "packed"),
    ("tpu_interpret", "packed_fp8"),
])  # fmt: skip
@pytest.mark.parametrize(("tokens", "interleave"), [(1, True), (2, False), (4, True)])
def test_new_tokens_and_nothing_else(implementation, form, tokens, interleave, capsys):
    cache, *rest = problem(tokens, 128 if form == "packed_fp8" else 64)
    before = FORMS[form](cache)
    after = cache_update(before, *rest, eps=EPS, interleave=interleave, implementation=implementation)
    ref, new = expected(cache, *rest, interleave)
    plain = lambda c: np.asarray((join(c) if isinstance(c, SplitCache) else c).astype(jnp.float32))
    got = plain(after)
    error = np.linalg.norm(got[new] - ref[new]) / np.linalg.norm(ref[new])
    assert error < (3e-2 if "fp8" in form else 4e-3)  # e4m3 has three bits after the point, bfloat16 seven
    np.testing.assert_array_equal(got[~new], plain(before)[~new])  # NaNs included
    assert "RACE DETECTED" not in capsys.readouterr().out


def shapes(batch, tokens, form, page=64):
    sd = jax.ShapeDtypeStruct
    cache = sd((4096, page, 576), jnp.bfloat16)
    angles = sd((batch, tokens, 32), jnp.float32)
    cache = jax.eval_shape(FORMS[form], cache)
    return (
        cache, sd((batch, tokens, 576), jnp.bfloat16), sd((512,), jnp.float32), angles, angles,
        sd((batch, 64), jnp.int32), sd((batch,), jnp.int32),
    )  # fmt: skip


update = functools.partial(cache_update, eps=EPS, interleave=True)


@pytest.mark.parametrize(("tokens", "form"), [(1, "array"), (4, "split"), (4, "fp8")])
def test_gpu_lowers(tokens, form):
    assert "mosaic_gpu" in lower_for_hopper(functools.partial(update, implementation="gpu"), *shapes(128, tokens, form))


@pytest.mark.parametrize(("form", "page"), [("packed", 64), ("packed_fp8", 256)])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_tpu_compiles(generation, form, page, record_property):
    given = shapes(128, 2, form, page)
    compiled = compile_for_tpu(generation, functools.partial(update, implementation="tpu"), *given, donate=(0,))
    used = vmem_bytes(compiled)
    record_property(f"VMEM bytes {generation}", used)
    assert 0 < used < 1 << 20
    assert compiled.memory_analysis().temp_size_in_bytes < 8 << 20  # in place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="cuda"), "reference, gpu"),
        (dict(implementation="gpu"), "needs a Hopper GPU"),
        (dict(implementation="tpu"), "packed SplitCache"),
        (dict(tokens=5), "1 to 4 new tokens"),
        (dict(width=512), r"\(B, T, R \+ P\)"),
        (dict(norm=64), "norm, cos, sin"),
        (dict(page=32, implementation="gpu_interpret"), "pages of 64"),
        (dict(form="packed_fp8", implementation="tpu_interpret"), "pages of a multiple of 128"),
        (dict(form="fp8", page=128, implementation="gpu_interpret"), "pages of 64 tokens, but got .* pages of 128"),
    ],
)
def test_refusals(change, message):
    c = dict(implementation="reference", tokens=1, width=576, norm=512, page=64, form="array") | change
    cache = FORMS[c["form"]](jnp.zeros((4, c["page"], 576), jnp.bfloat16))
    angles = jnp.zeros((2, c["tokens"], 32))
    with pytest.raises(ValueError, match=message):
        update(
            cache, jnp.zeros((2, c["tokens"], c["width"]), jnp.bfloat16), jnp.ones(c["norm"]), angles, angles,
            jnp.zeros((2, 2), jnp.int32), jnp.ones(2, jnp.int32), implementation=c["implementation"],
        )  # fmt: skip
