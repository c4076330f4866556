"""Estimates of FLOPs and memory against the compiler's, for whole training steps on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.accounting.flops import count_flops
from dsv3_jax.accounting.hardware import hardware
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.planning import aot
from dsv3_jax.planning.aot import aot_plan
from dsv3_jax.planning.compiled import costs, costs_of_all_layers, device_bytes
from dsv3_jax.planning.memory import memory
from dsv3_jax.planning.options import PlanArgs
from dsv3_jax.planning.plan import plan_command
from dsv3_jax.planning.training_plan import TrainingPlan
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import PretrainingLoss
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.step import init_state, make_train_step

WIDE = dataclasses.replace(
    ModelConfig.preset("tiny"),
    vocab_size=512,
    hidden_size=256,
    intermediate_size=768,
    moe_intermediate_size=128,
    num_attention_heads=4,
    n_routed_experts=8,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
)


def program(config, remat, batch, length):
    """Experts as the plain reference: its products appear in the program as they were traced."""
    model = DeepSeekV3(config, Runtime(dtype="bfloat16", remat=remat, experts_impl="reference"))
    schedule = Schedule(ScheduleConfig(steps=100, batch_size=batch))
    optimizer = make_optimizer(OptimizerConfig(), schedule)
    state = jax.eval_shape(lambda: init_state(model, optimizer, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return (
        make_train_step(model, optimizer, PretrainingLoss(model.config, schedule)),
        state,
        {"tokens": tokens, "targets": tokens},
    )


def compile_step(config, remat, batch, length):
    step, *arguments = program(config, remat, batch, length)
    return jax.jit(step, donate_argnums=0).lower(*arguments).compile()


CASES = [
    (WIDE, "none", 2, 256),
    pytest.param(WIDE, "block", 8, 256, marks=pytest.mark.slow),
    pytest.param(ModelConfig.preset("v3-mini"), "none", 4, 512, marks=pytest.mark.slow),
    pytest.param(ModelConfig.preset("v3-mini"), "block", 4, 512, marks=pytest.mark.slow),
    pytest.param(ModelConfig.preset("v3-mini"), "paper", 4, 512, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("config", "remat", "batch", "length"), CASES)
def test_memory_and_flops_of_a_step(config, remat, batch, length):
    compiled = compile_step(config, remat, batch, length)
    plan = TrainingPlan(
        config,
        hardware("h100"),
        MeshShape(),
        batch,
        length,
        batch,
        remat=remat,
        weight=2,
        fused_attention=False,
        experts_impl="reference",
    )
    # Where a block's backward pass is the largest part, the plan is above: not all of its arrays live at once.
    above = 0.25 if config is WIDE and remat == "block" else 0.15
    assert 0.85 < memory(plan).total / device_bytes(compiled) < 1 + above
    step, *arguments = program(config, remat, batch, length)
    # The compiler counts a loop's body once, and elementwise work too.
    once = count_flops(step, *arguments, repeat_loops=False)
    assert once == pytest.approx(costs(compiled).flops, rel=0.03 if config is not WIDE else 0.06)


def test_recomputation_saves_memory_outside_loops_too():
    """One layer of a kind is no loop, nor are MTP modules: XLA could merge recomputation with what it repeats."""
    config = dataclasses.replace(WIDE, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=2)
    none, block = (
        compile_step(config, remat, 2, 512).memory_analysis().temp_size_in_bytes for remat in ("none", "block")
    )
    assert block < 0.7 * none


@pytest.mark.slow
def test_layers_counted_by_differences():
    """Three small programs give the costs of a deep one: its FLOPs grow by as much as the traced ones do."""
    compiler = costs_of_all_layers(lambda c: compile_step(c, "none", 2, 128), WIDE)
    step, *arguments = program(WIDE, "none", 2, 128)
    assert count_flops(step, *arguments) == pytest.approx(compiler.flops, rel=0.08)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aot": "v5p:2x2x2", "mesh": "fsdp=4", "length": 512}, "mesh fsdp=4 has 4 devices, but there are 8"),
        ({"aot": "v9:2x2"}, "unknown hardware 'v9'"),
        (
            {"aot": "v5p:2x2x1", "precision": "fp8"},
            "precision is fp8: .* with precision bf16 and pipeline_schedule 1f1b only",
        ),
        ({"aot": "v5p:2x2x1", "pipeline_schedule": "dualpipe"}, "pipeline_schedule is dualpipe: .* only"),
        ({"aot": "v5p:2x2x1", "batch": 5, "microbatch_size": 2, "length": 512}, "doesn't divide"),
    ],
)
def test_what_cannot_be_compiled_is_said(options, message):
    with pytest.raises(ConfigError, match=message):
        aot_plan(PlanArgs(**options), ModelConfig.preset("tiny"))


def test_mtp_can_be_left_out(monkeypatch, capsys):
    planned = []
    monkeypatch.setattr(aot, "aot_plan", lambda args, config: planned.append(config) or {})
    plan_command(PlanArgs(preset="tiny", aot="v5e:2x2", mtp=False, json=True))
    plan_command(PlanArgs(preset="tiny", aot="v5e:2x2", json=True))
    assert [config.num_nextn_predict_layers for config in planned] == [0, 1]


@pytest.mark.slow
def test_a_step_for_a_tpu_that_is_not_there():
    args = PlanArgs(preset="tiny", aot="v5p:2x2x1", batch=8, microbatch_size=8, length=1024, remat="block")
    with jax.default_matmul_precision("default"):  # bfloat16 products in float32 pieces don't compile for a TPU
        result = aot_plan(args, ModelConfig.preset("tiny"))
    ratios = {row["what"]: row["estimate"] / row["compiler"] for row in result["rows"]}
    assert ratios["memory"] == pytest.approx(1, abs=0.15)


def compile_for_pod(topology, mesh, preset, batch, **options):
    args = PlanArgs(preset=preset, aot=topology, mesh=mesh, batch=batch, **{"remat": "block"} | options)
    with jax.default_matmul_precision("default"):
        return aot_plan(args, ModelConfig.preset(preset))


@pytest.mark.slow
def test_a_small_pod():
    """EP over two nodes' worth of chips, FSDP and tensor parallelism at once, with the accelerators' exact exchange."""
    result = compile_for_pod("v5p:2x2x4", "fsdp=2,expert=4,tensor=2", "tiny", 16, length=256)
    assert result["fits"]
    found = {c["kind"] for c in result["collectives"] if c["bytes"]}
    assert {"ragged-all-to-all", "all-gather", "all-reduce"} <= found


@pytest.mark.slow
def test_devices_of_a_chip_share_its_memory():
    result = compile_for_pod("tpu7x:2x2x1", "fsdp=8", "tiny", 8, length=256)
    assert result["memory"] == 96 << 30


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:8x16x16", "tpu7x:8x8x16"])
def test_the_whole_model_on_a_pod(topology):
    """671B parameters on 2,048 devices, sequences of 4,096: by the compiler's own account it fits."""
    result = compile_for_pod(topology, "fsdp=16,expert=64,tensor=2", "v3-671b", 1024, length=4096, moments="bfloat16")
    assert result["fits"], result
    assert result["compile_seconds"] < 900
