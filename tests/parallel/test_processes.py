"""Real processes on loopback: they compute what one does, and a dead one ends the job."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
DEVICES = 4


def start(directory, count, *arguments):
    """A job of `count` processes with DEVICES virtual devices between them, on a port that is free."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={DEVICES // count} --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    options = ["--processes.coordinator", address, "--processes.count", count]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.worker", directory, *arguments]
            + ([*map(str, options), "--processes.index", str(i)] if count > 1 else []),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes, timeout=300):
    outputs = [p.communicate(timeout=timeout)[0] for p in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def losses(directory):
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {(r["step"], k): v for r in records for k, v in r.items() if k in ("loss", "validation_loss", "grad_norm")}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one") / "run"
    finish(start(directory, 1))
    return losses(directory)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_equal_one(one_process, tmp_path, count):
    directory = tmp_path / "run"
    finish(start(directory, count))
    got = losses(directory)
    assert got.keys() == one_process.keys()
    for name, value in one_process.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=str(name))
    sample = (directory / "sample.txt").read_text()  # drawn by all of them together
    assert sample.startswith("def ")
    assert sample in (directory / "report.md").read_text()


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_it_resumes(one_process, tmp_path):
    directory = tmp_path / "run"
    processes = start(directory, 2, "--pause")  # after step 4, so that there is time to kill
    for line in processes[0].stdout:
        if line.startswith("step 4/"):
            break
    while not (directory / "checkpoints" / "4").exists():
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.1)
    began = time.monotonic()
    processes[1].send_signal(signal.SIGKILL)
    output = processes[0].communicate(timeout=120)[0]
    assert time.monotonic() - began < 60
    assert processes[0].returncode not in (0, None)
    last = [line for line in output.strip().splitlines() if line.startswith("error: ")]
    assert len(last) == 1, output
    assert "process 0 of 2 lost the others" in last[0]
    assert "--resume" in last[0]
    finish(start(directory, 2, "--resume"))
    assert losses(directory).keys() == one_process.keys()
    for name, value in losses(directory).items():
        np.testing.assert_allclose(value, one_process[name], rtol=1e-5, err_msg=str(name))


@pytest.mark.slow  # the others notice a death after half a minute
def test_a_process_killed_in_a_save_leaves_the_checkpoint_before(one_process, tmp_path):
    directory = tmp_path / "run"
    processes = start(directory, 2, "--die-in-save")
    for process in processes:
        process.communicate(timeout=300)
    assert processes[1].returncode == -signal.SIGKILL
    assert processes[0].returncode not in (0, None)
    names = {p.name for p in (directory / "checkpoints").iterdir()}
    assert "4" in names
    assert "6" not in names
    assert any(name.startswith("6.") for name in names)  # it was in the middle of a save
    output = finish(start(directory, 2, "--auto-resume"))[0]
    assert "going on from the checkpoint of step 4" in output
    assert losses(directory).keys() == one_process.keys()
    for name, value in losses(directory).items():
        np.testing.assert_allclose(value, one_process[name], rtol=1e-5, err_msg=str(name))


def test_options_that_do_not_fit_are_named():
    from dsv3_jax.config import ConfigError
    from dsv3_jax.parallel.processes import Processes

    with pytest.raises(ConfigError, match="needs processes"):
        Processes("localhost:1234")
    with pytest.raises(ConfigError, match=r"processes\.index is 2"):
        Processes("localhost:1234", 2, 2)
    with pytest.raises(ConfigError, match="go with an address"):
        Processes("auto", 2)
