"""Gradients in bfloat16 against float32's: the whole model, each parameter, every way to train, on real text.

docs/numerics.md argues the limits.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import PretrainingLoss
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.step import init_state, make_train_step
from experiments.bfloat16_gradients import KINDS, errors, text_batch
from tests.parallel.test_meshes import KEEPS_GRADIENTS

CONFIG = dataclasses.replace(ModelConfig.preset("tiny"), num_hidden_layers=3)
SEQUENCES, LENGTH = 8, 512  # of which the most frequent byte is 700 times in the tokens
LIMITS = dict.fromkeys(KINDS, (0.01, 0.02)) | {"embedding": (0.005, 0.005)}
"""Limits of the error of a kind, and of any one parameter of it."""
CHOSEN = dict.fromkeys(("router", "experts"), (0.03, 0.05))
"""Where rounding sends some tokens to other experts."""


def gradient_of_a_step(shape="", microbatches=1, config=CONFIG, **runtime):
    """The gradient that the optimizer is given, on the host."""
    model = DeepSeekV3(config, Runtime(**{"dtype": "bfloat16", "experts_impl": "blocked"} | runtime))
    placement = Placement(MeshShape.parse(shape), model.runtime, parameter_axes(model))
    schedule = Schedule(ScheduleConfig(steps=10, batch_size=SEQUENCES))
    optimizer = optax.chain(KEEPS_GRADIENTS, optax.sgd(0.0))
    state = placement.jit_init(lambda key: init_state(model, optimizer, key))(jax.random.key(0))
    loss = PretrainingLoss(config, schedule)
    step = placement.jit_step(make_train_step(model, optimizer, loss, microbatches=microbatches), state)
    text = {name: np.asarray(x) for name, x in text_batch(SEQUENCES, LENGTH).items()}
    with jax.default_matmul_precision("highest" if model.runtime.dtype == "float32" else "default"):  # as users run it
        state, _ = step(state, placement.batch(np.arange(SEQUENCES), text, SEQUENCES))
    return jax.device_get(state.opt_state[0])


@pytest.fixture(scope="module")
def exact():
    return gradient_of_a_step(dtype="float32")


def check(got, expected, limits):
    found = errors(got, expected)
    print({kind: {name: f"{value:.4f}" for name, value in error.items()} for kind, error in found.items()})
    over = lambda error, limit: error["all"] > limit[0] or error["worst"] > limit[1]
    assert {kind: error for kind, error in found.items() if over(error, limits[kind])} == {}


WAYS = [
    dict(microbatches=4, experts_impl="ragged", attention_impl="pallas_reference", remat="paper"),
]
MORE = [
    dict(shape="fsdp=2,expert=2,tensor=2", sharding="fsdp_ep"),
    dict(shape="stage=2,expert=4", sharding="pp_ep_dp", microbatches=2),
    {},
    dict(remat="block"),
    dict(experts_impl="reference"),
    dict(attention_form="absorbed"),
    dict(attention_impl="tpu_interpret"),
    dict(interleave=2),
    dict(shape="data=2,tensor=4", sharding="fsdp"),
    dict(shape="context=8", sharding="fsdp"),
    dict(shape="fsdp=8", sharding="fsdp"),
    dict(shape="expert=8", sharding="fsdp_ep"),
    dict(shape="node=4,expert=2", sharding="fsdp_ep"),
    dict(shape="node=2,expert=2,context=2", sharding="fsdp_ep", interleave=2),
    dict(shape="fsdp=2,expert=4", sharding="fsdp_ep", dispatch="all_gather"),
    dict(shape="stage=2,data=2,expert=2", sharding="pp_ep_dp", microbatches=2, pipeline="zero_bubble"),
]


@pytest.mark.parametrize(
    "how", [*WAYS, *(pytest.param(way, marks=pytest.mark.slow) for way in MORE)], ids=lambda w: str(w).replace(" ", "")
)
def test_gradients_are_near_float32s(exact, how):
    check(gradient_of_a_step(**how), exact, LIMITS | CHOSEN)


@pytest.mark.slow
def test_without_a_choice_of_experts_theirs_are_as_near():
    """Every expert for every token: no affinities to tie."""
    config = dataclasses.replace(CONFIG, num_experts_per_tok=CONFIG.n_routed_experts, n_group=1, topk_group=1)
    exact = gradient_of_a_step(dtype="float32", config=config)
    check(gradient_of_a_step(config=config), exact, LIMITS)
