"""A decoding step extends the cache where it lies: read from the memory of compiled programs, the cache donated."""

import dataclasses

import jax
import jax.numpy as jnp

from dsv3_jax import DeepSeekV3, Runtime
from dsv3_jax.inference.generate import _decode, _in_form
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.model.cache import init_cache
from pallas_kernels.ahead_of_time import compile_for_tpu
from tests.configs import KERNEL_SIZES

DEEP = dataclasses.replace(KERNEL_SIZES, num_hidden_layers=9, num_nextn_predict_layers=0, max_position_embeddings=4096)
BATCH, LENGTH = 8, 4096


def decoding_step(impl, dtype, experts):
    """The step and its abstract arguments; bytes of the cache of one layer."""
    runtime = Runtime(dtype=dtype, param_dtype=dtype, attention_impl=impl, experts_impl=experts)
    model = DeepSeekV3(DEEP, runtime)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    cache = jax.eval_shape(lambda: init_cache(DEEP, runtime, BATCH, LENGTH))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) / DEEP.num_hidden_layers
    step = lambda v, t, c: _decode.__wrapped__(_in_form(model, "absorbed"), Sampling(temperature=0), v, t, c, None)
    return (step, variables, jax.ShapeDtypeStruct((BATCH,), jnp.int32), cache), size


def test_with_kernels_nothing_is_copied():
    arguments, size = decoding_step("tpu", "bfloat16", "ragged")
    with jax.default_matmul_precision("default"):
        used = compile_for_tpu("v5p", *arguments, donate=(2,)).memory_analysis()
    assert used.alias_size_in_bytes > 8.9 * size
    assert used.temp_size_in_bytes < size / 4


def test_plain_attention_copies_one_layer_at_a_time():
    """To multiply a part of an array, XLA copies it first."""
    (step, *arguments), size = decoding_step("reference", "float32", "blocked")
    used = jax.jit(step, donate_argnums=2).lower(*arguments).compile().memory_analysis()
    assert used.alias_size_in_bytes > 8.9 * size
    assert used.temp_size_in_bytes < 2.5 * size
