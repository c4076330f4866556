"""Plans: published measurements, what memory and links must satisfy, and the command."""

import dataclasses
import json
import subprocess
import sys

import pytest

from dsv3_jax.accounting.activations import saved_by_block
from dsv3_jax.accounting.hardware import HARDWARE, hardware
from dsv3_jax.accounting.parameters import count_parameters
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.planning import published
from dsv3_jax.planning.communication import exchange_seconds, nodes_reached, rate, traffic
from dsv3_jax.planning.memory import memory, parameters_per_device, stage_shares
from dsv3_jax.planning.options import PlanArgs
from dsv3_jax.planning.plan import plan_command
from dsv3_jax.planning.serving import (
    Serving,
    busiest_group,
    cache_bytes,
    decode_step,
    largest_batch,
    prefill_step,
    prefill_tokens_per_second,
    weight_bytes,
)
from dsv3_jax.planning.step_time import step_time
from dsv3_jax.planning.training_plan import TrainingPlan, meshes
from dsv3_jax.runtime import Runtime

V3 = ModelConfig.preset("v3-671b")
WITHIN = (0.6, 1.4)


def plan_of(config=V3, sheet="h800", mesh=MeshShape(), batch=256, **options):
    return TrainingPlan(config, hardware(sheet), mesh, batch, **options)


def test_published_measurements():
    found = published.compare()
    assert len(found) >= 21
    assert {c.what: c.ratio for c in found if not WITHIN[0] <= c.ratio <= WITHIN[1]} == {}


def test_sheets_are_complete():
    for sheet in HARDWARE.values():
        assert sheet.sources
        assert 0 < sheet.efficiency < 1
        assert sheet.peak("fp8") >= sheet.peak("bf16")


def test_a_prompt_and_many():
    """Many prompts run at the rate that needs no number of them; one leaves seven groups idle and reads all experts."""
    serving = Serving(V3, hardware("v6e"), 64, 8, 64)
    step = lambda prompts: prefill_step(serving, prompts, 1024)
    rate = prefill_tokens_per_second(serving, 1024)
    assert 0.9 * rate < 512 * 1024 / step(512) < rate
    assert step(1) == pytest.approx(step(8), rel=0.05)
    assert step(9) > 1.5 * step(8)
    experts = 58 * 256 * 3 * 7168 * 2048 / 64 / serving.hardware.bandwidth / serving.hardware.efficiency
    assert prefill_step(serving, 1, 1) > experts * 8 / 256
    assert step(1) > experts
    with pytest.raises(ConfigError, match="prompts 0"):
        prefill_step(serving, 0, 1024)


# Memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mesh", [MeshShape(), MeshShape(stage=16, data=2, expert=64), MeshShape(stage=4, fsdp=8, tensor=2)]
)
def test_stages_hold_every_block_once(mesh):
    plan = plan_of(mesh=mesh, batch=1024)
    layout = stage_shares(plan)
    assert len(layout) == mesh.stage
    assert sum(s.dense for s in layout) == 3
    assert sum(s.moe for s in layout) == 58
    assert [s.ends for s in layout] == [False] * (mesh.stage - 1) + [True]


@pytest.mark.parametrize(("depths", "stages"), [(1, 12), (2, 6), (3, 12)])
def test_one_stage_is_the_last(depths, stages):
    """Also where the MTP modules, which count as blocks, leave it none of the others: no weight is held twice."""
    config = dataclasses.replace(ModelConfig.preset("v3-mini"), num_nextn_predict_layers=depths)
    plan, counted = plan_of(config, mesh=MeshShape(stage=stages)), count_parameters(config)
    assert [s.ends for s in stage_shares(plan)] == [False] * (stages - 1) + [True]
    held = sum(sum(parameters_per_device(plan, s)) for s in stage_shares(plan))
    assert held == counted.total + counted.mtp_total


def test_all_devices_together_hold_the_model():
    counted = count_parameters(V3)
    for mesh in (
        MeshShape(),
        MeshShape(fsdp=512),
        MeshShape(stage=16, expert=64),
        MeshShape(stage=8, fsdp=4, expert=8),
    ):
        plan = plan_of(mesh=mesh, batch=512 * 8)
        plain = sum(parameters_per_device(plan, s)[0] for s in stage_shares(plan)) * mesh.fsdp
        routed = sum(parameters_per_device(plan, s)[1] for s in stage_shares(plan)) * mesh.fsdp * mesh.expert
        biases = 59 * 256  # in the router's collection, which is counted as a parameter too
        assert plain + routed == pytest.approx(counted.total + counted.mtp_total, rel=1e-9), (mesh, biases)


def test_more_of_an_axis_never_needs_more_memory():
    for axis in ("fsdp", "expert", "tensor", "stage"):
        sizes = [memory(plan_of(mesh=MeshShape(**{axis: n}), batch=64)).total for n in (2, 4, 8)]
        assert sizes == sorted(sizes, reverse=True), axis


def test_residuals_of_one_block():
    """Saved activations, by hand: `block` its input; `paper` each product's result but MLA's up-projections."""
    block = saved_by_block(V3, Runtime(dtype="bfloat16", remat="block", experts_impl="ragged"), True)
    assert block.per_token == pytest.approx(2 * 7168, abs=8)
    paper = saved_by_block(V3, Runtime(dtype="bfloat16", remat="paper", experts_impl="ragged"), True)
    widths = 7168 + 1536 + 576 + 128 * 128 + 7168 + 9 * 2 * 2048
    assert paper.per_token == pytest.approx(2 * widths, abs=8)
    assert paper.per_pair == 0
    plain = saved_by_block(V3, Runtime(dtype="bfloat16", experts_impl="ragged"), True)
    assert plain.per_token > paper.per_token
    assert plain.per_pair > 0


# Links and time --------------------------------------------------------------------------------------------


def test_a_token_crosses_to_each_node_once():
    assert nodes_reached(V3, 8) == 4  # the report's limit
    assert nodes_reached(V3, 2) < 2
    mesh = MeshShape(expert=64)
    seconds = exchange_seconds(hardware("h800"), V3, mesh, tokens=1, per_copy=3 * 7168)
    assert seconds == pytest.approx(4 * (7 / 8) * 3 * 7168 / 50e9)


def test_the_reports_compute_and_exchange_are_alike():
    """Section 3.2: about 1 : 1 without overlap; at printed rates of both, within a factor of two."""
    plan = published.report_plan()
    exchange = sum(t.seconds for t in traffic(plan) if "experts and back" in t.what)
    compute = step_time(plan, efficiency=1).matmuls
    assert 0.5 < exchange / compute < 2


def test_links_of_an_axis():
    mesh = MeshShape(stage=16, data=2, expert=64)
    assert rate(hardware("h800"), mesh, "expert") == 50e9
    assert rate(hardware("h800"), MeshShape(expert=8), "expert") == 200e9
    assert rate(hardware("v5p"), MeshShape(fsdp=512), "fsdp") == 600e9
    assert rate(hardware("v5p"), MeshShape(fsdp=8, expert=64), "fsdp") == pytest.approx(200e9)


def test_experts_over_nodes_are_as_far_apart_by_whatever_name():
    alike = [traffic(plan_of(mesh=MeshShape(**sizes))) for sizes in ({"expert": 64}, {"node": 8, "expert": 8})]
    assert alike[0] == alike[1] != []
    assert traffic(plan_of(mesh=MeshShape(node=8))) == traffic(plan_of(mesh=MeshShape(expert=8))) != []


def test_every_mtp_module_takes_time_on_the_last_stage():
    deep = dataclasses.replace(V3, num_nextn_predict_layers=10)
    plan = plan_of(deep, mesh=MeshShape(stage=2))
    assert [(s.dense + s.moe) for s in stage_shares(plan)] == [36, 25]  # and 10 modules
    ratio = step_time(plan).matmuls / step_time(dataclasses.replace(plan, mesh=MeshShape())).matmuls
    assert ratio == pytest.approx(36 / 71)


def test_time_shrinks_with_efficiency_and_adds_up():
    plan = plan_of(mesh=MeshShape(stage=4, expert=8, fsdp=2), batch=512)
    half, full = step_time(plan, 0.5), step_time(plan, 1.0)
    assert half.total == pytest.approx(2 * full.total)
    assert full.mfu == pytest.approx(full.model_flops / full.total / 64 / 989e12)
    assert step_time(dataclasses.replace(plan, pipeline_schedule="dualpipe")).total < step_time(plan).total


# Decoding --------------------------------------------------------------------------------------------------


def test_busiest_group_of_experts():
    assert busiest_group(256, 64, 1, 8)[0] == pytest.approx(1.5, abs=0.5)
    assert busiest_group(256, 1, 1, 8) == (8, 8)
    assert busiest_group(256, 64, 2048, 8)[0] == 4
    assert busiest_group(256, 64, 1 << 20, 8) == (4, (1 << 20) / 8)


def test_the_reports_decoding_unit_fits():
    """Section 3.4.2: 320 H800, TP4, an expert a device, 64 devices for copies and the shared expert."""
    serving = Serving(V3, hardware("h800"), 320, 80, 256, redundant=32)
    assert weight_bytes(serving) < 20e9
    assert cache_bytes(serving) == 70_272
    assert largest_batch(serving, 4096) > 10_000
    step = decode_step(serving, 320 * 32, 4096)
    assert step.total < 0.1


def test_expanded_cache_is_larger():
    latent = Serving(V3, hardware("h800"), 8, 8)
    assert cache_bytes(dataclasses.replace(latent, expanded_cache=True)) / cache_bytes(latent) == pytest.approx(
        71.1, abs=0.1
    )


# The command -----------------------------------------------------------------------------------------------


def test_the_sweep_finds_meshes_like_the_reports():
    base = plan_of(batch=15360, precision="fp8", moment=2, weight=1, pipeline_schedule="dualpipe")
    candidates = list(meshes(base, 2048))
    assert len({str(p.mesh) for p in candidates}) == len(candidates)
    assert all(p.mesh.devices == 2048 for p in candidates)
    fastest = sorted(candidates, key=lambda p: step_time(p).total if memory(p).total < 80e9 else 1e9)[:5]
    assert MeshShape(stage=16, data=2, expert=64) in [p.mesh for p in fastest]


def test_the_sweep_takes_a_model_without_experts():
    dense = dataclasses.replace(ModelConfig.preset("v3-mini"), first_k_dense_replace=12, num_nextn_predict_layers=0)
    found = {p.mesh for p in meshes(plan_of(dense, batch=64, length=256, mtp=False), 8)}
    assert {MeshShape(data=8), MeshShape(fsdp=8), MeshShape(stage=2, fsdp=2, tensor=2)} < found
    assert {m.expert for m in found} == {1}


def test_json(capsys):
    plan_command(PlanArgs(mesh="stage=16,data=2,expert=64", precision="fp8", pipeline_schedule="dualpipe", json=True))
    result = json.loads(capsys.readouterr().out)
    best = result["plans"][0]
    assert sum(v for k, v in best["seconds"].items() if k != "hidden_by_compute") == pytest.approx(best["step_seconds"])
    hours = 14.8e12 / best["tokens_per_device_second"] / 3600
    assert best["cost"]["dollars"] == pytest.approx(2 * hours)


def test_tables(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    plan_command(PlanArgs(preset="tiny", hardware="h100", devices=8, tokens=1e9, batch=64, length=256))
    plan_command(PlanArgs(preset="v2-lite-16b", hardware="v6e", devices=16, batch=64, serve=True))
    out = capsys.readouterr().out
    assert "give --dollars-per-hour" in out
    assert "no published power" not in out.split("decoding")[0]


def test_what_does_not_fit_says_so(capsys):
    plan_command(PlanArgs(devices=8, batch=64))
    assert "doesn't fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 2047}, "whole nodes of 8"),
        ({"devices": 0}, "devices is 0"),
        ({"tokens": -1.0}, "tokens is -1"),
        ({"tokens": float("nan")}, "tokens is nan"),
        ({"hardware": "a100"}, "unknown hardware 'a100'"),
        ({"mesh": "stage=16"}, "has 16 devices, but --devices is 2048"),
        ({"mesh": "pipe=2048"}, "isn't AXIS=SIZE"),
        ({"mesh": "data=²"}, "isn't AXIS=SIZE"),
        ({"mesh": "expert=2048"}, "doesn't divide"),
        ({"batch": 3, "mesh": "data=2048"}, "doesn't divide"),
        ({"batch": 7, "devices": 4096, "length": 128}, "no mesh of 4096 devices"),
        ({"efficiency": 2.0}, "efficiency is 2.0"),
        ({"length": 1_000_000}, "max_position_embeddings"),
        ({"serve": True, "attention_data": 7}, "doesn't divide devices"),
        ({"dollars_per_hour": -1.0}, "must not be negative"),
    ],
)
def test_nonsense_gets_one_clear_line(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        plan_command(PlanArgs(**options))
    assert "\n" not in str(error.value)


def test_a_plan_takes_less_than_five_seconds():
    """Processor time, imports included. A machine that needs more than a second to import jax gets as much more."""
    code = "import time, jax; jax_alone = time.process_time(); from dsv3_jax.planning.plan import *\n"
    code += "plan_command(PlanArgs()); print(jax_alone, time.process_time())"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    jax_alone, total = map(float, out.split()[-2:])
    assert total < 5 * max(1, jax_alone)
