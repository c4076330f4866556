"""A run's directory: who holds it, and what stands in it before the first step."""

import dataclasses
import errno
import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from dsv3_jax.config import ConfigError
from dsv3_jax.data import load_tokenizer
from dsv3_jax.training import checkpoints
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.directory import (
    check_config,
    check_directory,
    has_begun,
    kept_tokenizer,
    locked,
    write_config,
)
from dsv3_jax.training.trainer import train
from tests.parallel.small_run import small_config


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer of a name of its own, with a tokenizer_config.json beside it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel()
    trained.train_from_iterator(["some text " * 9], BpeTrainer(vocab_size=60, special_tokens=["<end>"]))
    (tmp_path / "original").mkdir()
    trained.save(str(tmp_path / "original/mine.json"))
    (tmp_path / "original/tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return tmp_path / "original/mine.json"


@pytest.fixture
def run(tokenizer, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    write_config(directory, small_config("", "single"), tokenizer)
    return directory


def test_a_run_keeps_its_tokenizer(tokenizer, run):
    original = load_tokenizer(tokenizer)
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    for path in [*tokenizer.parent.iterdir(), tokenizer.parent]:  # as after a move to another machine
        path.unlink() if path.is_file() else path.rmdir()
    kept = load_tokenizer(kept_tokenizer(run, tokenizer))
    assert kept.encode("some text").tolist() == original.encode("some text").tolist()
    assert kept.eos_id == original.eos_id


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_changed_copy_is_noticed(tokenizer, run, name):
    (run / name).write_bytes((run / name).read_bytes() + b" ")
    with pytest.raises(ConfigError, match=rf"{name} isn't what it was"):
        kept_tokenizer(run, tokenizer)
    (run / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name} is gone"):
        kept_tokenizer(run, tokenizer)


def test_another_tokenizer_is_refused(tokenizer, run):
    tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
    with pytest.raises(ConfigError, match="trained with another one"):
        kept_tokenizer(run, tokenizer)


def test_bytes_have_no_files(tmp_path):
    for tokenizer in (None, "bytes"):
        write_config(tmp_path, small_config("", "single"), tokenizer)
        assert kept_tokenizer(tmp_path, None) is None
        assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_when_a_run_has_begun(tokenizer, tmp_path, monkeypatch):
    """One that was killed before its first checkpoint starts anew; one whose checkpoints are away doesn't."""
    config, directory = small_config("", "single"), tmp_path / "run"
    assert not has_begun(directory)
    directory.mkdir()
    write_bytes = Path.write_bytes

    def killed(self, content):
        write_bytes(self, content[:9])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            write_config(directory, config, tokenizer)
    check_directory(config, directory, resume=False)
    write_config(directory, config, tokenizer)
    (directory / "checkpoints/0.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not has_begun(directory)
    check_directory(config, directory, resume=False)
    (directory / "checkpoints/0").mkdir()
    assert has_begun(directory)
    check_directory(config, directory, resume=True)
    (directory / "checkpoints/0").rmdir()
    (directory / "metrics.jsonl").touch()
    assert has_begun(directory)
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        check_directory(config, directory, resume=True)


def test_a_run_that_is_killed_before_its_first_state_may_start_again(tmp_path, monkeypatch):
    """Its config is there before anything else: without it the directory would be taken for somebody else's."""
    config, directory = small_config("", "single"), tmp_path / "run"

    def killed(_, folder, *__, **___):
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "__init__", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, directory)
    assert (directory / "checkpoints").is_dir()
    assert not has_begun(directory)
    check_directory(config, directory, resume=False)


def test_a_run_whose_first_state_could_not_be_written_may_start_again(tmp_path, monkeypatch):
    """The step is compiled meanwhile, but nothing is recorded before there is a checkpoint."""
    config, directory = small_config("", "single"), tmp_path / "run"

    async def fails(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._HashedPath, "finalize", fails)
        with pytest.raises(checkpoints.CheckpointError, match="No space left"):
            train(config, directory)
    assert not has_begun(directory)
    check_directory(config, directory, resume=False)


HOLD = """
import pathlib, sys, time
from dsv3_jax.training.directory import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    arguments = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(arguments, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"held by another process .process {process.pid} on"), locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    for _ in range(2):  # and again after it was given back
        with locked(tmp_path) as warning:
            assert not warning


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path) as warning:
        assert "without locks" in warning


def test_a_run_that_saved_nothing_may_start_again(tmp_path):
    config = small_config("", "single")
    write_config(tmp_path, config, None)
    check_directory(config, tmp_path, resume=False)
    with pytest.raises(ConfigError, match="has no checkpoint to go on from"):
        check_directory(config, tmp_path, resume=True)
    (tmp_path / "metrics.jsonl").write_text("")  # its checkpoints are lost, or a disk isn't mounted
    for resume in (False, True):
        with pytest.raises(ConfigError, match="has no checkpoint to go on from"):
            check_directory(config, tmp_path, resume=resume)


def test_somebody_elses_config_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"config.json has no model"):
            check_directory(small_config("", "single"), tmp_path, resume=resume)


def test_a_config_that_cant_be_read_back_is_refused():
    with pytest.raises(ConfigError, match="surrogate"):
        check_config(dataclasses.replace(small_config("", "single"), sample_prompt="\udc80"))
