"""Whole runs from the command line: what they leave, how they resume, and how they fail."""

import contextlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax import cli
from dsv3_jax.checkpoint import load_pretrained
from dsv3_jax.checkpoint.remote import cached
from dsv3_jax.training import mirror
from dsv3_jax.training.directory import locked
from tests.configs import RUN_OPTIONS

ROOT = Path(__file__).parents[2]


def command(*arguments):
    return [sys.executable, "-m", "dsv3_jax", *map(str, arguments)]


def run_in_process(*arguments):
    """The exit code of a command, without the seconds that a new process takes to start."""
    try:
        cli.main([*map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def parameters(directory):
    _, variables = load_pretrained(directory)
    return {"/".join(map(str, path)): np.asarray(leaf) for path, leaf in _leaves(variables)}


def _leaves(tree, path=()):
    for key, value in tree.items():
        yield from _leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("straight") / "run"
    assert run_in_process("train", "--run-dir", directory, *RUN_OPTIONS) == 0
    return directory


def test_a_run_leaves_everything(straight):
    for name in ("config.json", "metrics.jsonl", "metrics.png", "sample.txt", "report.md"):
        assert (straight / name).stat().st_size > 0, name
    assert any((straight / "tensorboard").iterdir())
    assert sorted(p.name for p in (straight / "checkpoints").iterdir() if p.name.isdigit()) == ["50", "60"]
    records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [10, 20, 30, 40, 50, 60]
    assert [r["step"] for r in records if "validation_loss" in r] == [30, 60]
    assert records[-2]["loss"] < records[0]["loss"]
    assert {"mtp_loss", "mtp_accuracy", "grad_norm", "load_violation/moe_layers", "tokens_per_second"} <= set(
        records[-2]
    )


@pytest.mark.slow  # the next one is also of a kill, and leaves the resumed run less
def test_killed_and_resumed_equals_straight(straight, tmp_path):
    """kill -9 somewhere after the checkpoint of step 30; the resumed run's parameters are the same bits."""
    directory = tmp_path / "run"
    arguments = ["train", "--run-dir", directory, *RUN_OPTIONS, "--auto-resume"]
    process = subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (directory / "checkpoints" / "30").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (directory / "checkpoints" / "60").exists(), "the run finished before it was killed"
    assert run_in_process(*arguments) == 0
    resumed, expected = parameters(directory), parameters(straight)
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 30, 40, 50, 60, 60]  # none twice: 30 and 60 have a line of validation each


def test_killed_and_resumed_at_a_url(straight, tmp_path, monkeypatch, capsys):
    """kill -9 after a checkpoint has arrived; another machine, with nothing but the URL, ends with the same bits."""
    bucket = tmp_path / "bucket/run"
    url = f"file://{bucket}"
    arguments = ["train", "--run-dir", url, *RUN_OPTIONS, "--auto-resume"]
    process = subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (bucket / "checkpoints/30/hashes.json").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (bucket / "report.md").exists(), "the run finished before it was killed"
    here = cached("runs", url)
    shutil.rmtree(here.parent)
    monkeypatch.setattr(mirror, "WAIT_SECONDS", 0.1)
    assert run_in_process(*arguments) == 0
    said = capsys.readouterr().out
    assert "going on from the checkpoint of step" in said
    assert f"done: {url}/report.md" in said
    assert losses(bucket / "metrics.jsonl") == losses(straight / "metrics.jsonl")
    shutil.rmtree(here.parent)
    resumed, expected = parameters(url), parameters(straight)
    for name, value in expected.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    assert run_in_process("generate", url, "--prompt", "def f", "--max-new-tokens", "2") == 0
    assert capsys.readouterr().out.startswith("def f")
    assert run_in_process("report", url, "--out", tmp_path / "page.html") == 0
    assert "60 of 60" in (tmp_path / "page.html").read_text()


def losses(file):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [(r["step"], r.get("loss"), r.get("validation_loss")) for r in lines]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    directory = tmp_path / "a run's"
    arguments = command("train", "--run-dir", directory, *RUN_OPTIONS, "--schedule.steps", "100000")
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 20/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130
    saved = max(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())
    assert f"saved at step {saved}" in rest
    again = shlex.split(rest.split("continue with: ")[1])
    assert again == ["python", "-m", "dsv3_jax", "train", "--run-dir", str(directory), "--resume"]


def test_generate_continues_with_a_run(straight, capsys):
    assert run_in_process("generate", straight, "--prompt", "def f", "--max-new-tokens", "5", "--temperature", "0") == 0
    assert capsys.readouterr().out.startswith("def f")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train", "--preset", "huge"), "unknown preset 'huge'"),
        (("train", "--model.n-group", "3"), "n_group is 3, which doesn't divide n_routed_experts"),
        (("train", "--data.sequence-length", "4096"), "data.sequence_length is 4096"),
        (("train", "--runtime.redundant-experts", "4"), "runtime.redundant_experts is 4"),
        (("train", "--data.source", "{tmp}/nowhere"), "nowhere"),
        (("train", "--data.source", "{tmp}/empty"), "empty"),
        (("train", "--model.vocab-size", "100"), "model.vocab_size is 100"),
        (("train", "--run-dir", "{run}", *RUN_OPTIONS), "add --resume"),
        (("train", "--run-dir", "{run}", *RUN_OPTIONS, "--seed", "1", "--resume"), "seed: 1, there 0"),
        (("train", "--run-dir", "{tmp}/new", "--resume"), "no run to resume"),
        (("train", "--run-dir", "{run}", "--resume", "--preset", "v3-mini"), "another model than --preset v3-mini"),
        (("train", "--run-dir", "{run}", "--resume", "--schedule.steps", "70"), "schedule.steps: 70, there 60"),
        (("train", "--processes.count", "two"), "--processes.count"),
        (("train", "--run-dir", "{tmp}/occupied"), "not empty"),
        (("generate", "{tmp}/nowhere"), "nowhere"),
        (("generate", "{run}", "--max-new-tokens", "5000"), "exceed the 2048 tokens"),
        (("generate", "{run}", "--temperature", "-1"), "temperature is -1"),
        (("fly",), "unknown command 'fly'"),
    ],
    ids=lambda a: a if isinstance(a, str) else None,
)
def test_bad_input_gets_one_line_and_loses_nothing(arguments, named, straight, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("precious")
    before = sorted(p.relative_to(straight) for p in straight.rglob("*"))
    arguments = [a.format(tmp=tmp_path, run=straight) for a in arguments]
    if arguments[0] == "train" and "--run-dir" not in arguments:
        arguments += ["--run-dir", str(tmp_path / "run")]
    assert run_in_process(*arguments) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    assert named in message
    assert not (tmp_path / "run").exists()
    assert sorted(p.relative_to(straight) for p in straight.rglob("*")) == before


def files(directory):
    return {p.relative_to(directory): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_resume_takes_the_runs_own_config_and_what_changes_no_numbers_may_change(straight, tmp_path, capsys):
    directory = tmp_path / "a run"
    shutil.copytree(straight, directory)
    assert run_in_process("train", "--run-dir", directory, "--resume") == 0
    changed = ["--log-every", "5", "--keep-checkpoints", "9", "--sample-tokens", "0", "--validation-batches", "2"]
    assert run_in_process("train", "--run-dir", directory, "--resume", *changed) == 0
    assert "log_every: 5, there 10" in capsys.readouterr().out
    assert json.loads((directory / "config.json").read_text())["log_every"] == 5
    np.testing.assert_equal(parameters(directory), parameters(straight))


def test_resume_without_checkpoints_or_beside_another_process_loses_nothing(straight, tmp_path, capsys):
    directory = tmp_path / "run"
    shutil.copytree(straight, directory)
    before = files(directory)
    with locked(directory):
        before = files(directory)  # with this process in the lock
        assert run_in_process("train", "--run-dir", directory, "--resume") == 2
        assert "is held by another process" in capsys.readouterr().err
        assert files(directory) == before
    shutil.move(directory / "checkpoints", tmp_path / "elsewhere")
    before = files(directory)
    for resume in ([], ["--resume"]):
        assert run_in_process("train", "--run-dir", directory, *RUN_OPTIONS, *resume) == 2
        assert "has no checkpoint to go on from" in capsys.readouterr().err
        assert files(directory) == before


def test_unknown_field_is_named(capsys):
    assert run_in_process("train", "--model.hiden-size", "3") == 2
    assert "hiden-size" in capsys.readouterr().err


@pytest.mark.slow
def test_full_disk_keeps_the_last_checkpoint(straight, tmp_path):
    """On a file system of its own that fills up after the first checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        directory = disk / "run"
        arguments = ["train", "--run-dir", directory, *RUN_OPTIONS, "--schedule.steps", "100000"]
        with subprocess.Popen(
            command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for line in process.stdout:
                if line.startswith("step 30/"):
                    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                        while filler.write(bytes(1 << 16)):  # until nothing fits: the run may be writing too
                            pass
                    break
            rest = process.stdout.read()
        assert process.returncode == 2
        assert "Traceback" not in rest
        last = rest.strip().splitlines()[-1]
        assert "couldn't be written" in last
        assert last.startswith("error: ")
        assert parameters(directory).keys() == parameters(straight).keys()  # it can be read
    finally:
        subprocess.run(["umount", disk], check=True)
