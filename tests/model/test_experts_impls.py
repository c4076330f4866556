"""Grouped-matmul kernels in the experts of a model: ours lowers for a GPU, and what can't be is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.model.auto import experts_impl
from dsv3_jax.model.moe import ExpertWeights, MoE, experts
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.config import TrainConfig
from pallas_kernels.ahead_of_time import as_if_hopper, lower_for_hopper
from pallas_kernels.grouped_matmul import api

CONFIG = dataclasses.replace(ModelConfig.preset("tiny"), hidden_size=256, moe_intermediate_size=256)


def loss_of(config, impl):
    layer = MoE(config, Runtime(dtype="bfloat16", experts_impl=impl))
    x = jax.ShapeDtypeStruct((2, 64, config.hidden_size), jnp.bfloat16)
    plain = MoE(config, Runtime(dtype="bfloat16"))
    variables = jax.eval_shape(plain.init, jax.random.key(0), x)
    loss = lambda variables, x: jnp.sum(layer.apply(variables, x)[0].astype(jnp.float32) ** 2)
    return loss, variables, x


def test_our_kernel_lowers_for_hopper():
    loss, variables, x = loss_of(CONFIG, "gpu")
    text = lower_for_hopper(loss, variables, x)
    assert text.count("mosaic_gpu") >= 3  # gate, up and down


def test_our_kernel_is_hoppers_default():
    assert experts_impl(Runtime.for_backend("gpu")) == "blocked"  # this is no GPU
    with as_if_hopper():
        assert experts_impl(Runtime.for_backend("gpu")) == "gpu"
        assert experts_impl(TrainConfig.preset("v3-mini", "gpu").runtime) == "gpu"


@pytest.mark.parametrize("shape", [pytest.param("expert=8", marks=pytest.mark.slow), "fsdp=2,expert=2,tensor=2"])
def test_our_kernel_lowers_on_a_mesh(shape, monkeypatch):
    """Forward and backward under the exchange of tokens, at v3-mini's widths, which are no multiples of 256."""
    monkeypatch.setattr(api, "require_hopper", lambda kernel: None)  # the mesh is of CPUs
    config = dataclasses.replace(CONFIG, hidden_size=512, moe_intermediate_size=192)
    runtime = Runtime(dtype="bfloat16", experts_impl="gpu", remat="paper", sharding="fsdp_ep")
    sd = jax.ShapeDtypeStruct
    e, k, d, f = config.n_routed_experts, config.num_experts_per_tok, 512, 192
    w = ExpertWeights(*(sd(s, jnp.bfloat16) for s in ((e, d, f), (e, d, f), (e, f, d))))
    x, ids, weights = sd((8, 64, d), jnp.bfloat16), sd((8, 64, k), jnp.int32), sd((8, 64, k), jnp.float32)
    loss = lambda x, ids, weights, w: jnp.sum(experts(x, ids, weights, w, config, runtime).astype(jnp.float32))
    with jax.set_mesh(make_mesh(MeshShape.parse(shape))):
        program = jax.jit(jax.grad(loss, (0, 3))).trace(x, ids, weights, w)
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 6  # gate, up and down; their gradients


def test_what_a_kernel_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="experts_impl 'gpu' takes dtype bfloat16, not float32"):
        Runtime(experts_impl="gpu")
    loss, variables, x = loss_of(CONFIG, "tokamax")
    with pytest.raises(ValueError, match="by tokamax for TPUs needs one of TPU"):
        jax.eval_shape(loss, variables, x)
    loss, variables, x = loss_of(CONFIG, "gpu")
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        jax.eval_shape(loss, variables, x)
