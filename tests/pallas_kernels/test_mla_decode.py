"""MLA decoding against its reference in float64: interpreted with race detection, and compiled for real shapes."""

from __future__ import annotations

import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

from pallas_kernels.ahead_of_time import VMEM_BYTES, compile_for_tpu, lower_for_hopper, vmem_bytes
from pallas_kernels.mla_decode import blockwise, gpu, join, mla_decode, pack, plan, quantise, split, tpu
from pallas_kernels.mla_decode.problem import random_problem
from tests.conftest import new_rng
from tests.pallas_kernels.generations import GENERATIONS

SCALE = 576**-0.5
RACE = "RACE DETECTED"  # what both interpreters print
REAL_SHAPES = [(128, 1, 128, 4096), (128, 2, 128, 32768), (1, 4, 128, 65536), (128, 1, 16, 8192)]


def in_float64(problem):
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(a.astype(jnp.float32)), jnp.float64) for a in problem[:2])
        out, lse = mla_decode(*wide, *problem[2:], scale=SCALE, implementation="reference")
        return np.asarray(out), np.asarray(lse)


def check(problem, out, lse, error=6e-3):
    ref, ref_lse = in_float64(problem)
    out, lse = np.asarray(out.astype(jnp.float32)), np.asarray(lse)
    assert np.linalg.norm(out - ref) < error * np.linalg.norm(ref)
    dead = np.isneginf(ref_lse)
    np.testing.assert_array_equal(np.isneginf(lse), dead)
    np.testing.assert_allclose(lse[~dead], ref_lse[~dead], rtol=0, atol=1e-4)
    assert not out[dead].any()


def in_fp8(cache):
    return quantise(split(cache))


def test_reference_is_attention():
    """Against jax.nn.dot_product_attention, sequence by sequence."""
    q, cache, table, lengths = random_problem(new_rng(), [5, 130, 64], tokens=3, heads=4)
    q, cache = q.astype(jnp.float32), cache.astype(jnp.float32)
    out, _ = mla_decode(q, cache, table, lengths, scale=SCALE, implementation="reference")
    for i, n in enumerate(map(int, lengths)):
        keys = cache[table[i, : -(-n // 64)]].reshape(1, -1, 1, 576)[:, :n]
        mask = np.tril(np.ones((3, n), bool), n - 3)
        expected = jax.nn.dot_product_attention(q[i : i + 1], keys, keys, mask=mask[None, None], scale=SCALE)
        np.testing.assert_allclose(out[i : i + 1], expected[..., :512], atol=1e-5)


@pytest.mark.parametrize("block", [2**30, 2**22])  # one block; several, of which the last reaches beyond the tables
@pytest.mark.parametrize(("heads", "tokens"), [(1, 1), (16, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blockwise(heads, tokens, dtype, block, monkeypatch):
    """Slots beyond a text's end are finite here, but large; table entries beyond it are still out of range."""
    monkeypatch.setattr(blockwise, "BLOCK", block)
    q, cache, *rest = random_problem(new_rng(), [0, 1, 63, 64, 65, 700, 449], tokens, heads)
    q, cache = q.astype(dtype), jnp.where(jnp.isnan(cache), 1e3, cache).astype(dtype)
    out, lse = mla_decode(q, cache, *rest, scale=SCALE, implementation="blockwise")
    check((q, cache, *rest), out, lse, error=2e-6 if dtype == "float32" else 6e-3)


@pytest.mark.parametrize(
    ("heads", "tokens", "lengths", "extra", "form"),
    [
        (1, 1, [0, 1, 63, 64, 65], 0, lambda cache: cache),
        (16, 4, [2, 200, 0], 0, split),
        # Two row blocks, cut sequences.
        pytest.param(64, 2, [385, 129], 4, lambda cache: cache, marks=pytest.mark.slow),
        (1, 1, [0, 1, 63, 64, 65], 0, in_fp8),
        pytest.param(64, 2, [385, 129], 4, in_fp8, marks=pytest.mark.slow),
    ],
)
def test_gpu(heads, tokens, lengths, extra, form, capsys):
    problem = random_problem(new_rng(), lengths, tokens, heads)
    schedule = plan(problem[3], page_size=64, pieces=len(lengths) + extra)
    q, cache, *rest = problem
    given = form(cache)
    out, lse = mla_decode(q, given, *rest, scale=SCALE, implementation="gpu_interpret", schedule=schedule)
    check((q, join(given) if form is in_fp8 else cache, *rest), out, lse)
    assert RACE not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("heads", "tokens", "lengths", "extra"),
    [
        (1, 1, [0, 1, 63, 64, 65], 0),
        (16, 4, [2, 700, 0, 512], 3),
        pytest.param(64, 2, [600, 1100], 4, marks=pytest.mark.slow),
        pytest.param(128, 1, [577], 2, marks=pytest.mark.slow),
    ],
)
def test_tpu(heads, tokens, lengths, extra, capsys):
    problem = random_problem(new_rng(), lengths, tokens, heads)
    schedule = plan(problem[3], page_size=64, pieces=len(lengths) + extra)
    q, cache, *rest = problem
    out, lse = mla_decode(q, pack(split(cache)), *rest, scale=SCALE, implementation="tpu_interpret", schedule=schedule)
    check(problem, out, lse)
    assert RACE not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["gpu_interpret", "tpu_interpret"])
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 16, 20, 64, 128])
def test_grid(heads, tokens, implementation):
    attend_and_check([0, 1, 63, 64, 65, 4096], tokens, heads, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["gpu_interpret", "tpu_interpret"])
@pytest.mark.parametrize("batch", [1, 128])
def test_batches(batch, implementation):
    attend_and_check(new_rng().integers(0, 200, batch), 2, 1, implementation)


def attend_and_check(lengths, tokens, heads, implementation):
    problem = random_problem(new_rng(), lengths, tokens, heads)
    cache = pack(split(problem[1])) if implementation.startswith("tpu") else problem[1]
    check(problem, *mla_decode(problem[0], cache, *problem[2:], scale=SCALE, implementation=implementation))


def without(module, line):
    """The module without one line of its source."""
    source = inspect.getsource(module)
    assert line in source
    broken = types.ModuleType("broken")
    exec(
        compile(source.replace(line, line[: len(line) - len(line.lstrip())] + "pass\n"), "broken", "exec"),
        broken.__dict__,
    )
    return broken


@pytest.mark.parametrize(
    ("line", "form"),
    [
        ("            plgpu.barrier_wait(weights_ready.at[other])\n", lambda cache: cache),
        ("            plgpu.barrier_wait(landed.at[i])\n", in_fp8),
    ],
)
def test_gpu_race_is_caught(line, form, capsys):
    """Without waiting for the other warpgroup's probabilities, or for FP8 latents."""
    broken = without(gpu, line)
    q, cache, *rest = random_problem(new_rng(), [100], 1, 16)
    schedule = plan(rest[1], page_size=64, pieces=1)
    out = broken.mla_decode(q, form(cache), *rest, scale=SCALE, schedule=schedule, interpret=gpu.INTERPRET)
    jax.block_until_ready(out)
    assert RACE in capsys.readouterr().out
    reset_gpu_interpret_mode_state()


def test_tpu_race_is_caught(capsys):
    """Without waiting for the pages."""
    broken = without(tpu, "        each_copy(block, slot, lambda copy: copy.wait())\n")
    q, cache, *rest = random_problem(new_rng(), [100], 1, 16)
    interpret = tpu.pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    broken.mla_decode(q, pack(split(cache)), *rest, scale=SCALE, interpret=interpret)[0].block_until_ready()
    assert RACE in capsys.readouterr().out


def shapes(batch, tokens, heads, length, page=64):
    sd = jax.ShapeDtypeStruct
    return (
        sd((batch, tokens, heads, 576), jnp.bfloat16),
        sd((batch * length // page, page, 576), jnp.bfloat16),
        sd((batch, length // page), jnp.int32),
        sd((batch,), jnp.int32),
    )


@pytest.mark.parametrize("shape", REAL_SHAPES)
def test_gpu_lowers(shape):
    text = lower_for_hopper(functools.partial(mla_decode, scale=SCALE, implementation="gpu"), *shapes(*shape))
    assert "mosaic_gpu" in text


def test_gpu_lowers_with_fp8_latents():
    q, cache, *rest = shapes(128, 1, 128, 4096)
    cache = jax.eval_shape(in_fp8, cache)
    assert "mosaic_gpu" in lower_for_hopper(
        functools.partial(mla_decode, scale=SCALE, implementation="gpu"), q, cache, *rest
    )


@pytest.mark.parametrize("generation", GENERATIONS)
def test_tpu_compiles(generation, record_property):
    for shape in REAL_SHAPES:
        q, cache, *rest = shapes(*shape)
        packed = jax.eval_shape(lambda c: pack(split(c)), cache)
        compiled = compile_for_tpu(
            generation, functools.partial(mla_decode, scale=SCALE, implementation="tpu"), q, packed, *rest
        )
        used = vmem_bytes(compiled)
        record_property(f"VMEM bytes {generation} {shape}", used)
        assert 0 < used < VMEM_BYTES[generation]
        # The cache takes no padding: 576 columns, not 640.
        given = compiled.memory_analysis().argument_size_in_bytes
        assert given < 1.01 * sum(a.size * a.dtype.itemsize for a in (q, packed.latent, packed.rope, *rest))


def test_pack_and_back():
    cache = random_problem(new_rng(), [100], 1, 1)[1]
    assert np.array_equal(join(pack(split(cache))).view(jnp.uint16), cache.view(jnp.uint16))


@pytest.mark.parametrize("pieces", [5, 6, 9, 40])
def test_plan_covers_every_page_once(pieces):
    lengths = jnp.asarray(new_rng().integers(0, 2000, 5), jnp.int32)
    work, slots = plan(lengths, page_size=64, pieces=pieces)
    seen = np.zeros((5, 32), int)
    for sequence, begin, end, slot in np.asarray(work):
        seen[sequence, begin:end] += slot != -2
        if slot >= 0:
            first, count = slots[sequence]
            assert first <= slot < first + count
            assert count > 1
    np.testing.assert_array_equal(seen, np.arange(32) < -(-np.asarray(lengths)[:, None] // 64))


@pytest.mark.parametrize(("length", "count"), [(4096, 1), (5000, 2)])
def test_plan_leaves_whole_what_is_hardly_too_long(length, count):
    """128 sequences on 132 multiprocessors: of 4096 tokens, each is one page over an equal share, and no more."""
    lengths = jnp.asarray([length] + [4096] * 127, jnp.int32)
    slots = plan(lengths, page_size=64, pieces=128 + 132).slots
    assert slots[:, 1].tolist() == [count] + [1] * 127


def test_gpu_merge(capsys):
    """Sequences of no, one, few and many pieces; rows past the last, and sequences not cut, are left alone."""
    rng = new_rng()
    counts = [1, 2, 0, 5, 17, 70]
    ends = np.cumsum(counts)
    rows, padded = 3, 4
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    parts, part_lse = draw(ends[-1], padded, 512).astype(jnp.bfloat16), 10 * draw(ends[-1], padded)
    part_lse = part_lse.at[3, 0].set(-jnp.inf).at[ends[2] : ends[3], 1].set(-jnp.inf)  # one saw nothing; all did
    before = draw(6, padded, 512).astype(jnp.bfloat16), draw(6, padded)
    slots = jnp.asarray(np.stack([ends - counts, counts], 1), jnp.int32)
    out, lse = gpu._merge(*before, parts, part_lse, slots, rows=rows, interpret=gpu.INTERPRET)
    assert RACE not in capsys.readouterr().out
    ref, ref_lse = (np.array(x.astype(jnp.float32), np.float64) for x in before)
    for b, (count, end) in enumerate(zip(counts, ends, strict=True)):
        if count > 1:
            weights = np.exp(np.asarray(part_lse, np.float64)[end - count : end, :rows])
            total = weights.sum(0)
            values = np.asarray(parts.astype(jnp.float32), np.float64)[end - count : end, :rows]
            ref[b, :rows] = (weights[..., None] * values).sum(0) / np.where(total > 0, total, 1)[:, None]
            ref_lse[b, :rows] = np.log(total, where=total > 0, out=np.full(rows, -np.inf))
    assert np.linalg.norm(out.astype(jnp.float32) - ref) < 6e-3 * np.linalg.norm(ref)
    np.testing.assert_array_equal(out[:, rows:], before[0][:, rows:])
    np.testing.assert_allclose(lse, ref_lse, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="cuda"), "reference, blockwise, gpu"),
        (dict(implementation="gpu"), "Hopper"),
        (dict(implementation="tpu"), "packed SplitCache"),
        (dict(implementation="gpu_interpret", page=32), "pages of 64"),
        (dict(implementation="gpu_interpret", dtype=jnp.float32), "bfloat16"),
        (dict(implementation="tpu_interpret", page=48), "pages of 32"),
        (dict(cache_dtype=jnp.float32), "one dtype"),
        (dict(implementation="gpu_interpret", page=128, form=in_fp8), "pages of 64 tokens, but got"),
        (dict(implementation="tpu_interpret", form=lambda c: pack(in_fp8(c))), "pages of 256 or 512"),
        (dict(implementation="blockwise", form=in_fp8), "no FP8 latents"),
        (dict(form=lambda c: in_fp8(c)._replace(scales=None)), "float8_e4m3fn latents with scales"),
        (dict(width=512), r"\(B, T, H, R \+ P\)"),
        (dict(lengths=3), "lengths"),
    ],
)
def test_refusals(change, message):
    c = dict(implementation="reference", page=64, dtype=jnp.bfloat16, cache_dtype=None, width=576, lengths=2) | change
    cache = jnp.zeros((4, c["page"], 576), c["cache_dtype"] or c["dtype"])
    q = jnp.zeros((2, 1, 16, c["width"]), c["dtype"])
    if "form" in c:
        cache = c["form"](cache)
    elif c["implementation"].endswith("tpu_interpret"):
        cache = pack(split(cache))
    with pytest.raises(ValueError, match=message):
        mla_decode(
            q, cache, jnp.zeros((2, 2), jnp.int32), jnp.zeros((c["lengths"],), jnp.int32),
            scale=1.0, implementation=c["implementation"],
        )  # fmt: skip


def test_tpu_refuses_other_devices():
    q, cache, *rest = random_problem(new_rng(), [100], 1, 16)
    with pytest.raises(ValueError, match="TPU v5"):
        mla_decode(q, pack(split(cache)), *rest, scale=1.0, implementation="tpu")
