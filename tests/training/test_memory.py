"""Memory of a training step is linear in the sequence: no array of all logits or all scores, read from the program."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from dsv3_jax import DeepSeekV3, ModelConfig, Runtime
from dsv3_jax.model import logits
from dsv3_jax.training.losses import PretrainingLoss
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.step import init_state, make_eval_step, make_train_step
from pallas_kernels.ahead_of_time import compile_for_tpu

NARROW = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(vocab_size=4096, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2),
    **dict(first_k_dense_replace=1, num_attention_heads=8, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16),
    **dict(qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2),
    **dict(num_nextn_predict_layers=1, max_position_embeddings=16384, rope_scaling=None),
)
# Two layers and the module that predicts a further token, at the released model's widths, with fewer experts.
V3 = dataclasses.replace(
    ModelConfig.preset("v3-671b"),
    **dict(num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=16, n_group=4, topk_group=2),
    **dict(rope_scaling=None, max_position_embeddings=16384),
)


def step_of(config, runtime, length):
    """The step on one sequence, and its abstract arguments."""
    model, optimizer = DeepSeekV3(config, runtime), optax.sgd(1.0)
    schedule = Schedule(ScheduleConfig(steps=100, batch_size=1))
    state = jax.eval_shape(lambda: init_state(model, optimizer, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    step = make_train_step(model, optimizer, PretrainingLoss(config, schedule))
    return step, state, {"tokens": tokens, "targets": tokens}


def check(compiled_at, config, lengths):
    temporaries = []
    for length in lengths:
        compiled = compiled_at(length)
        sizes = {
            math.prod(int(n) for n in dims.split(","))
            for dims in re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", compiled.as_text())
        } - {config.hidden_size * config.vocab_size}  # the head itself
        assert max(sizes) < length * config.vocab_size
        assert max(sizes) < length**2 * config.num_attention_heads
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    assert all(b <= 2.2 * a for a, b in itertools.pairwise(temporaries)), temporaries


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "paper"])
def test_on_a_cpu(remat, monkeypatch):
    monkeypatch.setattr(logits, "PIECE", 2**20)

    def compiled_at(length):
        step, *arguments = step_of(NARROW, Runtime(remat=remat), length)
        return jax.jit(step, donate_argnums=0).lower(*arguments).compile()

    check(compiled_at, NARROW, (4096, 8192))  # blocks of attention are as long for both


@pytest.mark.slow
def test_at_the_widths_of_v3_on_a_tpu():
    def compiled_at(length):
        runtime = Runtime(dtype="bfloat16", param_dtype="bfloat16", remat="paper")
        return compile_for_tpu("v5p", *step_of(V3, runtime, length), donate=(0,))

    check(compiled_at, V3, (4096, 8192, 16384))


@pytest.mark.slow
def test_validation_takes_no_more_memory_than_a_step():
    """On a batch of 16 in 8 microbatches."""
    runtime = Runtime(experts_impl="blocked", remat="block")
    model, optimizer = DeepSeekV3(NARROW, runtime), optax.sgd(1.0)
    loss = PretrainingLoss(NARROW, Schedule(ScheduleConfig(steps=100, batch_size=16)))
    state = jax.eval_shape(lambda: init_state(model, optimizer, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((16, 256), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens}

    def temporaries(step):
        return jax.jit(step).lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    of_training = temporaries(make_train_step(model, optimizer, loss, microbatches=8))
    assert temporaries(make_eval_step(model, loss, microbatches=8)) < of_training
