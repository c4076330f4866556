"""Grouped-matmul kernels in the experts of a model: ours lowers for a GPU, and what can't be is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config import ConfigError, ModelConfig, Runtime
from dsv3_jax.model.moe import MoE
from tests.pallas_kernels.targets import lower_for_hopper

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


def test_what_a_kernel_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="experts_impl 'gpu' takes dtype bfloat16, not float32"):
        Runtime(experts_impl="gpu")
    loss, variables, x = loss_of(CONFIG, "tokamax")
    with pytest.raises(ValueError, match="by tokamax for TPUs needs one of TPU"):
        jax.eval_shape(loss, variables, x)
    loss, variables, x = loss_of(CONFIG, "gpu")
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        jax.eval_shape(loss, variables, x)
