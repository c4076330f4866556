"""The same numbers on every mesh: loss, gradients and updated parameters of three steps equal one device's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import IGNORE, PretrainingLoss, SFTLoss
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.step import init_state, make_train_step
from tests.configs import SCHEDULE, SHARDABLE

BATCH, LENGTH, STEPS = 8, 16, 3


def make_batch(seed=0):
    """Packed documents: segments, and positions that start again in each."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, SHARDABLE.vocab_size, (BATCH, LENGTH + 1), dtype=np.int32)
    segments = np.sort(rng.integers(0, 3, (BATCH, LENGTH), dtype=np.int32), axis=1)
    positions = np.arange(LENGTH) - np.array([[np.argmax(row == s) for s in row] for row in segments])
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": segments,
        "positions": positions.astype(np.int32),
    }


KEEPS_GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradients, _, params: (gradients, gradients)
)


class Recorded(dict):
    """Leaves by path, as numpy arrays."""

    def __init__(self, tree):
        super().__init__(
            (jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        )


def run(shape, microbatches=1, loss=PretrainingLoss(SHARDABLE, SCHEDULE), steps=STEPS, **runtime):
    """Gradients of the first step, and metrics and variables after all."""
    model = DeepSeekV3(SHARDABLE, Runtime(**{"experts_impl": "ragged"} | runtime))
    placement = Placement(shape, model.runtime, parameter_axes(model), jax.devices()[: shape.devices])
    optimizer = optax.chain(KEEPS_GRADIENTS, make_optimizer(OptimizerConfig(), SCHEDULE))
    state = placement.jit_init(lambda key: init_state(model, optimizer, key))(jax.random.key(0))
    step = placement.jit_step(make_train_step(model, optimizer, loss, microbatches=microbatches), state)
    metrics, gradients = [], None
    for i in range(steps):
        state, m = step(state, placement.batch(np.arange(BATCH), make_batch(i), BATCH))
        m = {k: v for k, v in m.items() if not k.startswith("dispatch_")}  # one device has no such thing
        metrics.append(m)
        gradients = gradients or Recorded(state.opt_state[0])
    return gradients, Recorded(metrics), Recorded(state.variables), state


@pytest.fixture(scope="module")
def one_device():
    with jax.default_matmul_precision("highest"):
        return run(MeshShape())


def assert_close(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error, size = np.linalg.norm(got[name] - value), np.linalg.norm(value)
        assert error <= tolerance * size + 1e-12, f"{name}: {error / size:.1e} of its norm"


MESHES = [
    ("fsdp=2,expert=2,tensor=2", "fsdp_ep", {"attention_impl": "pallas_reference"}),
    ("stage=2,tensor=2", "pp_ep_dp", {"microbatches": 2}),
]
MORE = [
    ("fsdp=8", "fsdp", {}),
    ("context=2,tensor=2", "fsdp", {"attention_impl": "pallas_reference"}),
    ("node=2,expert=2,context=2", "fsdp_ep", {"dispatch_slack": 1.0, "interleave": 2}),
    ("fsdp=2,expert=4", "fsdp_ep", {"dispatch": "all_gather"}),
    ("stage=2,expert=4", "pp_ep_dp", {"microbatches": 2}),
    ("data=2,tensor=4", "fsdp", {}),
    ("context=8", "fsdp", {}),
    ("node=4,expert=2", "fsdp_ep", {"dispatch_slack": 8.0, "remat": "block"}),
    ("expert=8", "fsdp_ep", {}),
    ("node=2,expert=4", "fsdp_ep", {}),
    ("context=2,expert=4", "fsdp_ep", {"remat": "paper"}),
    ("data=2,node=2,expert=2", "fsdp_ep", {"experts_impl": "blocked"}),
    ("stage=2,data=2,expert=2", "pp_ep_dp", {"microbatches": 2, "pipeline": "zero_bubble"}),
    ("data=2,fsdp=2,context=2", "fsdp", {}),
    ("expert=8", "fsdp_ep", {"dispatch_slack": 16.0}),
    ("data=2,expert=2,tensor=2", "ep_tp", {}),
    ("fsdp=2,expert=2,tensor=2", "fsdp_ep", {"microbatches": 2}),
    ("stage=2,data=2,expert=2", "pp_ep_dp", {"microbatches": 2, "attention_impl": "pallas_reference"}),
    ("stage=2,node=2,expert=2", "pp_ep_dp", {"microbatches": 2}),
    ("node=8", "fsdp_ep", {"dispatch": "all_gather"}),
    ("stage=2,expert=2,tensor=2", "pp_ep_dp", {"microbatches": 2, "attention_impl": "pallas_reference"}),
    ("stage=2,data=2,context=2", "pp_ep_dp", {"microbatches": 2, "attention_impl": "pallas_reference"}),
    ("stage=2,context=2", "pp_ep_dp", {"microbatches": 2}),
    ("stage=2,context=2", "pp_ep_dp", {"microbatches": 2, "pipeline": "zero_bubble"}),
    ("fsdp=2,context=2,tensor=2", "fsdp", {"microbatches": 2}),
    ("data=2,expert=2", "fsdp_ep", {"microbatches": 2}),
]


@pytest.mark.parametrize(
    ("shape", "sharding", "runtime"),
    [*MESHES, *(pytest.param(*m, marks=pytest.mark.slow) for m in MORE)],
    ids=lambda v: str(v).replace(" ", ""),
)
def test_every_mesh_computes_the_same(one_device, shape, sharding, runtime):
    gradients, metrics, variables, state = run(MeshShape.parse(shape), sharding=sharding, **runtime)
    assert_close(gradients, one_device[0])
    assert_close(metrics, one_device[1])
    assert_close(variables, one_device[2])
    assert_close(Recorded(state.opt_state), Recorded(one_device[3].opt_state))
    cut = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated]
    assert cut or shape == "context=8"  # which cuts activations alone


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["1f1b", "zero_bubble"])
def test_fine_tuning_in_a_pipeline_keeps_the_gradient_of_mtp_in_its_modules(pipeline):
    alone, in_pipeline = (
        run(MeshShape(stage=stages), 2, SFTLoss(SHARDABLE), 1, sharding=sharding, pipeline=pipeline)[0]
        for stages, sharding in ((1, "single"), (2, "pp_ep_dp"))
    )
    assert_close(in_pipeline, alone)


def test_exchanges_of_padding_count_among_all():
    """Two of eight rows are real, both on the first device; all tokens go to its experts, in rounds."""
    runtime = Runtime(experts_impl="ragged", sharding="fsdp_ep", dispatch_slack=1.0)
    model, shape = DeepSeekV3(SHARDABLE, runtime), MeshShape(expert=2)
    placement = Placement(shape, runtime, parameter_axes(model), jax.devices()[:2])
    optimizer = optax.sgd(0.0)
    state = placement.jit_init(lambda key: init_state(model, optimizer, key))(jax.random.key(0))
    few = lambda bias: jnp.where(jnp.arange(bias.shape[-1]) < bias.shape[-1] // 2, bias + 10, bias)
    state = dataclasses.replace(state, router=jax.tree.map(few, state.router))
    step = placement.jit_step(make_train_step(model, optimizer, PretrainingLoss(SHARDABLE, SCHEDULE)), state)
    batch = make_batch(0)
    batch["targets"] = np.where(np.arange(BATCH)[:, None] < 2, batch["targets"], IGNORE)
    _, metrics = step(state, placement.batch(np.arange(BATCH), batch, BATCH), jnp.int32(2))
    assert 0 < metrics["dispatch_in_rounds"] <= 1
