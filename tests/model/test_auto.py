"""The automatic choice of implementations: what it picks on which device, and that what it picks is right."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax import DeepSeekV3, ModelConfig, Runtime
from dsv3_jax.config import PRESETS
from dsv3_jax.model.auto import attention_impl, choices, experts_impl, unrolls
from dsv3_jax.model.moe import ExpertWeights, experts
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.training.losses import forward_sums
from pallas_kernels.ahead_of_time import as_if_hopper
from pallas_kernels.mla_prefill import library
from tests.conftest import new_rng

V3, BF16 = ModelConfig.preset("v3-671b"), Runtime(dtype="bfloat16")
ABSORBED = dataclasses.replace(BF16, attention_form="absorbed")
SMALL = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1),
    **dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4),
    **dict(first_k_dense_replace=0, n_group=1, topk_group=1, num_experts_per_tok=2, num_nextn_predict_layers=0),
)


def test_choices_on_hopper():
    with as_if_hopper():
        long = dict(tokens=4096, keys=4096, cached=False)
        assert attention_impl(BF16, V3, **long) == "gpu"
        assert attention_impl(Runtime(), V3, **long) == "blockwise"  # the kernels take bfloat16
        assert attention_impl(BF16, V3, **long, in_order=False) == "blockwise"
        decode = dict(tokens=1, keys=4096, cached=True)
        assert attention_impl(ABSORBED, V3, **decode) == "gpu"
        assert attention_impl(ABSORBED, ModelConfig.preset("v3-mini"), **decode) == "reference"
        assert attention_impl(ABSORBED, V3, **decode | {"keys": 4100}) == "reference"
        assert (experts_impl(BF16), experts_impl(Runtime())) == ("gpu", "ragged")
        assert choices(BF16, V3, 4096) == "attention: gpu; experts: gpu (bfloat16 on gpu)"
        trained = choices(BF16, V3, 4096, training=True)  # of which the 58 sparse layers stay a loop
        assert trained == "attention: gpu; experts: gpu; 3 dense layers unrolled (bfloat16 on gpu)"


def test_choices_on_a_cpu():
    assert attention_impl(BF16, V3, tokens=512, keys=512, cached=False) == "reference"
    assert attention_impl(BF16, V3, tokens=4096, keys=4096, cached=False) == "blockwise"
    assert attention_impl(ABSORBED, V3, tokens=1, keys=512, cached=True) == "reference"
    assert attention_impl(ABSORBED, V3, tokens=1, keys=512, cached=True, in_pages=True) == "blockwise"
    assert choices(Runtime(), V3, 256) == "attention: reference; experts: blocked (float32 on cpu)"


def test_a_name_is_taken_as_it_is():
    runtime = dataclasses.replace(BF16, attention_impl="reference", experts_impl="ragged")
    with as_if_hopper():
        assert attention_impl(runtime, V3, tokens=4096, keys=4096, cached=False) == "reference"
        assert experts_impl(runtime) == "ragged"


@pytest.mark.parametrize("mesh", [None, pytest.param("context=2", marks=pytest.mark.slow)])
def test_long_sequences_are_right_and_never_square(mesh):
    """Loss and gradient of 1,280 tokens in two documents, and no array of H T S numbers in the program."""
    rng = new_rng()
    row = jnp.asarray(rng.integers(0, 32, (1, 1281)), jnp.int32)
    batch = {"tokens": row[:, :-1], "targets": row[:, 1:], "segments": jnp.arange(1280)[None] // 700}

    def lowered(impl, sharding="single"):
        model = DeepSeekV3(SMALL, Runtime(attention_impl=impl, sharding=sharding))
        variables = jax.jit(model.init)(jax.random.key(0), row[:, :4])
        loss = lambda p: forward_sums(model, {**variables, "params": p}, batch).cross_entropy
        return jax.jit(jax.value_and_grad(loss)).lower(variables["params"]), variables["params"]

    plain, params = lowered("reference")
    expected = plain.compile()(params)
    if mesh is None:
        ours, params = lowered("auto")
        value = ours.compile()(params)
    else:
        with jax.set_mesh(make_mesh(MeshShape.parse(mesh), jax.devices()[:2])):
            ours, params = lowered("auto", "fsdp")
            value = ours.compile()(params)
    square = re.compile("1280x1280x")
    assert square.search(plain.as_text())
    assert not square.search(ours.as_text())
    for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("width", [1408, 1536, 96, 264])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(seed=st.integers(0, 2**20))
@settings(max_examples=5)
def test_experts_of_any_width_equal_the_reference(width, dtype, seed):
    """Values and gradients of the experts, against float32's reference."""
    rng, (experts_, rows, depth, k) = np.random.default_rng(seed), (4, 24, 16, 2)
    normal = lambda *shape, fan_in=1: jnp.asarray(rng.standard_normal(shape) / fan_in**0.5, dtype)
    w = ExpertWeights(
        *(normal(experts_, depth, width, fan_in=depth) for _ in range(2)), normal(experts_, width, depth, fan_in=width)
    )
    x, dy = normal(1, rows, depth), normal(1, rows, depth)
    ids = jnp.asarray(rng.permuted(np.tile(np.arange(experts_), (rows, 1)), axis=1)[None, :, :k], jnp.int32)
    gates = jnp.asarray(rng.uniform(size=(1, rows, k)), jnp.float32)

    def both(impl, dtype):
        x_, w_, dy_ = jax.tree.map(lambda a: a.astype(dtype), (x, w, dy))
        runtime = Runtime(dtype=dtype, experts_impl=impl)
        y, back = jax.vjp(lambda x, w, g: experts(x, ids, g, w, SMALL, runtime), x_, w_, gates)
        return y, back(dy_)

    limit = 1e-5 if dtype == "float32" else 0.02
    expected = jax.tree.leaves(both("reference", "float32"))
    for a, b in zip(jax.tree.leaves(both("auto", dtype)), expected, strict=True):
        a, b = (np.asarray(value, np.float64) for value in (a, b))
        assert np.linalg.norm(a - b) <= limit * np.linalg.norm(b)


IN_DEFAULT = ("v3-671b", "v2-236b")
"""The presets whose gates and attention differ most; the others are like one of them."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_DEFAULT else pytest.mark.slow) for name in PRESETS]
)
def test_every_preset_equals_the_reference(name):
    """A small model with the preset's head widths, gate and RoPE; sequences long enough for blockwise attention."""
    preset = ModelConfig.preset(name)
    experts_of = dict(n_routed_experts=4 * preset.n_group, num_experts_per_tok=2 * preset.topk_group)
    config = dataclasses.replace(
        preset,
        **dict(vocab_size=32, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_attention_heads=2),
        **dict(num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0, initializer_range=0.1),
        **(experts_of if preset.num_moe_layers else {}),
    )
    length = min(1100, config.max_position_embeddings)
    tokens = jnp.asarray(new_rng().integers(0, 32, (1, length)), jnp.int32)
    models = [
        DeepSeekV3(config, Runtime(**how)) for how in ({}, {"attention_impl": "reference", "experts_impl": "reference"})
    ]
    variables = jax.jit(models[0].init)(jax.random.key(0), tokens[:, :4])
    ours, plain = (np.asarray(jax.jit(model.apply)(variables, tokens)) for model in models)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=5e-5 * np.abs(plain).max())


def test_few_layers_are_unrolled_in_training_and_decoding_on_one_gpu():
    with as_if_hopper():
        assert unrolls(8, BF16)
        assert unrolls(8, BF16, tokens=2)
        assert not unrolls(9, BF16)
        assert not unrolls(8, dataclasses.replace(BF16, remat="block"))
        assert not unrolls(8, BF16, tokens=64)  # a prompt
        assert not unrolls(8, dataclasses.replace(BF16, sharding="fsdp"))
    assert not unrolls(2, BF16)


def test_training_of_long_rows_asks_cudnn_alone(monkeypatch):
    """Also where layers are traced by themselves; tokamax takes seconds to import and trace."""
    config = dataclasses.replace(SMALL, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_hidden_layers=2)
    model = DeepSeekV3(config, Runtime(dtype="bfloat16", remat="paper", experts_impl="ragged"))
    monkeypatch.setattr(library.fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library.fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(library, "tokamax", None)  # not to be called
    tokens = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    variables = jax.eval_shape(DeepSeekV3(config).init, jax.random.key(0), tokens)

    def loss(variables, tokens):
        return model.apply(variables, tokens, (), method="forward").logits.cross_entropy(tokens)[0].sum()

    with as_if_hopper():
        assert "dot_product_attention_fwd" in str(jax.make_jaxpr(jax.grad(loss))(variables, tokens))
        assert "dot_product_attention_fwd" in str(jax.make_jaxpr(loss)(variables, tokens))
