"""The Python of README and docs runs as written, their commands have the options shown, and launch files start runs."""

import ast
import dataclasses
import math
import re
import shlex
from pathlib import Path

import jax
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dsv3_jax import cli
from dsv3_jax.checkpoint.convert import ConvertArgs
from dsv3_jax.checkpoint.synthetic import write_random_checkpoint
from dsv3_jax.config import PRESETS
from dsv3_jax.data.command import PrepareArgs
from dsv3_jax.planning.info import InfoArgs
from dsv3_jax.planning.options import PlanArgs
from dsv3_jax.post_training.command import GRPOArgs
from dsv3_jax.serving.command import ServeArgs
from dsv3_jax.serving.generate_command import GenerateArgs
from dsv3_jax.training.config import SFTArgs, TrainArgs, TrainConfig
from dsv3_jax.training.run_page import ReportArgs
from tests.configs import SMALL_CHECKPOINT

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with what the documents take for granted."""
    monkeypatch.chdir(tmp_path)
    Path("path/to").mkdir(parents=True)
    Path("my/texts").mkdir(parents=True)
    return tmp_path


def run_blocks(name):
    """Runs a document's blocks of Python in their order, in one namespace; returns that."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks, f"{name} has no Python"
    namespace = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    return namespace


def test_readme_trains(here, monkeypatch):
    # One layer, which has all that a block can have, and few steps: compiling is what takes the time.
    small = dict(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], **small))
    preset = TrainConfig.preset

    def short(name, backend=None, *, steps=None):
        assert (name, steps) == ("tiny", 200)
        config = preset(name, backend, steps=2)
        data, schedule = (
            dataclasses.replace(config.data, sequence_length=32),
            dataclasses.replace(config.schedule, batch_size=2),
        )
        return dataclasses.replace(config, data=data, schedule=schedule, validation_batches=1, sample_tokens=0)

    monkeypatch.setattr(TrainConfig, "preset", short)
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        names = run_blocks("README.md")
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert names["run"].metrics["step"] == 2
    assert (names["run"].directory / "report.md").exists()
    assert isinstance(names["text"], str)
    assert names["logits"].shape == (*names["tokens"].shape, names["config"].vocab_size)
    assert set(names["variables"]) == {"params", "router"}
    assert names["metrics"]["loss"] < math.log(names["config"].vocab_size) - 2  # far below that of a first step
    assert (names["batch"]["tokens"][:, 1:] == names["batch"]["targets"][:, :-1]).all()


def test_data_reads(here):
    for i in range(64):
        Path(f"my/texts/{i}.txt").write_text("".join(chr(97 + (i * j) % 26) for j in range(1, 2000)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], vocab_size=30, show_progress=False)
    tokenizer.train_from_iterator(["abcdefghijklmnopqrstuvwxyz"], trainer)
    tokenizer.save("my/tokenizer.json")
    names = run_blocks("docs/data.md")
    assert names["batch"]["tokens"].shape == (16, names["config"].sequence_length)
    assert names["state"]["taken"] == [16]
    assert names["held_out"]


@pytest.fixture
def checkpoint(here):
    """A checkpoint in Hugging Face's layout at the paths that the documents name."""
    config = dataclasses.replace(SMALL_CHECKPOINT, n_routed_experts=32, max_position_embeddings=8192)
    write_random_checkpoint(Path("path/to/checkpoint"), config, block=None)
    Path("v3.orbax").symlink_to("path/to/checkpoint")


def test_checkpoints_load(checkpoint):
    names = run_blocks("docs/checkpoints.md")
    experts = names["variables"]["params"]["moe_layers"]["mlp"]["experts"]["gate_proj"]
    assert {s.data.shape[1] for s in experts.addressable_shards} == {32 // 4}


def test_engine_generates(checkpoint, capsys):
    names = run_blocks("docs/inference.md")
    names["engine"].close()
    steps = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    assert sum(map(len, steps[:-2])) == 20
    assert [len(tokens) for tokens in steps[-2:]] == [20, 20]


def test_experts_are_placed(checkpoint):
    names = run_blocks("docs/parallelism.md")
    assert names["variables"]["params"]["moe_layers"]["mlp"]["experts"]["gate_proj"].shape[1] == 32 + 32


def test_every_block_of_python_is_run():
    """Each document with Python in it is named above."""
    documents = (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    with_python = {str(path.relative_to(ROOT)) for path in documents if "```python" in path.read_text()}
    assert with_python == set(re.findall(r'run_blocks\("(.*?)"\)', Path(__file__).read_text()))


def test_commands_have_these_options():
    """Every command of README and docs is parsed, as far as `...` or the end of its first line."""
    kinds = {"train": TrainArgs, "generate": GenerateArgs, "serve": ServeArgs, "prepare": PrepareArgs}
    kinds |= {"info": InfoArgs, "convert": ConvertArgs, "plan": PlanArgs, "report": ReportArgs}
    kinds |= {"sft": SFTArgs, "grpo": GRPOArgs}
    found = set()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE))
        for line in re.findall(r"^python -m dsv3_jax (.*)", blocks, re.MULTILINE):
            command, *words = shlex.split(
                line.split(" ...")[0].rstrip("\\").replace("HOST:PORT", "host:1234"), comments=True
            )
            trains, tiny = command in ("train", "sft"), TrainConfig.preset("tiny", "cpu")
            default = kinds[command](tiny) if trains else None
            cli._parse(kinds[command], command, words, default)  # exits at an option that isn't there
            found.add(command)
    assert found == set(kinds)


@pytest.mark.parametrize(
    ("name", "backend", "dispatch"),
    [
        ("jobset.yaml", "tpu", "ragged_all_to_all"),
        ("tpu_pod.sh", "tpu", "ragged_all_to_all"),
        ("slurm.sh", "gpu", "all_to_all"),  # on GPUs the ragged exchange is many times slower
    ],
)
def test_launch_files_start_a_run_that_can_be(name, backend, dispatch):
    text = (ROOT / "experiments/launch" / name).read_text()
    assert "gs://" not in text  # a run's directory is a path
    command = text.split("-m dsv3_jax train ")[1].replace("\\\n", " ").split("\n")[0]
    words = shlex.split(re.sub(r"\\?\$\(.*?\)", "", command).replace("$RESUME", ""))
    config = cli._parse(TrainArgs, "train", words, TrainArgs(TrainConfig.preset("v3-671b", backend))).config
    assert config.mesh.devices == 2048
    assert config.runtime.dispatch == dispatch
