"""The rates that a run logs, against arithmetic by hand; and what of a config may change when a run goes on."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from dsv3_jax.accounting.hardware import _DEVICE_KINDS, HARDWARE, hardware_of
from dsv3_jax.config import ModelConfig
from dsv3_jax.training import throughput, trainer
from dsv3_jax.training.config import TrainConfig
from tests.parallel.small_run import small_config


def test_rates_and_their_share_of_the_peak(monkeypatch):
    """Two H100s of four train 4096 tokens in 2 s, at 6 FLOPs per token and weight that works for it."""
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(
        jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", platform="gpu")] * 4
    )
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    rates = throughput.Throughput(ModelConfig.preset("v3-671b"), 4096, 2)
    rates.add(1)
    assert rates.measure(jnp.zeros(())) == {}
    rates.add(4096)
    measured = rates.measure(jnp.zeros(()))
    assert measured["tokens_per_second"] == 2048
    # 37e9 weights work per token; MTP adds a block and a head to them, attention scores and values.
    flops = measured["model_flops_per_second"] / 2048
    assert 6 * 37e9 < flops < 1.3 * 6 * 37e9
    assert measured["mfu"] == pytest.approx(2048 * flops / (2 * 989e12))


def test_validation_takes_no_time_from_the_rates(monkeypatch):
    """A second of training, ten of something else, another second of training."""
    clock = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    rates = throughput.Throughput(ModelConfig.preset("tiny"), 16, 1)
    rates.measure(jnp.zeros(()))
    rates.add(100)
    with rates.paused(jnp.zeros(())):
        pass
    rates.add(100)
    assert rates.measure(jnp.zeros(()))["tokens_per_second"] == 100


def test_a_run_that_validates_whenever_it_logs_has_rates(tmp_path):
    config = small_config("", "single", num_hidden_layers=1, num_nextn_predict_layers=0)
    config = dataclasses.replace(config, validate_every=2)
    train = functools.partial(trainer.train, config, tmp_path / "run", console=Console(quiet=True))
    metrics = train().metrics
    assert metrics["tokens_per_second"] > 0
    assert train(resume=True).metrics == metrics  # of a run that is at its end already


def test_devices_have_sheets():
    assert {hardware_of(kind).name for kind in ("NVIDIA H100 80GB HBM3", "TPU v5", "TPU v6 lite", "TPU7x")} == {
        "h100", "v5p", "v6e", "7x",
    }  # fmt: skip
    assert hardware_of("cpu") is None
    assert {hardware_of(kind).name for kind in _DEVICE_KINDS} == set(HARDWARE)


def test_a_run_may_go_on_with_other_ways_to_spread_its_work():
    config = TrainConfig.preset("tiny", "cpu")
    other = dataclasses.replace(
        config, microbatches=2, runtime=dataclasses.replace(config.runtime, interleave=2, dispatch="all_gather")
    )
    assert config.differences(other) == []
    assert config.differences(dataclasses.replace(config, seed=7)) == ["seed: 0, there 7"]
