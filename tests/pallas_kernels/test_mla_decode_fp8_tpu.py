"""FP8 latents in the TPU decode kernel: cut sequences, both sizes of pages, layouts. The rest: test_mla_decode.py."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.ahead_of_time import VMEM_BYTES, compile_for_tpu, vmem_bytes
from pallas_kernels.mla_decode import join, mla_decode, pack, plan, problem, quantise, split
from tests.conftest import new_rng
from tests.pallas_kernels.generations import GENERATIONS
from tests.pallas_kernels.test_mla_decode import RACE, SCALE, check, in_fp8, shapes


@pytest.mark.parametrize(
    ("page", "heads", "tokens", "lengths", "extra"),
    [
        pytest.param(256, 1, 1, [0, 1, 255, 256, 257], 0, marks=pytest.mark.slow),
        (256, 16, 4, [2, 700, 0, 512], 3),
        pytest.param(256, 64, 2, [600, 1100], 4, marks=pytest.mark.slow),
        (256, 128, 1, [577], 2),
        (512, 16, 2, [1, 1030, 0, 513], 3),
    ],
)
def test_fp8(page, heads, tokens, lengths, extra, monkeypatch, capsys):
    """Tokens differ a hundredfold in size, so that no scale can stand for another's."""
    monkeypatch.setattr(problem, "PAGE", page)
    rng = new_rng()
    q, cache, table, lengths = problem.random_problem(rng, lengths, tokens, heads)
    latent, rope, _ = split(cache)
    size = jnp.asarray(10 ** rng.uniform(-1, 1, latent.shape[:2]), latent.dtype)
    cache = quantise(split(jnp.concatenate([latent * size[..., None], rope], -1)))
    # Slots that hold no token must be NaN in all three arrays. XLA's maximum of many NaNs is -inf on CPUs.
    empty = np.isnan(np.asarray(cache.latent, np.float32)).all(-1)
    assert empty.sum() == empty.size - int(lengths.sum())
    cache = cache._replace(scales=jnp.where(empty, jnp.nan, cache.scales))

    schedule = plan(lengths, page_size=page, pieces=len(lengths) + extra)
    out, lse = mla_decode(
        q, pack(cache), table, lengths, scale=SCALE, implementation="tpu_interpret", schedule=schedule
    )
    assert RACE not in capsys.readouterr().out
    check((q, join(cache), table, lengths), out, lse)


def arguments(batch, tokens, heads, length, page):
    q, cache, *rest = shapes(batch, tokens, heads, length, page)
    return q, jax.eval_shape(lambda c: pack(in_fp8(c)), cache), *rest


@pytest.mark.parametrize(("shape", "page"), [((128, 1, 128, 4096), 256), ((128, 2, 128, 32768), 512)])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles(generation, shape, page, record_property):
    args = arguments(*shape, page)
    compiled = compile_for_tpu(generation, functools.partial(mla_decode, scale=SCALE, implementation="tpu"), *args)
    used = vmem_bytes(compiled)
    record_property(f"VMEM bytes {generation} {shape} FP8, pages of {page}", used)
    assert 0 < used < VMEM_BYTES[generation]
    # Neither padding nor, at each call, another layout for all the scales. XLA may fetch them into VMEM as they are.
    given = compiled.memory_analysis().argument_size_in_bytes
    assert given < 1.01 * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(args))
    pages = args[1].scales.shape[0]
    made = re.findall(rf"= f32\[{pages},(?:1,)?{page}\]\S* ([\w-]+)\(", compiled.as_text())
    assert "parameter" in made
    assert set(made) <= {"parameter", "copy-done"}


@pytest.mark.parametrize("page", [32, 64, 128])
def test_small_pages_are_refused(page):
    args = arguments(2, 1, 16, 512, page)
    with pytest.raises(ValueError, match=f"FP8 latents in pages of 256 or 512 .* but got {page}"):
        jax.eval_shape(functools.partial(mla_decode, scale=SCALE, implementation="tpu_interpret"), *args)


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite"])
def test_other_generations_are_refused(kind):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)),
        pytest.raises(ValueError, match=f"the device is {kind}"),
    ):
        jax.eval_shape(functools.partial(mla_decode, scale=SCALE, implementation="tpu"), *arguments(2, 1, 16, 512, 256))
