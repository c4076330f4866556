"""Ways to look at a run while it runs: metrics, Weights & Biases by a stand-in, a trace of chosen steps, heartbeats."""

import json
import os
import sys
from pathlib import Path

import jax
import pytest

from dsv3_jax import cli
from dsv3_jax.config import ConfigError
from dsv3_jax.training import loop
from dsv3_jax.training.metrics import MetricsLog
from dsv3_jax.training.trace import Trace
from tests.configs import RUN_OPTIONS


class Project:
    """A module in place of `wandb`, and the run that it begins."""

    def __init__(self):
        self.begun, self.logged, self.finished = [], {}, False

    def init(self, **how):
        self.begun.append(how)
        return self

    def log(self, values, step):
        self.logged.setdefault(step, {}).update(values)

    def finish(self):
        self.finished = True


def test_a_run_shows_what_it_does(tmp_path, monkeypatch, capsys):
    project, directory = Project(), tmp_path / "run"
    monkeypatch.setitem(sys.modules, "wandb", project)
    monkeypatch.setattr(loop, "_HEARTBEAT_SECONDS", 0)
    options = ["--schedule.steps", "6", "--schedule.warmup-steps", "1", "--log-every", "2"]
    options += ["--model.num-nextn-predict-layers", "0", "--data.validation-fraction", "0"]  # less to compile
    options += ["--wandb-project", "small", "--trace-steps", "3:4", "--sample-tokens", "0"]
    cli.main(["train", "--run-dir", str(directory), *RUN_OPTIONS, *options])

    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    logged = [r for r in records if "loss" in r]
    assert [r["step"] for r in logged] == [2, 4, 6]
    assert all(0 < r["goodput"] <= 1 and 0 <= r["data_wait"] <= 1 for r in logged)
    assert logged[-1]["tokens_per_second"] > 0
    assert logged[-1]["model_flops_per_second"] > 0
    assert not any("mfu" in r for r in logged)  # nobody knows a CPU's peak; test_throughput.py has a GPU's

    (begun,) = project.begun
    assert (begun["project"], begun["name"], begun["id"], begun["resume"]) == ("small", "run", "run", "allow")
    assert {step: values["loss"] for step, values in project.logged.items()} == {r["step"]: r["loss"] for r in logged}
    assert "load_violation/moe_layers/0" in project.logged[2]  # a list's numbers one by one
    assert project.finished

    assert len(list((directory / "traces").rglob("*.xplane.pb"))) == 1
    sign = json.loads((directory / "heartbeat-0.json").read_text())
    assert (sign["step"], sign["process"]) == (6, os.getpid())
    assert sign["host"]
    last = capsys.readouterr().out
    assert "6 steps in" in last
    assert "goodput" in last
    assert "newest checkpoint: step 6" in last


def test_a_project_without_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb_project is 'small', but wandb isn't installed: pip install wandb"):
        MetricsLog(tmp_path, first_step=0, wandb_project="small")


def test_a_trace_is_taken_once_and_ends_with_its_run(monkeypatch):
    """Also of a run that goes back, or stops, amid its traced steps."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with Trace(range(3, 6), Path("traces")) as trace:
        for step in (1, 2, 3, 4, 3, 4, 5, 6, 3, 4):
            trace.before(step)
            trace.after(step, None)
    assert calls == ["start", "stop"]
    with Trace(range(3, 6), Path("traces")) as trace:
        trace.before(3)
        trace.after(3, None)
    assert calls == ["start", "stop"] * 2
