"""The pipeline's schedule, and what it refuses. That it computes the same is in test_meshes."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.parallel.pipeline import bubble, duration, layers_of_stages
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import PretrainingLoss
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.step import init_state, make_train_step
from tests.configs import SCHEDULE, SHARDABLE
from tests.parallel.test_meshes import BATCH, make_batch


@pytest.mark.parametrize(("layers", "stages"), [(58, 16), (58, 2), (3, 2), (7, 7), (9, 4)])
def test_every_layer_is_on_one_stage_and_the_ends_have_fewest(layers, stages):
    table = layers_of_stages(layers, stages)
    assert sorted(table[table < layers]) == list(range(layers))
    counts = (table < layers).sum(1)
    assert counts.max() - counts.min() <= 1
    assert stages == 2 or counts[0] == counts[-1] == counts.min()


def test_durations():
    """With S stages, 1F1B waits for S - 1 of M + S - 1 rounds; zero_bubble for two thirds of S - 1 shorter ones."""
    assert duration("1f1b", 4, 12) == 4 * 15
    assert duration("zero_bubble", 4, 12) == 3 * 12 + 2 * 3
    assert np.isclose(bubble("1f1b", 16, 120), 15 / 135)
    assert np.isclose(bubble("zero_bubble", 16, 120), 30 / 390)


def first_step(shape, config=SHARDABLE, microbatches=2, further=()):
    model = DeepSeekV3(config, Runtime(sharding="pp_ep_dp"))
    placement = Placement(MeshShape.parse(shape), model.runtime, parameter_axes(model))
    optimizer = make_optimizer(OptimizerConfig(), SCHEDULE)
    init = lambda key: init_state(model, optimizer, key)
    state = jax.eval_shape(init, jax.random.key(0))
    step = make_train_step(model, optimizer, PretrainingLoss(model.config, SCHEDULE), microbatches=microbatches)
    batch = placement.batch(np.arange(BATCH), make_batch(), BATCH)
    with jax.set_mesh(placement.mesh):
        return jax.eval_shape(step, state, batch | dict(further))


@pytest.mark.parametrize(
    ("shape", "changes", "microbatches", "message"),
    [
        ("stage=8", {}, 2, "mesh.stage is 8, but there are only 3 sparse layers"),
        ("stage=2,tensor=2,context=2", {}, 2, "mesh.context and mesh.tensor can't both be combined with mesh.stage"),
        ("stage=2,expert=4", {}, 4, "a microbatch of 2 sequences doesn't divide over expert = 4"),
        ("stage=2,expert=4", {"first_k_dense_replace": 4}, 2, "the model has none"),
    ],
)
def test_what_a_pipeline_cannot_do_is_named(shape, changes, microbatches, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        first_step(shape, dataclasses.replace(SHARDABLE, **changes), microbatches)


def test_a_pipeline_refuses_to_replay_experts():
    """Which it wouldn't: its stages choose their own."""
    ids = {"choices": {"moe_layers": {"mlp": {"gate": {"ids": np.zeros((BATCH, 3, 16, 4), np.int32)}}}}}
    with pytest.raises(ConfigError, match="a pipeline don't replay"):
        first_step("stage=2,data=4", further={"experts": ids})
