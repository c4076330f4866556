"""A run that its device's memory doesn't hold: which part is large is counted apart here, and said by `train`."""

import dataclasses

import jax
import pytest

from dsv3_jax import cli
from dsv3_jax.accounting.parameters import count_parameters
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.planning.out_of_memory import memory_parts, out_of_memory
from dsv3_jax.runtime import Runtime
from dsv3_jax.training import loop
from dsv3_jax.training.config import TrainConfig
from tests.configs import RUN_OPTIONS


def wide(**options):
    config = TrainConfig.preset("tiny", "cpu")
    model = dataclasses.replace(config.model, hidden_size=2048, intermediate_size=8192)
    return dataclasses.replace(config, model=model, **options)


def test_moments_are_two_numbers_per_parameter():
    """A wide model with a short batch has the optimizer as its largest part; a longer batch, the activations."""
    config = wide(microbatches=16)
    counted = count_parameters(config.model)
    assert memory_parts(config)["moments"] == pytest.approx(2 * 4 * (counted.total + counted.mtp_total), rel=0.01)
    assert "To shrink moments: --optimizer.moments-dtype bfloat16 (now float32)" in out_of_memory(config)
    schedule = dataclasses.replace(config.schedule, batch_size=512)
    said = out_of_memory(wide(schedule=schedule))
    assert "To shrink activations: --microbatches 2 (now 1) or --runtime.remat block (now none)" in said
    assert "microbatches 2" not in out_of_memory(wide(schedule=dataclasses.replace(schedule, batch_size=511)))


@pytest.mark.parametrize(("sharding", "parts"), [("fsdp", 1), ("fsdp_ep", 1), ("pp_ep_dp", 2)])
def test_moments_are_cut_as_the_rules_say(sharding, parts):
    """Over data only where there is ZeRO-1."""
    config = wide(mesh=MeshShape(data=2), runtime=Runtime(sharding=sharding))
    assert memory_parts(config)["moments"] == pytest.approx(memory_parts(wide())["moments"] / parts, rel=0.01)


def test_a_pipeline_counts_the_microbatches_of_its_schedule():
    counted = {}  # of 2 blocks on the first stage, and 2 and the MTP module on the last
    for schedule in ("1f1b", "zero_bubble"):
        runtime = Runtime(sharding="pp_ep_dp", pipeline=schedule)
        counted[schedule] = memory_parts(wide(mesh=MeshShape(stage=2), microbatches=4, runtime=runtime))["activations"]
    assert counted["zero_bubble"] / counted["1f1b"] == pytest.approx(3 * 3 / (2 * 2))


def test_train_says_it(tmp_path, monkeypatch, capsys):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")

    monkeypatch.setattr(loop.Loop, "_steps", exhausted)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--run-dir", str(tmp_path / "run"), *RUN_OPTIONS])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip()
    assert last.startswith("error: out of device memory. Per device the planner counts ")
    assert "To shrink " in last
    assert "\n" not in last
