"""On a CPU a decoding step reads experts where they lie, rather than copying a layer's out of the stack."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import DeepSeekV3, Runtime
from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.engine import Engine, EngineConfig
from dsv3_jax.inference.expert_stacks import experts_in_stacks
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.moe import STACKS

TINY = dataclasses.replace(ModelConfig.preset("tiny"), max_position_embeddings=64)
COPIED = f"f32[{TINY.n_routed_experts},{TINY.hidden_size},{TINY.moe_intermediate_size}]"
"""A layer's experts in a compiled program."""


def model_and_variables(**runtime):
    model = DeepSeekV3(TINY, Runtime(**{"attention_form": "absorbed"} | runtime))
    return model, jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))()


def test_a_step_is_the_same_and_copies_no_layers_experts():
    model, variables = model_and_variables()
    cache = init_cache(TINY, model.runtime, 3, 64)
    tokens = jnp.array([[5], [6], [7]])
    results, copies = [], []
    for given in (variables, experts_in_stacks(model, variables)):
        program = jax.jit(lambda v: model.apply(v, tokens, cache, method="decode")).lower(given).compile()
        copies.append(COPIED in program.as_text())
        results.append(program(given))
    assert copies == [True, False]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_the_arrays_are_the_callers():
    model, variables = model_and_variables()
    engine = Engine(model, variables, EngineConfig(max_batch=2, max_length=32))
    experts = variables["params"]["moe_layers"]["mlp"]["experts"]
    held = engine._variables[STACKS]["moe_layers"]["mlp"]["experts"]
    assert all(held[name] is experts[name] for name in experts)
    assert "experts" not in engine._variables["params"]["moe_layers"]["mlp"]
    engine.replace_variables(jax.tree.map(lambda a: a + 0, variables))
    assert STACKS in engine._variables
    engine.close()


@pytest.mark.parametrize("other", [dict(dtype="bfloat16"), dict(experts_impl="ragged"), dict(precision="fp8")], ids=str)
def test_otherwise_variables_stay_as_they_are(other):
    model, variables = model_and_variables(**other)
    assert experts_in_stacks(model, variables) is variables
