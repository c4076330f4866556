"""The TPU compiler's schedule for four chips that are not there: products beside an exchange of tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.parallel.rules import rules_of
from dsv3_jax.parallel.sharding import state_shardings
from dsv3_jax.planning.aot import topology_devices
from dsv3_jax.planning.compiled import overlaps
from dsv3_jax.runtime import Runtime

CONFIG = dataclasses.replace(
    ModelConfig.preset("v3-mini"), num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0
)


def beside_exchanges(interleave):
    """Products that run while tokens are under way, of the usual exchange, in a forward pass over expert=4."""
    runtime = Runtime(dtype="bfloat16", sharding="fsdp_ep", interleave=interleave, experts_impl="ragged")
    model = DeepSeekV3(CONFIG, runtime)
    mesh = make_mesh(MeshShape(expert=4), topology_devices("v5p:2x2x1"))
    tokens = jax.ShapeDtypeStruct((32, 1024), jnp.int32)
    variables = jax.eval_shape(lambda: DeepSeekV3(CONFIG).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    where = state_shardings(variables, mesh, rules_of(runtime), parameter_axes(model))
    variables = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), variables, where)
    forward = jax.jit(lambda v, t: model.apply(v, t, (), method="forward").logits.array().sum())
    with jax.set_mesh(mesh):
        lowered = forward.lower(variables, tokens)
    found = overlaps(lowered.compile(compiler_options={"xla_tpu_enable_async_all_to_all": "true"}))
    usual = [o for o in found if "experts/shard_map" in o.where and "cond" not in o.where]
    assert usual
    return [p for o in usual for p in o.products]


@pytest.mark.slow
def test_one_half_is_computed_while_the_others_tokens_are_under_way():
    assert any("ragged_dot" in p for p in beside_exchanges(2))
    assert not any("ragged_dot" in p for p in beside_exchanges(1))
