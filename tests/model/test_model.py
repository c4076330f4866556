"""The model against itself: forms, implementations, caches, masks; the parameter tree; bad input."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import DeepSeekV3, ModelConfig, Runtime
from dsv3_jax.model import transformer
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.norm import rms_norm
from tests.conftest import new_rng

TINY = dataclasses.replace(
    ModelConfig.preset("tiny"),
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=24,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
    vocab_size=64,
    max_position_embeddings=64,
    initializer_range=0.2,
    num_nextn_predict_layers=2,
)
V2 = dataclasses.replace(
    TINY, topk_method="group_limited_greedy", scoring_func="softmax", q_lora_rank=None, num_nextn_predict_layers=0
)
RUNTIMES = [
    Runtime(attention_form="absorbed"),
    Runtime(experts_impl="reference"),
    pytest.param(Runtime(experts_impl="blocked"), marks=pytest.mark.slow),  # what `auto` chooses here
    pytest.param(Runtime(remat="block"), marks=pytest.mark.slow),
    Runtime(remat="paper"),
]


def init(model, tokens):
    return jax.jit(model.init)(jax.random.key(0), tokens)


def run(model, *arguments, **more):
    """`model.apply` under jit: op by op it would compile for minutes."""
    method = more.pop("method", None)
    return jax.jit(lambda *a, **k: model.apply(*a, method=method, **k))(*arguments, **more)


@pytest.fixture(scope="module", params=[TINY, V2], ids=["v3", "v2"])
def case(request):
    config = request.param
    tokens = jax.random.randint(jax.random.key(1), (2, 20), 0, config.vocab_size)
    variables = init(DeepSeekV3(config), tokens)
    bias = lambda b: 0.3 * jax.random.normal(jax.random.key(2), b.shape)
    if "router" in variables:
        variables = {**variables, "router": jax.tree.map(bias, variables["router"])}
    return config, variables, tokens


@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
def test_runtimes_agree_and_share_one_tree(case, runtime):
    config, variables, tokens = case
    model = DeepSeekV3(config, runtime)
    chex.assert_trees_all_equal(init(model, tokens)["params"], variables["params"])
    expected = run(DeepSeekV3(config), variables, tokens)
    np.testing.assert_allclose(run(model, variables, tokens), expected, atol=2e-5 * float(jnp.abs(expected).max()))


def gradient(case, runtime):
    config, variables, tokens = case
    model = DeepSeekV3(config, runtime)

    def loss(params):
        further = (jnp.roll(tokens, -1, 1), jnp.roll(tokens, -2, 1))
        out = model.apply({**variables, "params": params}, tokens, further, method="forward")
        logits = [x.array() for x in (out.logits, *out.mtp_logits)]
        return sum(jnp.mean(jnp.sin(x)) for x in jax.tree.leaves((logits, out.stats, out.mtp_stats)))

    return jax.jit(jax.grad(loss))(variables["params"])


@pytest.fixture(scope="module")
def default_gradient(case):
    return gradient(case, Runtime())


@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
def test_runtimes_agree_on_gradients(case, default_gradient, runtime):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(default_gradient))
    chex.assert_trees_all_close(gradient(case, runtime), default_gradient, atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_decoding_piece_by_piece_equals_one_pass(case, form):
    config, variables, tokens = case
    model = DeepSeekV3(config, Runtime(attention_form=form))
    expected = run(DeepSeekV3(config), variables, tokens)
    cache, pieces = init_cache(config, model.runtime, 2, 32), []
    for piece in jnp.split(tokens, [7, 8, 9, 12], axis=1):
        logits, cache = run(model, variables, piece, cache, method="decode")
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), expected, atol=2e-5 * float(jnp.abs(expected).max()))
    assert cache.length.tolist() == [20, 20]


def test_cache_holds_the_latent_and_one_rotated_key(case):
    config, _, _ = case
    cache = jax.eval_shape(lambda: init_cache(config, Runtime(dtype="bfloat16"), 1, 1))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.dense, cache.moe)))
    assert size == config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 2


def test_segments_are_separate_documents(case):
    config, variables, tokens = case
    model = DeepSeekV3(config)
    segments = jnp.where(jnp.arange(20) < 8, 1, 2) * jnp.ones((2, 1), jnp.int32)
    positions = jnp.where(jnp.arange(20) < 8, jnp.arange(20), jnp.arange(20) - 8) * jnp.ones((2, 1), jnp.int32)
    packed = run(model, variables, tokens, positions=positions, segments=segments)
    alone = [run(model, variables, t) for t in (tokens[:, :8], tokens[:, 8:])]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, 1), atol=2e-5 * float(jnp.abs(packed).max()))


def test_nothing_sees_the_future(case):
    config, variables, tokens = case
    changed = tokens.at[:, 12:].set((tokens[:, 12:] + 1) % config.vocab_size)
    model = DeepSeekV3(config)
    before, after = run(model, variables, tokens), run(model, variables, changed)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert not np.allclose(before[:, 12:], after[:, 12:])


def test_bfloat16_is_close_and_keeps_logits_float32(case):
    config, variables, tokens = case
    exact = run(DeepSeekV3(config), variables, tokens)
    logits = run(DeepSeekV3(config, Runtime(dtype="bfloat16")), variables, tokens)
    assert logits.dtype == jnp.float32
    assert float(jnp.mean(logits == logits.astype(jnp.bfloat16))) < 0.1  # sums that were never rounded to bfloat16
    # Routing may flip where affinities nearly tie, so the mean is what stays close.
    assert float(jnp.mean(jnp.abs(logits - exact))) < 0.1 * float(jnp.std(exact))


def test_gradient_of_a_norms_scale_is_summed_in_float32():
    """Over 16,384 tokens. What is left is the rounding of what is normed, which a compiler may leave out."""
    rng = new_rng()
    x, g = (jnp.asarray(rng.standard_normal((8, 2048, 128)) + 0.3, jnp.bfloat16) for _ in range(2))
    got = jax.jit(lambda s: jax.vjp(lambda s: rms_norm(x, s, 1e-6), s)[1](g)[0])(jnp.ones(128))
    wide = np.float64(x)
    exact = np.sum(wide / np.sqrt((wide**2).mean(-1, keepdims=True)) * np.float64(g), axis=(0, 1))
    assert got.dtype == jnp.float32
    assert np.linalg.norm(np.float64(got) - exact) < 1e-3 * np.linalg.norm(exact)


def test_router_bias_is_float32_whatever_the_runtime():
    model = DeepSeekV3(TINY, Runtime(dtype="bfloat16", param_dtype="bfloat16"))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    chex.assert_tree_all_finite(jax.tree.map(lambda x: jnp.zeros(x.shape), variables))
    assert {x.dtype.name for x in jax.tree.leaves(variables["router"])} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(variables["params"])} == {"bfloat16"}


def test_bad_tokens_are_refused(case):
    config, variables, _ = case
    model = DeepSeekV3(config)
    with pytest.raises(ValueError, match="token id 64 is outside the vocabulary"):
        model.apply(variables, jnp.full((1, 3), 64))
    with pytest.raises(ValueError, match="token id -1"):
        model.apply(variables, jnp.full((1, 3), -1))
    with pytest.raises(ValueError, match="65 tokens, but max_position_embeddings is 64"):
        model.apply(variables, jnp.zeros((1, 65), jnp.int32))
    with pytest.raises(ValueError, match=r"exceeds max_position_embeddings \(64\)"):
        init_cache(config, model.runtime, 1, 65)
    for bad in (64, -1, -100):  # never a wrong number
        assert bool(jnp.isnan(run(model, variables, jnp.full((1, 3), bad))).all())


def test_unrolled_layers_compute_the_same(monkeypatch):
    """As on one GPU: without a loop over the sparse layers, forward or backward."""
    config = dataclasses.replace(TINY, num_hidden_layers=4, num_nextn_predict_layers=0)
    model = DeepSeekV3(config, Runtime(remat="paper", experts_impl="reference"))
    tokens = jnp.arange(14).reshape(2, 7) % config.vocab_size
    variables = model.init(jax.random.key(0), tokens)
    loss = lambda p: jnp.sum(jnp.sin(model.apply(variables | {"params": p}, tokens)))
    results, loops = [], []
    for unrolled in (False, True):
        monkeypatch.setattr(transformer, "unrolls", lambda *_, unrolled=unrolled, **__: unrolled)
        program = jax.jit(lambda p: jax.value_and_grad(loss)(p)).lower(variables["params"])
        loops.append(program.as_text().count("stablehlo.while"))
        results.append(program.compile()(variables["params"]))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)
    assert loops[1] < loops[0]


def test_unrolled_layers_decode_the_same(monkeypatch):
    config = dataclasses.replace(TINY, num_hidden_layers=4, num_nextn_predict_layers=0)
    model = DeepSeekV3(config, Runtime(experts_impl="reference", attention_form="absorbed"))
    tokens = jnp.arange(14).reshape(2, 7) % config.vocab_size
    variables = model.init(jax.random.key(0), tokens)
    cache = init_cache(config, model.runtime, 2, 16)
    results, loops = [], []
    for unrolled in (False, True):
        monkeypatch.setattr(transformer, "unrolls", lambda *_, unrolled=unrolled, **__: unrolled)
        program = jax.jit(lambda v: model.apply(v, tokens, cache, method="decode")).lower(variables)
        loops.append(program.as_text().count("stablehlo.while"))
        results.append(program.compile()(variables))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)
    assert loops[1] < loops[0]
