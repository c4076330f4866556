"""How gradients are added up, read from the step compiled for four TPUs that aren't there: in what, and how often."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.planning.aot import topology_devices
from dsv3_jax.planning.compiled import collectives, largest_arrays
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import PretrainingLoss
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.step import init_state, make_train_step
from tests.configs import SCHEDULE, SHARDABLE

SMALL = dataclasses.replace(SHARDABLE, hidden_size=128, num_hidden_layers=2, num_nextn_predict_layers=0)


def compiled_step(mesh, microbatches, config=SMALL, **runtime):
    """The step in bfloat16, and its abstract parameters."""
    runtime = Runtime(**{"remat": "paper", "experts_impl": "ragged"} | runtime, dtype="bfloat16")
    model, optimizer = DeepSeekV3(config, runtime), make_optimizer(OptimizerConfig(), SCHEDULE)
    placement = Placement(MeshShape.parse(mesh), runtime, parameter_axes(model), list(topology_devices("v5p:2x2x1")))
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens}
    state, batch = placement.abstract(lambda key: init_state(model, optimizer, key), batch)
    step = make_train_step(model, optimizer, PretrainingLoss(config, SCHEDULE), microbatches=microbatches)
    with jax.default_matmul_precision("default"):  # bfloat16 products in float32 pieces don't compile for a TPU
        return placement.lower(step, state, batch).compile(), state.params


def sums_over_devices(mesh, microbatches, **runtime):
    """Reductions of something other than counts and tokens' routing weights, of the step in bfloat16."""
    compiled, _ = compiled_step(mesh, microbatches, **runtime)
    kinds = ("all-reduce", "reduce-scatter")
    found = [c for c in collectives(compiled) if c.kind in kinds and {"f32", "bf16"} & set(c.dtypes)]
    for c in found:
        print(mesh, c)
    return [c for c in found if "dispatch" not in c.where]


@pytest.mark.parametrize(
    ("mesh", "sharding"), [("data=2,expert=2", "fsdp_ep"), pytest.param("data=4", "fsdp", marks=pytest.mark.slow)]
)
def test_once_a_step_and_in_float32(mesh, sharding):
    """Two microbatches, whose loop is the only one that these sums could be in besides those over layers."""
    found = sums_over_devices(mesh, 2, sharding=sharding)
    # A layer whose tokens are gathered adds up the gradients of their routing weights, of 2 rows of 64 here.
    routing = 4 * 2 * 64 * SMALL.num_experts_per_tok
    found = [c for c in found if c.loops == 0 or c.axes != ("expert",) or c.bytes > routing]
    assert sum(c.bytes for c in found) > 4 * SMALL.vocab_size * SMALL.hidden_size
    assert {(c.loops, dtype) for c in found for dtype in c.dtypes if dtype != "s32"} == {(0, "f32")}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,tensor=2", "fsdp=2,tensor=2"])
def test_once_a_step_over_those_that_share_no_sequence(mesh):
    """Sums that XLA makes over `tensor` are in the loop over microbatches; none over `data` is."""
    found = sums_over_devices(mesh, 2, sharding="fsdp", attention_impl="reference")
    outside, whole = [c for c in found if c.loops == 0], SMALL.vocab_size * SMALL.hidden_size
    assert sum(c.bytes for c in outside) > 2 * whole
    weights = [c for c in found if "all_gather_weight" in c.where or c.loops == 0]
    assert not [c for c in weights if "bf16" in c.dtypes]
    assert not [c for c in found if c.loops and {"data", "fsdp"} & set(c.axes) and c.kind == "all-reduce"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["stage=4", "stage=2,data=2", "stage=2,tensor=2"])
def test_a_device_holds_no_other_stages_layers(mesh):
    """No array of the compiled step is larger than a stage's share of the largest parameter, in float32."""
    config = dataclasses.replace(
        SHARDABLE, hidden_size=512, moe_intermediate_size=1024, num_hidden_layers=9, num_nextn_predict_layers=0
    )
    compiled, params = compiled_step(mesh, 4, config, sharding="pp_ep_dp", remat="block")
    shape = MeshShape.parse(mesh)
    share = max(x.size for x in jax.tree.leaves(params["moe_layers"])) * 4 / (shape.stage * shape.tensor)
    largest = largest_arrays(compiled)
    print(mesh, share, largest)
    assert 0.9 * share <= largest[0][0] <= 1.1 * share, largest


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=4", "fsdp=2,tensor=2", "data=2,context=2"])
def test_in_float32_where_parameters_or_sequences_are_cut(mesh):
    backward = [c for c in sums_over_devices(mesh, 1, sharding="fsdp") if "transpose" in c.where]
    weights = [c for c in backward if "dot_general" in c.where and "bf16" in c.dtypes]
    assert backward
    assert not [c for c in weights if "all_gather_weight" in c.where]


@pytest.mark.slow
def test_in_bfloat16_where_the_user_says_so():
    found = sums_over_devices("data=4", 2, sharding="fsdp", gradient_dtype="bfloat16")
    assert any("bf16" in c.dtypes for c in found)
