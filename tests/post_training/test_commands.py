"""The commands `sft` and `grpo`: directories that other commands read, going on, and what is refused."""

import contextlib
import dataclasses
import errno
import io
import itertools
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from dsv3_jax import cli
from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command
from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.checkpoint.load import load_pretrained
from dsv3_jax.config import ConfigError
from dsv3_jax.data import DataConfig, PrepareOptions, load_tokenizer, prepare
from dsv3_jax.inference.text import own_tokenizer
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.post_training import command
from dsv3_jax.post_training.command import GRPOArgs, grpo_command
from dsv3_jax.post_training.grpo import GRPOConfig
from dsv3_jax.serving.chat import chat_template_beside, read_chat_template
from dsv3_jax.training import checkpoints
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.directory import write_config
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.step import init_state
from dsv3_jax.training.trainer import train
from tests.parallel.small_run import small_config

QUIET = Console(quiet=True)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
GRPO = GRPOConfig(iterations=2, prompts=2, samples=4, max_new_tokens=4, length=16)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run at its start, whose tokenizer has a chat template."""
    directory = tmp_path_factory.mktemp("start")
    (directory / "tokenizer").mkdir()
    load_tokenizer(None).save(directory / "tokenizer")
    (directory / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    config = small_config("", "single")
    model, optimizer = DeepSeekV3(config.model), make_optimizer(config.optimizer, Schedule(config.schedule))
    state = jax.jit(lambda: init_state(model, optimizer, jax.random.key(0)))()
    (directory / "run").mkdir()
    write_config(directory / "run", config, directory / "tokenizer")
    saved = Checkpoints(directory / "run/checkpoints", 1)
    saved.save(state, {})
    saved.close()
    return directory


def count_digits(problem, text):
    return float(sum(c.isdigit() for c in text))


@pytest.mark.slow
def test_grpo_writes_a_run_and_goes_on(start, tmp_path):
    args = GRPOArgs(str(start / "run"), tmp_path / "run", f"{__name__}.count_digits", grpo=GRPO, checkpoint_every=1)
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(3)))
    args = dataclasses.replace(args, held_out=tmp_path / "held_out.jsonl", learning_rate=1e-2)
    grpo_command(args, QUIET)
    records = read_metrics(args.run_dir / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 1, 2]
    assert all(r["sampling_gap"] < 1e-3 for r in records[1:])  # training's log-probabilities are sampling's
    assert {"reward", "kl", "held_out_reward", "mtp_acceptance"} <= set(records[-1])
    assert "held out reward" in (args.run_dir / "report.md").read_text()
    assert (args.run_dir / "metrics.png").stat().st_size > 1000
    model, trained = load_pretrained(args.run_dir)  # as generate and serve do
    assert model.config.hidden_size == 16
    assert own_tokenizer(args.run_dir).vocab_size == 259
    assert read_chat_template(args.run_dir, {}) is not None
    before = load_pretrained(start / "run")[1]
    assert np.abs(trained["params"]["lm_head"] - before["params"]["lm_head"]).max() > 1e-4

    convert_command(ConvertArgs(str(args.run_dir), tmp_path / "hf"), QUIET)
    exported = load_pretrained(tmp_path / "hf")[1]
    np.testing.assert_array_equal(exported["params"]["lm_head"], trained["params"]["lm_head"])

    with pytest.raises(ConfigError, match="is not empty"):
        grpo_command(args, QUIET)
    (tmp_path / "run/checkpoints/2").rename(tmp_path / "aside")
    again = dataclasses.replace(args, resume=True)
    with pytest.raises(ConfigError, match="a run with kl_weight"):
        grpo_command(dataclasses.replace(again, kl_weight=0.5), QUIET)
    grpo_command(again, QUIET)
    assert read_metrics(args.run_dir / "metrics.jsonl") == records
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(args.run_dir)[1], trained)


def test_grpo_whose_first_state_could_not_be_written_may_start_again(start, tmp_path, monkeypatch):
    args = GRPOArgs(str(start / "run"), tmp_path / "run", grpo=GRPO)
    monkeypatch.setattr(command._Run, "evaluate", lambda *_: {})

    async def fails(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints._HashedPath, "finalize", fails)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="No space left"):
            grpo_command(args, QUIET)
    with pytest.raises(ConfigError, match="holds no run to resume: start it without"):
        grpo_command(dataclasses.replace(args, resume=True), QUIET)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not empty"):
        grpo_command(dataclasses.replace(args, run_dir=tmp_path / "other"), QUIET)


@pytest.fixture
def begun(monkeypatch):
    """Replaces sampling and training by steps without a change, and lists the iterations at which they began."""
    monkeypatch.setattr(command._Run, "evaluate", lambda *_: {"held_out_reward": 0.0})
    begun = []

    def rounds(model, state, *arguments, start, **options):
        begun.append(start)
        for step in range(start + 1, GRPO.iterations + 1):
            state = state.replace(step=jax.numpy.int32(step))
            yield state, {"reward": float(step), "kl": 0.0, "length": 1.0}

    monkeypatch.setattr(command, "grpo", rounds)
    return begun


def test_grpo_passes_over_a_damaged_newest_checkpoint(start, tmp_path, begun):
    args = GRPOArgs(str(start / "run"), tmp_path / "run", grpo=GRPO, checkpoint_every=1)
    grpo_command(args, QUIET)
    next((args.run_dir / "checkpoints/2/state").rglob("d/*")).write_bytes(b"damaged")
    said = io.StringIO()
    grpo_command(dataclasses.replace(args, resume=True), Console(file=said, width=1000))
    assert "the checkpoint of step 2 is passed over and now" in said.getvalue()
    assert "going on from the checkpoint of step 1" in said.getvalue()
    assert begun == [0, 1]
    assert [r["step"] for r in read_metrics(args.run_dir / "metrics.jsonl")] == [0, 1, 2]


def test_grpo_killed_in_its_first_evaluation_makes_it_when_it_goes_on(start, tmp_path, begun, monkeypatch):
    args = GRPOArgs(str(start / "run"), tmp_path / "run", grpo=GRPO)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command._Run, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            grpo_command(args, QUIET)
    for _ in range(2):  # the second time from the end
        grpo_command(dataclasses.replace(args, resume=True), QUIET)
        records = read_metrics(args.run_dir / "metrics.jsonl")
        assert [(r["step"], "held_out_reward" in r) for r in records] == [(0, True), (1, False), (2, True)]


def test_grpo_never_stops_without_saving(start, tmp_path, begun, monkeypatch):
    """The signal arrives just after the first iteration was found not to be one to stop at."""
    answers = itertools.chain([False], itertools.repeat(True))
    monkeypatch.setattr(command, "stop_on_signal", lambda: contextlib.nullcontext(lambda: next(answers)))
    args = GRPOArgs(str(start / "run"), tmp_path / "run", grpo=dataclasses.replace(GRPO, iterations=4))
    with pytest.raises(KeyboardInterrupt):
        grpo_command(args, QUIET)
    last = read_metrics(args.run_dir / "metrics.jsonl")[-1]["step"]
    assert (args.run_dir / "checkpoints" / str(last)).is_dir()


def test_grpo_refuses_what_cannot_be(start, tmp_path, capsys):
    for options, words in (
        (["--reward", "no.such"], "'no.such' can't be imported"),
        (["--problems", "mine.jsonl"], "--problems needs --held-out"),
        (["--problems", str(tmp_path / "none"), "--held-out", str(tmp_path / "none")], "can't be read"),
        (["--grpo.length", "4"], "length is 4"),
        (["--resume"], "holds no run to resume"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["grpo", "--init-from", str(start / "run"), "--run-dir", str(tmp_path / "new"), *options])
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_sft_learns_what_the_assistant_writes(start, tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": f"{i}!"}, {"role": "assistant", "content": "ab"}]} for i in range(200)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    tokenizer = start / "tokenizer"
    options = PrepareOptions(tokenizer=str(tokenizer), validation_fraction=0.1)
    prepare([str(tmp_path / "chats.jsonl")], tmp_path / "chats", options, chat=lambda: chat_template_beside(tokenizer))
    config = small_config("", "single").fine_tuning()
    data = DataConfig(str(tmp_path / "chats"), sequence_length=16, packing="best_fit", mask_documents=True)
    schedule = dataclasses.replace(config.schedule, steps=50, batch_size=8, warmup_steps=2, peak_learning_rate=3e-2)
    config = dataclasses.replace(config, data=data, schedule=schedule, init_from=str(start / "run"), log_every=5)
    result = train(config, tmp_path / "run", console=QUIET)
    assert result.metrics["loss"] < 1.5  # of log(264) = 5.6: "ab<eos>" is what is learnt
    model, variables = load_pretrained(tmp_path / "run")
    tokens = load_tokenizer(tokenizer).encode_prompt("7!").tolist()
    logits = model.apply(variables, np.array([tokens], np.int32))
    assert logits[0, -1].argmax() == ord("a")
    with pytest.raises(SystemExit):
        cli.main(["sft", "--run-dir", str(tmp_path / "other")])
