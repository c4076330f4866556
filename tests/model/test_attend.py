"""The model with the attention kernels against the model without: logits, generation, training, refusals."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import DeepSeekV3, Runtime
from dsv3_jax.config import ConfigError
from dsv3_jax.inference.generate import generate
from dsv3_jax.model import attend as seam
from dsv3_jax.model.attend import attend, attention, right_align
from dsv3_jax.model.attention import MultiHeadLatentAttention
from dsv3_jax.model.cache import ContiguousCache, Keys, LayerCache, TokenPositions, init_cache
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.training.losses import PretrainingLoss
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.step import init_state, make_train_step
from pallas_kernels.ahead_of_time import compile_for_tpu, lower_for_hopper
from tests.configs import KERNEL_SIZES
from tests.conftest import new_rng

# Of bfloat16: chosen, not derived from a bound.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def one_layer(latent, rope_key):
    return LayerCache(ContiguousCache(latent[None], rope_key[None]), 0)


def models(impl, dtype, form="expanded"):
    return [
        DeepSeekV3(KERNEL_SIZES, Runtime(dtype=dtype, experts_impl="blocked", attention_impl=i, attention_form=form))
        for i in ("reference", impl)
    ]


@pytest.fixture(scope="module")
def variables():
    model = DeepSeekV3(KERNEL_SIZES, Runtime(experts_impl="blocked"))
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def assert_same(out, ref, dtype):
    out, ref = np.asarray(out), np.asarray(ref)
    assert np.linalg.norm(out - ref) < TOLERANCE[dtype] * np.linalg.norm(ref)


@pytest.mark.parametrize(("impl", "dtype"), [("pallas_reference", "float32"), ("tpu_interpret", "bfloat16")])
def test_logits_of_packed_documents(variables, impl, dtype):
    tokens = jax.random.randint(jax.random.key(1), (2, 128), 0, 64)
    segments = jnp.asarray(np.arange(128) >= np.array([[50], [97]]), jnp.int32)
    ref, out = (jax.jit(m.apply)(variables, tokens, segments=segments) for m in models(impl, dtype))
    assert_same(out, ref, dtype)


@pytest.mark.parametrize(
    ("impl", "dtype", "form", "tokens"),
    [
        ("pallas_reference", "float32", "expanded", 7),  # a second piece of a prompt, at two places
        ("pallas_reference", "float32", "absorbed", 2),
        ("blockwise", "float32", "absorbed", 2),
        pytest.param("tpu_interpret", "bfloat16", "expanded", 128, marks=pytest.mark.slow),
    ],
)
def test_continuing_from_a_cache(variables, impl, dtype, form, tokens):
    models_ = models(impl, dtype, form)
    cache = init_cache(KERNEL_SIZES, models_[0].runtime, 2, 256)
    prompt, following = (jax.random.randint(jax.random.key(i), (2, n), 0, 64) for i, n in enumerate((80, tokens)))
    decode = lambda m: jax.jit(lambda v, t, c: m.apply(v, t, c, method="decode"))
    _, cache = decode(models_[0])(variables, prompt, cache)
    cache = dataclasses.replace(cache, length=jnp.asarray([80, 33], jnp.int32))
    (ref, cache_a), (out, cache_b) = (decode(m)(variables, following, cache) for m in models_)
    assert_same(out, ref, dtype)
    for a, b in zip(jax.tree.leaves(cache_b), jax.tree.leaves(cache_a), strict=True):
        assert_same(a.astype(jnp.float32), b.astype(jnp.float32), dtype)


def test_right_aligned_sequences_end_with_their_last_token():
    latent, k_rope = (np.arange(2 * 8 * n).reshape(2, 8, n) for n in (3, 2))
    lengths = [5, 8]
    places = jnp.broadcast_to(jnp.arange(8), (2, 8))
    aligned = right_align(Keys(jnp.asarray(latent), jnp.asarray(k_rope), places, lengths=jnp.asarray(lengths)))
    for before, after in zip((latent, k_rope), (aligned.latent, aligned.rope_key), strict=True):
        for b, n in enumerate(lengths):
            np.testing.assert_array_equal(after[b, 8 - n :], before[b, :n])
    np.testing.assert_array_equal(aligned.segments, [[0] * 3 + [1] * 5, [1] * 8])


@pytest.mark.parametrize(("sharding", "mesh"), [("single", True), ("ep_tp", True), ("ep_tp", False)])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_a_kernel_is_the_plain_attention(form, sharding, mesh, monkeypatch):
    """Queries at the end of packed sequences, or of caches. On a mesh each device has its sequences and its heads."""
    name, seen = ("mla_prefill", []) if form == "expanded" else ("mla_decode", [])
    plain = getattr(seam, name)
    monkeypatch.setattr(seam, name, lambda q, *a, **k: seen.append(q.shape[:3]) or plain(q, *a, **k))
    rng, heads = new_rng(), 4 if form == "expanded" else 1
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, q_rope, k, k_rope = (draw(*s) for s in ((2, 3, 4, 512), (2, 3, 4, 64), (2, 128, heads, 512), (2, 128, 64)))
    v = draw(2, 128, heads, 512) if form == "expanded" else k
    lengths = jnp.asarray([128, 128] if form == "expanded" else [40, 128])
    segments = jnp.asarray(np.arange(128) >= np.array([[126], [60]]), jnp.int32) if form == "expanded" else None
    expected = attention(
        *(q, q_rope, k, k_rope, v),
        q_places=lengths[:, None] - 3 + jnp.arange(3),
        k_places=jnp.broadcast_to(jnp.arange(128), (2, 128)),
        q_segments=None if segments is None else segments[:, -3:],
        k_segments=segments,
        scale=0.1,
    )
    runtime = Runtime(attention_impl="pallas_reference", attention_form=form, sharding=sharding)
    held = None if form == "expanded" else lengths
    where = TokenPositions(lengths[:, None] - 3 + jnp.arange(3))
    places = jnp.broadcast_to(jnp.arange(128), (2, 128))

    @jax.jit
    def by_kernel(q, q_rope, k, k_rope, v):
        keys = Keys(k[:, :, 0], k_rope, places, segments, held)
        return attend(q, q_rope, k, v, keys, where, KERNEL_SIZES, runtime, scale=0.1)

    with jax.set_mesh(make_mesh(MeshShape(data=2, tensor=2), jax.devices()[:4])) if mesh else contextlib.nullcontext():
        assert_same(by_kernel(q, q_rope, k, k_rope, v), expected, "float32")
    assert set(seen) == {(1, 3, 2) if mesh and sharding != "single" else (2, 3, 4)}


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_layer_continues_from_a_cache(form):
    ref, ours = (MultiHeadLatentAttention(KERNEL_SIZES, m.runtime) for m in models("pallas_reference", "float32", form))
    rng, start = new_rng(), jnp.asarray([80, 33], jnp.int32)
    x, latent, rope_key = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 3, 64), (2, 128, 512), (2, 128, 64))
    )
    index, cache = TokenPositions(start[:, None] + jnp.arange(3), cached=start), one_layer(latent, rope_key)
    variables = jax.jit(ref.init)(jax.random.key(0), x, index, cache)
    (a, cache_a), (b, cache_b) = (jax.jit(m.apply)(variables, x, index, cache) for m in (ref, ours))
    assert_same(b, a, "float32")
    assert jax.tree.all(jax.tree.map(jnp.array_equal, cache_a, cache_b))


@pytest.mark.parametrize("impl", ["tpu_interpret", "gpu_interpret"])
@pytest.mark.slow
def test_decoding_layer(impl, capsys):
    """The interpreters' effects don't fit into a scan over layers."""
    key = jax.random.key(int(new_rng().integers(1 << 30)))
    ref, ours = (MultiHeadLatentAttention(KERNEL_SIZES, m.runtime) for m in models(impl, "bfloat16", "absorbed"))
    x, latent, rope_key = (
        jax.random.normal(jax.random.fold_in(key, i), s, jnp.bfloat16)
        for i, s in enumerate([(2, 2, 64), (2, 128, 512), (2, 128, 64)])
    )
    start = jnp.asarray([80, 33], jnp.int32)
    index = TokenPositions(start[:, None] + jnp.arange(2), cached=start)
    cache = one_layer(latent, rope_key)
    variables = ref.init(key, x, index, cache)
    (a, cache_a), (b, cache_b) = (m.apply(variables, x, index, cache) for m in (ref, ours))
    assert_same(b.astype(jnp.float32), a.astype(jnp.float32), "bfloat16")
    assert jax.tree.all(jax.tree.map(jnp.array_equal, cache_a, cache_b))
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "compile_for",
    [
        lower_for_hopper,
        functools.partial(compile_for_tpu, "v5p"),
        *(pytest.param(functools.partial(compile_for_tpu, name), marks=pytest.mark.slow) for name in ("v6e", "tpu7x")),
    ],
)
def test_decoding_compiles(variables, compile_for):
    model = models("gpu" if compile_for is lower_for_hopper else "tpu", "bfloat16", "absorbed")[1]
    given = variables, jnp.zeros((2, 1), jnp.int32), init_cache(KERNEL_SIZES, model.runtime, 2, 256)
    given = jax.eval_shape(lambda *a: a, *given)
    compile_for(lambda v, t, c: model.apply(v, t, c, method="decode"), *given)


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "paper"])
def test_training_compiles_for_a_tpu(variables, remat):
    """Attention and experts by kernels, forward and backward, in the scan over layers."""
    runtime = Runtime(dtype="bfloat16", attention_impl="tpu", experts_impl="tokamax", remat=remat)
    model = DeepSeekV3(KERNEL_SIZES, runtime)
    loss = lambda v, tokens, segments: jnp.sum(model.apply(v, tokens, segments=segments))
    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    compiled = compile_for_tpu(
        "v5p", jax.grad(loss, allow_int=True), jax.eval_shape(lambda v: v, variables), tokens, tokens
    )
    assert compiled.as_text().count("tpu_custom_call") >= 9  # three of attention and at least six of the experts


@pytest.mark.parametrize(("sharding", "shape"), [("ep_tp", "data=2,tensor=2"), ("fsdp", "fsdp=2,tensor=2")])
def test_decoding_on_a_mesh(variables, sharding, shape):
    """Sequences and heads cut over devices; the cache is where the rules put it."""
    plain, ours = models("pallas_reference", "float32", "absorbed")
    ours = ours.clone(runtime=dataclasses.replace(ours.runtime, sharding=sharding, experts_impl="ragged"))
    tokens = jax.random.randint(jax.random.key(1), (4, 2), 0, 64)
    cache = dataclasses.replace(
        init_cache(KERNEL_SIZES, plain.runtime, 4, 128), length=jnp.asarray([80, 33, 0, 64], jnp.int32)
    )
    decode = lambda m: jax.jit(lambda v, t, c: m.apply(v, t, c, method="decode")[0])(variables, tokens, cache)
    expected = decode(plain)
    with jax.set_mesh(make_mesh(MeshShape.parse(shape), jax.devices()[:4])):
        assert_same(decode(ours), expected, "float32")


def test_decoding_has_no_gradient(variables):
    model = models("pallas_reference", "float32", "absorbed")[1]
    cache = init_cache(KERNEL_SIZES, model.runtime, 1, 128)
    loss = lambda v: model.apply(v, jnp.zeros((1, 1), jnp.int32), cache, method="decode")[0].sum()
    with pytest.raises(ConfigError, match="has no gradient: train in the expanded form"):
        jax.grad(loss)(variables)


def test_generation(variables):
    ref, out = (generate(m, variables, [[1, 2, 3], [4] * 70], 5) for m in models("pallas_reference", "float32"))
    np.testing.assert_array_equal(out, ref)
    with pytest.raises(ConfigError, match="multiple of 128"):
        generate(models("pallas_reference", "float32")[1], variables, [[1]], 2, cache_length=200)


@pytest.mark.parametrize(
    ("impl", "dtype", "steps"),
    [("pallas_reference", "float32", 8), ("tpu_interpret", "bfloat16", 4)],
)
@pytest.mark.slow
def test_training_learns_the_same_curve(impl, dtype, steps):
    schedule = Schedule(
        ScheduleConfig(
            steps=100, batch_size=2, warmup_steps=1, peak_learning_rate=3e-3, end_learning_rate=1e-3,
            bias_update_speed=0.01,
        )
    )  # fmt: skip
    optimizer = make_optimizer(OptimizerConfig(), schedule)
    curves = []
    for model in models(impl, dtype):
        state = jax.jit(lambda key, model=model: init_state(model, optimizer, key))(jax.random.key(0))
        step = jax.jit(make_train_step(model, optimizer, PretrainingLoss(model.config, schedule)))
        curves.append([])
        for i in range(steps):
            row = (np.random.default_rng(i).integers(0, 64, (2, 1)) + np.arange(129)) % 64
            batch = {"tokens": row[:, :-1].astype(np.int32), "targets": row[:, 1:].astype(np.int32)}
            state, metrics = step(state, batch)
            curves[-1].append(float(metrics["loss"]))
    assert curves[0][-1] < curves[0][0] - 0.3
    np.testing.assert_allclose(curves[1], curves[0], rtol={"float32": 1e-4, "bfloat16": 1e-2}[dtype])


@pytest.mark.parametrize(
    ("impl", "form", "message"),
    [
        ("gpu", "expanded", "needs a Hopper GPU"),
        ("tpu", "expanded", "for TPUs needs"),
        ("gpu_interpret", "expanded", "has no expanded form: there are pallas_reference, gpu, tpu"),
        ("gpu", "absorbed", "from a cache only"),
    ],
)
def test_refusals_by_the_model(variables, impl, form, message):
    with pytest.raises(ValueError, match=message):
        models(impl, "bfloat16", form)[1].apply(variables, jnp.zeros((1, 128), jnp.int32))


@pytest.mark.parametrize("form", ["gpu", "tpu"])
def test_refusals_by_the_backend_when_decoding(variables, form):
    model = models(form, "bfloat16", "absorbed")[1]
    cache = init_cache(KERNEL_SIZES, model.runtime, 1, 128)
    with pytest.raises(ValueError, match="but the device is cpu"):
        model.apply(variables, jnp.zeros((1, 1), jnp.int32), cache, method="decode")
    odd = init_cache(KERNEL_SIZES, model.runtime, 1, 100)
    with pytest.raises(ConfigError, match="multiple of 64"):
        model.apply(variables, jnp.zeros((1, 1), jnp.int32), odd, method="decode")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attention_impl="flash"), "must be one of auto, reference"),
        (dict(attention_impl="gpu", dtype="float32"), "takes dtype bfloat16"),
    ],
)
def test_refusals_by_the_runtime(change, message):
    with pytest.raises(ConfigError, match=message):
        Runtime(**(dict(dtype="bfloat16") | change))
