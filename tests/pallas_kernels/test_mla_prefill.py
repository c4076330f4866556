"""MLA prefill: the reference against jax.nn, and what a CPU can interpret of the rest against the reference."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokamax._src.ops.attention import api as tokamax_api

from pallas_kernels.ahead_of_time import compile_for_tpu, lower_for_hopper, vmem_bytes
from pallas_kernels.mla_prefill import RESIDUALS, blockwise, library, mla_prefill, tpu
from tests.conftest import new_rng
from tests.pallas_kernels.generations import GENERATIONS
from tests.pallas_kernels.tokamax_elsewhere import pretend_hopper

SCALE = 192**-0.5


def shapes_of(batch, tokens, keys, heads, nope=128, rope=64, wide=128):
    return (
        (batch, tokens, heads, nope), (batch, tokens, heads, rope),
        (batch, keys, heads, nope), (batch, keys, rope), (batch, keys, heads, wide),
    )  # fmt: skip


def arrays(batch, tokens, keys, heads, dtype=jnp.bfloat16, nope=128, rope=64, wide=128):
    rng = new_rng()
    shapes = shapes_of(batch, tokens, keys, heads, nope, rope, wide)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def segments_of(batch, keys):
    cuts = np.sort(new_rng().integers(1, keys, (batch, 3)))
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


def plain_attention(q_nope, q_rope, k_nope, k_rope, v, *, q_index, k_index, q_segments, k_segments, scale):
    """All scores at once. Queries that see nothing get zeros."""
    k_nope, v = (jnp.broadcast_to(x, (*x.shape[:2], q_nope.shape[2], x.shape[3])) for x in (k_nope, v))
    scores = jnp.einsum("bthn,bshn->bhts", q_nope, k_nope) + jnp.einsum("bthp,bsp->bhts", q_rope, k_rope)
    seen = k_index[:, None] <= q_index[:, :, None]
    seen = (seen & (k_segments[:, None] == q_segments[:, :, None]))[:, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores * scale, -1e300)), 0)
    return jnp.einsum("bhts,bshv->bthv", weights, v)


@pytest.mark.parametrize(
    ("tokens", "keys", "order", "packed", "one_key"),
    [
        (70, 70, "kept", False, False),
        (70, 70, "kept", True, True),
        (1, 75, "kept", False, True),
        (33, 101, "kept", True, False),  # a prefix
        (64, 128, "dealt out", False, False),
        (64, 128, "dealt out", True, True),
        (50, 50, "random", True, False),  # queries that see nothing
    ],
)
def test_blockwise(tokens, keys, order, packed, one_key, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 32)
    rng = new_rng()
    with jax.enable_x64(True):
        a = [jnp.asarray(rng.standard_normal(x.shape)) for x in arrays(2, tokens, keys, 3, jnp.float32, 8, 4, 6)]
        if one_key:
            a[2], a[4] = a[2][:, :, :1], a[4][:, :, :1]
        cotangent = jnp.asarray(rng.standard_normal((2, tokens, 3, 6)))
        k_index = np.broadcast_to(np.arange(keys), (2, keys))
        if order == "dealt out":  # the pieces of the first of two devices: the first and the last of four
            k_index = k_index.reshape(2, 4, -1)[:, [0, 3, 1, 2]].reshape(2, -1)
            q_index = k_index[:, keys // 2 - tokens // 2 : keys // 2 + tokens // 2]
        elif order == "random":
            k_index, q_index = rng.integers(5, 100, (2, keys)), rng.integers(0, 100, (2, tokens))
        else:
            q_index = k_index[:, keys - tokens :]
        k_segments = jnp.sort(jnp.asarray(rng.integers(0, 4, (2, keys)))) if packed else jnp.zeros((2, keys), int)
        q_segments = k_segments[:, keys - tokens :]
        where = dict(q_index=jnp.asarray(q_index), k_index=jnp.asarray(k_index))
        segments = dict(q_segments=q_segments, k_segments=k_segments)
        out, vjp = jax.vjp(lambda *a: plain_attention(*a, **where, **segments, scale=0.3), *a)
        given = ({} if order == "kept" else where) | (segments if packed else {})
        ours, our_vjp = jax.vjp(jax.jit(lambda *a: blockwise.attention(*a, **given, scale=0.3)), *a)
        np.testing.assert_allclose(ours, out, atol=1e-12)
        for x, y in zip(our_vjp(cotangent), vjp(cotangent), strict=True):
            assert x.dtype == jnp.float64
            np.testing.assert_allclose(x, y, atol=1e-11)


@pytest.mark.parametrize(
    ("tokens", "keys", "packed"), [(600, 600, False), pytest.param(300, 700, True, marks=pytest.mark.slow)]
)
def test_blockwise_in_bfloat16(tokens, keys, packed):
    attend = functools.partial(mla_prefill, implementation="blockwise")
    assert_right(attend, tokens, keys, 2, segments_of(2, keys) if packed else None, 2)


def test_blockwise_works_on_no_empty_pair(monkeypatch):
    """Neither above the diagonal nor outside a document: what is NaN there spoils nothing."""
    monkeypatch.setattr(blockwise, "BLOCK", 32)
    q_nope, q_rope, *keys = arrays(1, 128, 128, 2, jnp.float32)
    segments = jnp.asarray([[0] * 64 + [1] * 64], jnp.int32)
    attend = functools.partial(mla_prefill, scale=SCALE, implementation="blockwise")
    out = attend(q_nope, q_rope, *(x.at[:, 96:].set(jnp.nan) for x in keys))
    np.testing.assert_array_equal(out[:, :96], attend(q_nope, q_rope, *keys)[:, :96])
    out = attend(q_nope, q_rope, *(x.at[:, :64].set(jnp.nan) for x in keys), segments=segments)
    np.testing.assert_array_equal(out[:, 64:], attend(q_nope, q_rope, *keys, segments=segments)[:, 64:])


@pytest.mark.slow
def test_blockwise_memory_is_linear():
    """Memory of a compiled training step with as many heads as V3 has; and so is its largest array."""
    used = {}
    for tokens in (4096, 8192):
        given = real_shapes(tokens, tokens)
        segments = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        compiled = jax.jit(training("blockwise")).lower(given[-1], segments, *given).compile()
        used[tokens] = compiled.memory_analysis().temp_size_in_bytes
        shapes = re.findall(r"\w\d+\[([\d,]+)\]", compiled.as_text())
        assert max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes) <= 128 * tokens * 192
    assert used[8192] <= 2.2 * used[4096]


def assert_right(attend, tokens, keys, heads, segments=None, batch=1, **widths):
    """Output and gradients of `attend` against the reference in float32."""
    a = arrays(batch, tokens, keys, heads, **widths)
    cotangent = arrays(batch, tokens, tokens, heads, **widths)[-1].astype(jnp.float32)

    def loss(attend, *a):
        out = attend(*a, scale=SCALE, segments=segments)
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    grad = functools.partial(jax.grad, argnums=range(1, 6), has_aux=True)
    ours, out = grad(loss)(attend, *a)
    reference = functools.partial(mla_prefill, implementation="reference")
    theirs, ref = grad(loss)(reference, *(x.astype(jnp.float32) for x in a))
    assert error(out, ref) < 6e-3
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == jnp.bfloat16
        assert error(x, y) < 1e-2


@pytest.mark.parametrize(
    ("batch", "tokens", "keys", "heads", "packed"),
    [
        (1, 256, 256, 2, False),
        pytest.param(2, 128, 384, 3, True, marks=pytest.mark.slow),  # an odd head, a prefix
        pytest.param(1, 1024, 1024, 1, False, marks=pytest.mark.slow),  # blocks above, on and below the diagonal
        (1, 512, 1536, 2, True),
    ],
)
def test_tpu(batch, tokens, keys, heads, packed, capsys):
    attend = functools.partial(tpu.mla_prefill, interpret=tpu.INTERPRET)
    assert_right(attend, tokens, keys, heads, segments_of(batch, keys) if packed else None, batch)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize("implementation", ["tpu_interpret", "splash_interpret"])
@pytest.mark.parametrize(("keys", "packed"), [(256, False), (384, True)])
def test_for_tpus(implementation, keys, packed):
    attend = functools.partial(mla_prefill, implementation=implementation)
    assert_right(attend, 256, keys, 2, segments_of(1, keys) if packed else None)


@pytest.mark.parametrize(("nope", "wide"), [(192, 256), (128, 192)], ids=["GLM-4.7-Flash", "GigaChat3"])
def test_tpu_of_other_widths(nope, wide):
    a = arrays(1, 128, 128, 2, nope=nope, wide=wide)
    out, expected = (mla_prefill(*a, scale=SCALE, implementation=i) for i in ("tpu_interpret", "reference"))
    assert error(out, expected) < 0.01


def test_tpu_with_documents_in_pieces():
    """Whole blocks of other documents, and documents that go on after others."""
    segments = jnp.asarray([[0] * 512 + [1] * 512 + [0] * 200 + [2] * 312], jnp.int32)
    assert_right(functools.partial(mla_prefill, implementation="tpu_interpret"), 1024, 1536, 2, segments)


@pytest.mark.parametrize(("nope", "rope", "wide"), [(64, 32, 64), (192, 64, 128)])
def test_tpu_with_other_widths(nope, rope, wide):
    attend = functools.partial(mla_prefill, implementation="tpu_interpret")
    assert_right(attend, 128, 256, 2, nope=nope, rope=rope, wide=wide)


def test_tpu_works_on_no_block_above_the_diagonal():
    q_nope, q_rope, *keys = arrays(1, 1024, 1024, 2)
    attend = functools.partial(mla_prefill, scale=SCALE, implementation="tpu_interpret")
    spoiled = [x.at[:, 512:].set(jnp.nan) for x in keys]
    out, ref = (attend(q_nope, q_rope, *k)[:, :512] for k in (spoiled, keys))
    np.testing.assert_array_equal(out, ref)


def real_shapes(tokens, keys, heads=128):
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes_of(1, tokens, keys, heads)]


def training(implementation):
    """Output and gradients, of packed documents."""

    def run(cotangent, segments, *a):
        attend = functools.partial(mla_prefill, scale=SCALE, segments=segments, implementation=implementation)
        out, vjp = jax.vjp(attend, *a)
        return out, vjp(cotangent)

    return run


@pytest.mark.parametrize("generation", GENERATIONS)
def test_tpu_compiles(generation, record_property):
    given = real_shapes(4096, 4096)
    segments = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    compiled = compile_for_tpu(generation, training("tpu"), given[-1], segments, *given)
    used = vmem_bytes(compiled)
    record_property(f"VMEM bytes {generation}", used)
    assert 0 < used < 16 << 20  # what a program gets without asking for more
    for copied in ("4096,128,192]", "128,4096,192]"):  # a key with its rope part for each head
        assert copied not in compiled.as_text()


def test_tpu_compiles_for_a_piece_of_a_prompt():
    attend = functools.partial(mla_prefill, scale=SCALE, implementation="tpu")
    assert 0 < vmem_bytes(compile_for_tpu("v5p", attend, *real_shapes(1024, 8192, 16))) < 16 << 20


@pytest.mark.parametrize(
    ("tokens", "packed"),
    [
        (4096, True),
        pytest.param(4096, False, marks=pytest.mark.slow),
        pytest.param(100, False, marks=pytest.mark.slow),
        (100, True),
    ],
)
def test_tokamax_lowers(tokens, packed, monkeypatch):
    """With no mask, which would be an array of B T S elements."""
    pretend_hopper(monkeypatch)
    given = real_shapes(tokens, tokens)
    segments = jax.ShapeDtypeStruct((1, tokens), jnp.int32) if packed else None
    text = lower_for_hopper(training("tokamax"), given[-1], segments, *given)
    assert "mosaic_gpu" in text
    assert "4096x4096x" not in text


@pytest.mark.parametrize(
    ("keys", "documents"), [(128, None), (300, None), (300, "one piece"), (128, "one piece"), (300, "two pieces")]
)
def test_tokamax_gets_the_right_ranges(keys, documents, monkeypatch):
    """By its implementation in plain XLA."""
    plain = dict(tokamax_api.IMPLEMENTATIONS, mosaic_gpu=tokamax_api.IMPLEMENTATIONS["xla"])
    monkeypatch.setattr(tokamax_api, "IMPLEMENTATIONS", plain)
    segments = None if documents is None else segments_of(1, keys)
    if documents == "two pieces":
        segments = segments.at[:, -20:].set(0)
    assert_right(library.tokamax, 100 if keys > 128 else 128, keys, 2, segments)


def test_gpu_gets_gradients_of_long_sequences_from_cudnn(monkeypatch):
    """With keys wider than values, and the output alone from tokamax; as programs for a GPU say it."""
    pretend_hopper(monkeypatch)
    monkeypatch.setattr(library.fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library.fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    given = real_shapes(4096, 4096)
    text = lower_for_hopper(training("gpu"), given[-1], None, *given)
    for call in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        assert f"@{call}(" in text
    assert "mosaic_gpu" not in text
    text = lower_for_hopper(functools.partial(mla_prefill, scale=SCALE, implementation="gpu"), *given)
    assert "mosaic_gpu" in text
    assert "__cudnn" not in text


@pytest.mark.parametrize("implementation", ["gpu", "blockwise"])
def test_saved_residuals_spare_the_forward_pass(implementation, monkeypatch):
    """Under a policy that saves them, the gradient of a rematerialised attention runs it once."""
    pretend_hopper(monkeypatch)
    monkeypatch.setattr(library.fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library.fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    given = real_shapes(4096, 4096)
    attend = functools.partial(mla_prefill, scale=SCALE, implementation=implementation)
    mark = "stablehlo.exponential" if implementation == "blockwise" else "@__cudnn$fmhaSoftmax("

    def count(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        loss = lambda *a: jnp.sum(jnp.sin(jax.checkpoint(attend, policy=policy)(*a).astype(jnp.float32)))
        return lower_for_hopper(jax.grad(loss, (0, 1, 2, 3, 4)), *given).count(mark)

    assert count(RESIDUALS) < count()


@pytest.mark.parametrize(
    ("found", "dtype", "packed", "chosen"),
    [
        (("cudnn", "tokamax"), jnp.bfloat16, False, "tokamax"),
        (("cudnn",), jnp.bfloat16, False, "cudnn"),
        (("cudnn",), jnp.bfloat16, True, "blockwise"),
        (("cudnn", "tokamax"), jnp.bfloat16, True, "tokamax"),
        (("tokamax",), jnp.bfloat16, False, "tokamax"),
        ((), jnp.bfloat16, False, "blockwise"),
        (("cudnn", "tokamax"), jnp.float32, False, "blockwise"),
    ],
)
def test_gpu_chooses(found, dtype, packed, chosen, monkeypatch):
    tried = lambda name: lambda *a, **how: name
    monkeypatch.setattr(library, "cudnn", tried("cudnn"))
    monkeypatch.setattr(library, "tokamax", tried("tokamax"))
    monkeypatch.setattr(library.blockwise, "mla_prefill", tried("blockwise"))
    version = 91000 if "cudnn" in found else 90000
    monkeypatch.setattr(library.fused_attention_stablehlo, "check_cudnn_version", lambda: version)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: "tokamax" in found or None)
    segments = segments_of(1, 128) if packed else None
    assert library.gpu(*arrays(1, 128, 128, 2, dtype), scale=SCALE, segments=segments) == chosen


@pytest.mark.parametrize("generation", GENERATIONS)
def test_splash_compiles(generation):
    given = real_shapes(4096, 4096, 16)
    segments = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    compile_for_tpu(generation, training("splash"), given[-1], segments, *given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="flash"), "reference, blockwise"),
        (dict(implementation="tokamax"), "Hopper"),
        (dict(implementation="gpu"), "Hopper"),
        (dict(implementation="splash"), "TPU v5"),
        (dict(implementation="tpu"), "TPU v5"),
        (dict(implementation="tpu_interpret", tokens=100), "multiples of 128"),
        (dict(implementation="tpu_interpret", rope=96), "rotated parts of up to 64"),
        (dict(implementation="tpu_interpret", dtype=jnp.float32), "bfloat16"),
        (dict(implementation="splash_interpret", tokens=100), "multiples of 128"),
        (dict(implementation="splash_interpret", dtype=jnp.float32), "bfloat16"),
        (dict(tokens=256), "S >= T"),
    ],
)
def test_refusals(change, message):
    c = dict(implementation="reference", tokens=128, dtype=jnp.bfloat16, rope=64) | change
    a = arrays(1, c["tokens"], 128, 2, c["dtype"], rope=c["rope"])
    with pytest.raises(ValueError, match=message):
        mla_prefill(*a, scale=1.0, implementation=c["implementation"])
