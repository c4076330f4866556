"""What stands in a run's directory before its first step."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from dsv3_jax.config import ConfigError
from dsv3_jax.data import load_tokenizer
from dsv3_jax.training.directory import keep_tokenizer, kept_tokenizer, write_config
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
    write_config(directory, small_config("", "single"), keep_tokenizer(directory, tokenizer))
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
    assert keep_tokenizer(tmp_path, None) == {}
    write_config(tmp_path, small_config("", "single"), {})
    assert kept_tokenizer(tmp_path, None) is None
