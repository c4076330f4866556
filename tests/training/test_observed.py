"""Ways to look at a run while it runs: metrics, Weights & Biases by a stand-in, a trace of chosen steps, heartbeats."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dsv3_jax import cli
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


FULL = """
import io, resource, signal, sys
from pathlib import Path
from dsv3_jax.training.metrics import MetricsLog
log = MetricsLog(Path(sys.argv[1]), first_step=0)
log._lines = io.StringIO()  # else these would fail first
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
for step in range(1000):
    log.write(step, {name: 1.0 for name in "abcdefgh"})
"""


def test_a_full_disk_is_an_error_and_no_hang(tmp_path):
    """The file of TensorBoard's events: the disk refuses every further byte."""
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"{tmp_path / 'tensorboard'} couldn't be written: File too large")


def test_events_are_as_tensorboard_reads_them(tmp_path):
    log = MetricsLog(tmp_path, first_step=3)
    log.write(4, {"loss": 2.5, "load": [1.0, 3.0]})
    log.event(5, "a spike")
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    events, data = [], file.read_bytes()
    while data:  # length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (4, SessionLog.START)  # hides older ones from there on
    scalars = {(e.step, v.tag): v.simple_value for e in events[2:5] for v in e.summary.value}
    assert scalars == {(4, "loss"): 2.5, (4, "load/0"): 1.0, (4, "load/1"): 3.0}
    assert events[5].summary.value[0].tensor.string_val == [b"a spike"]
