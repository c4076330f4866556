"""`generate`: which tokenizer, end tokens and sampling it takes, of runs, Hugging Face directories and conversions."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from dsv3_jax import cli, load_pretrained
from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command
from dsv3_jax.config import ConfigError
from dsv3_jax.data import load_tokenizer
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.generation_config import GenerationConfig, read_generation_config
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.directory import write_config
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.step import init_state
from tests.parallel.small_run import small_config

GOLDEN = Path(__file__).parents[1] / "golden"
GREEDY = ("--prompt", "ab cd", "--max-new-tokens", "12", "--temperature", "0")


def run(*arguments):
    try:
        cli.main([*map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def save_characters(path, size=64):
    """A tokenizer of one token a character, with bos 0 and eos 1."""
    named = ["<s>", "</s>", " ", *(chr(c) for c in range(97, 123))]
    vocab = {t: i for i, t in enumerate([*named, *(chr(0x4E00 + i) for i in range(size - len(named)))])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path))


@pytest.fixture
def checkpoint(tmp_path):
    shutil.copytree(GOLDEN / "v3_base", tmp_path / "hf")
    save_characters(tmp_path / "hf/tokenizer.json")
    (tmp_path / "hf/tokenizer_config.json").write_text('{"add_bos_token": true}')
    return tmp_path / "hf"


def greedy(checkpoint, bos=True):
    """The model's text after the prompt of GREEDY, without an end."""
    tokenizer = load_tokenizer(checkpoint)
    prompt = [*[tokenizer.bos_id] * bos, *tokenizer.encode("ab cd").tolist()]
    return tokenizer, generate(*load_pretrained(checkpoint), [prompt], 12)[0].tolist()


def test_the_models_own_tokenizer_and_every_end_token(checkpoint, capsys):
    tokenizer, new = greedy(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    assert len(set(new[:4])) == 4
    assert new[3] == 1  # the tokenizer's own end token
    for in_config, stored, end in (
        (1, None, 3),
        ([1, new[2], new[1]], None, 1),
        (1, {"eos_token_id": [new[2], new[1]]}, 1),
        (new[1], {"eos_token_id": new[2]}, 2),  # the file that is for generation decides
        (new[1], {"do_sample": True}, 1),
    ):
        (checkpoint / "config.json").write_text(json.dumps(config | {"eos_token_id": in_config}))
        (checkpoint / "generation_config.json").unlink(missing_ok=True)
        if stored is not None:
            (checkpoint / "generation_config.json").write_text(json.dumps(stored))
        assert run("generate", checkpoint, *GREEDY) == 0
        assert capsys.readouterr().out == f"ab cd{tokenizer.decode(new[:end])}\n"


def test_conversions_keep_the_tokenizer_both_ways(checkpoint, tmp_path, capsys):
    (checkpoint / "generation_config.json").write_text('{"temperature": 0.25}')
    assert run("generate", checkpoint, *GREEDY) == 0
    said = capsys.readouterr().out
    convert_command(ConvertArgs(str(checkpoint), tmp_path / "orbax"))
    convert_command(ConvertArgs(str(tmp_path / "orbax"), tmp_path / "back"))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (checkpoint / name).read_bytes()
    for directory in (tmp_path / "orbax", tmp_path / "back"):
        capsys.readouterr()
        assert run("generate", directory, *GREEDY) == 0
        assert capsys.readouterr().out == said


def test_no_tokenizer_is_no_bytes(checkpoint, tmp_path, capsys):
    (checkpoint / "tokenizer.json").unlink()
    assert run("generate", checkpoint, *GREEDY) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"no tokenizer in {checkpoint} (neither tokenizer.json nor tiktoken.model)" in message
    assert "'bytes' if tokens are bytes, with --tokenizer" in message
    assert run("generate", checkpoint, *GREEDY, "--tokenizer", "bytes") == 2  # 259 ids, for a model of 64
    assert "the tokenizer bytes has 259 tokens, but the model's vocab_size is 64" in capsys.readouterr().err
    save_characters(tmp_path / "mine.json")
    assert run("generate", checkpoint, *GREEDY, "--tokenizer", tmp_path / "mine.json") == 0
    assert capsys.readouterr().out.startswith("ab cd")


def test_what_is_wrong_with_the_checkpoint_is_said_before_a_missing_tokenizer(checkpoint, capsys):
    (checkpoint / "tokenizer_config.json").write_text('{"eos_token": 1}')
    assert run("generate", checkpoint, *GREEDY) == 2
    assert (
        capsys.readouterr().err
        == f"error: {checkpoint}/tokenizer_config.json: eos_token is 1: it must be a string or null\n"
    )
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "model.safetensors").unlink()
    assert run("generate", checkpoint, *GREEDY) == 2
    assert "safetensors" in capsys.readouterr().err


def test_a_prompt_that_no_terminal_should_send(checkpoint, capsys):
    assert run("generate", checkpoint, "--prompt", "a\udce9b", "--max-new-tokens", "2", "--temperature", "0") == 0
    assert capsys.readouterr().out.startswith("a\ufffdb")


@pytest.mark.parametrize(
    ("stored", "given", "said"),
    [
        (None, [], "temperature 0.7, top_p 0.95; ends at token 1\n"),
        ({"temperature": 0.5, "top_k": 7, "top_p": 0.5}, [], "temperature 0.5 (generation_config.json), top_k 7 (gene"),
        ({"temperature": 0.5, "do_sample": True}, ["--temperature", "2"], "temperature 2 (asked for), top_p 0.95;"),
        ({"temperature": 0.5, "do_sample": False}, [], "temperature 0 (generation_config.json); ends"),
        ({"top_k": 0, "eos_token_id": [5, 1]}, [], "temperature 0.7, top_p 0.95; ends at token 1, 5\n"),
    ],
    ids=str,
)
def test_sampling_is_said_with_its_source(stored, given, said, checkpoint, capsys):
    if stored is not None:
        (checkpoint / "generation_config.json").write_text(json.dumps(stored))
    assert run("generate", checkpoint, "--max-new-tokens", "1", *given) == 0
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"temperature": "0.6"}', "temperature is '0.6': it must be a finite number"),
        ('{"temperature": -1}', "temperature is -1"),
        ('{"temperature": 1e999}', "temperature is inf"),
        ('{"top_p": 0}', "top_p is 0"),
        ('{"top_k": 1.5}', "top_k is 1.5"),
        ('{"do_sample": "false"}', "do_sample is 'false'"),
        ('{"eos_token_id": ["1"]}', "eos_token_id is"),
    ],
)
def test_impossible_generation_configs_name_file_and_field(content, named, tmp_path):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"generation_config.json.*{named}"):
        read_generation_config(tmp_path)


def test_null_in_a_generation_config_says_nothing(tmp_path):
    fields = ("temperature", "top_k", "top_p", "eos_token_id", "do_sample")
    (tmp_path / "generation_config.json").write_text(json.dumps(dict.fromkeys(fields)))
    assert read_generation_config(tmp_path) == GenerationConfig()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run over characters before its first step, in the folder `run`, and its tokenizer beside it."""
    directory = tmp_path_factory.mktemp("trained")
    save_characters(directory / "mine.json", 60)
    config = small_config("", "single", vocab_size=64)
    data = dataclasses.replace(config.data, tokenizer=str(directory / "mine.json"))
    (directory / "run").mkdir()
    write_config(directory / "run", dataclasses.replace(config, data=data), data.tokenizer)
    model = DeepSeekV3(config.model, config.runtime)
    optimizer = make_optimizer(config.optimizer, Schedule(config.schedule))
    checkpoints = Checkpoints(directory / "run/checkpoints", keep=1)
    checkpoints.save(jax.jit(lambda key: init_state(model, optimizer, key))(jax.random.key(0)), {})
    checkpoints.close()
    return directory


def test_a_run_generates_and_exports_with_its_own_tokenizer(trained, tmp_path, capsys):
    directory = trained / "run"
    _, new = greedy(directory)
    assert new  # [bos, text], as documents begin in training, though mine.json puts nothing before a text
    assert run("generate", directory, *GREEDY) == 0
    said = capsys.readouterr()
    tokenizer = load_tokenizer(trained / "mine.json")
    end = new.index(1) if 1 in new else 12
    assert said.out == f"ab cd{tokenizer.decode(new[:end])}\n"
    assert "ends at token 1\n" in said.err  # of the tokenizer, not of the preset, which is for bytes

    convert_command(ConvertArgs(str(directory), tmp_path / "hf"))
    capsys.readouterr()
    assert run("generate", tmp_path / "hf", *GREEDY) == 0
    assert capsys.readouterr().out == said.out
    fields = json.loads((tmp_path / "hf/config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (0, 1)
    assert load_tokenizer(tmp_path / "hf").encode_prompt("ab").tolist() == [0, 3, 4]
    np.testing.assert_array_equal(Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json")).encode("ab").ids, [0, 3, 4])


def test_a_damaged_tokenizer_of_a_run_is_noticed(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    copy = tmp_path / "run/tokenizer.json"
    copy.write_bytes(copy.read_bytes().replace(b'"a": 3', b'"a": 4').replace(b'"b": 4', b'"b": 3') + b" ")
    for command in (("generate", tmp_path / "run", *GREEDY), ("convert", tmp_path / "run", tmp_path / "hf")):
        assert run(*command) == 2
        assert "tokenizer.json isn't what it was when the run began" in capsys.readouterr().err
    copy.unlink()
    assert run("generate", tmp_path / "run", *GREEDY) == 2
    assert "tokenizer.json is gone" in capsys.readouterr().err


def test_runs_that_kept_no_tokenizer(trained, tmp_path, capsys):
    """Those of earlier versions: the tokenizer that their config names, if it is still there."""
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run/tokenizer.json").unlink()
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["tokenizer_files"], config["seal"]
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert run("generate", trained / "run", *GREEDY) == 0
    said = capsys.readouterr().out
    assert run("generate", tmp_path / "run", *GREEDY) == 0
    assert capsys.readouterr().out == said
    config["data"]["tokenizer"] = str(tmp_path / "gone.json")
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert run("generate", tmp_path / "run", *GREEDY) == 2
    assert f"was trained with the tokenizer {tmp_path}/gone.json and keeps no copy" in capsys.readouterr().err
    shutil.copyfile(trained / "mine.json", tmp_path / "run/tokenizer.json")
    assert run("generate", tmp_path / "run", *GREEDY) == 0
    assert capsys.readouterr().out == said
