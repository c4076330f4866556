"""The whole recipe in one command: from texts to a model that answers better than the chats it was taught with.

    python -m experiments.recipe --transformers-python path/to/python

Prepares data, pre-trains with MTP, extends the context four times by YaRN, fine-tunes on chats, does GRPO, exports to
Hugging Face's layout, and compares logits with transformers' (by an interpreter that has it; skipped without). The task
is arithmetic of two digits. Pre-training texts are right; of the chats only `SHARE_RIGHT` are, as of bad annotators: so
the fine-tuned model, sampled, errs at least as often, and GRPO has something to gain. Problems that are held out are in
no chat and no GRPO prompt. Each stage is a directory, so that a recipe that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from rich.console import Console

from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command
from dsv3_jax.checkpoint.load import load_pretrained
from dsv3_jax.config import ModelConfig, Yarn
from dsv3_jax.data import DataConfig, PrepareOptions, load_tokenizer, prepare
from dsv3_jax.inference.engine import Engine, EngineConfig
from dsv3_jax.post_training.command import GRPOArgs, grpo_command
from dsv3_jax.post_training.grpo import GRPOConfig
from dsv3_jax.post_training.rewards import Problem
from dsv3_jax.serving.chat import chat_template_beside
from dsv3_jax.training.config import TrainConfig
from dsv3_jax.training.directory import has_begun
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.schedule import ScheduleConfig
from dsv3_jax.training.trainer import train
from experiments.small_run import Results, circumstances, circumstances_line, once, table, write_results

NAME = "recipe"
SHARE_RIGHT = 0.6
SHORT, LONG = 64, 256
MODEL = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(hidden_size=64, intermediate_size=192, moe_intermediate_size=48, num_hidden_layers=2, n_routed_experts=4),
    **dict(num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16),
    **dict(qk_rope_head_dim=8, v_head_dim=16, max_position_embeddings=SHORT, initializer_range=0.02),
)
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ '?' if m.role == 'user' else '<eos>' }}{% endfor %}"
PROBLEMS = [(f"{a}{sign}{b}", a + b if sign == "+" else a - b) for a in range(10) for b in range(10) for sign in "+-"]


def answer_reward(problem: Problem, text: str) -> float:
    """1 for `3+4=7` as the answer to `3+4`; 0.1 for another number in this form; else 0."""
    found = re.fullmatch(re.escape(problem["prompt"]) + r"=(-?\d+)", text)
    return 0.0 if not found else 1.0 if found.group(1) == problem["answer"] else 0.1


# Stages ----------------------------------------------------------------------------------------------------


def prepare_data(out: Path) -> None:
    """Texts and chats, tokenised; the tokenizer with a chat template; problems for GRPO and those held out."""
    rng = np.random.default_rng(0)
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    load_tokenizer(None).save(out / "tokenizer")
    (out / "tokenizer/chat_template.jinja").write_text(TEMPLATE)
    order = rng.permutation(len(PROBLEMS)).tolist()
    held_out, others = [PROBLEMS[i] for i in order[:40]], [PROBLEMS[i] for i in order[40:]]
    for name, problems in (("held_out", held_out), ("problems", others)):
        _write(out / f"{name}.jsonl", [{"prompt": p, "answer": str(answer)} for p, answer in problems])
    lines = lambda: [f"{p}={answer}" for p, answer in (PROBLEMS[i] for i in rng.integers(0, len(PROBLEMS), 40))]
    _write(out / "texts.jsonl", [{"text": "\n".join(lines())} for _ in range(3000)])
    chats = []
    for _ in range(20000):
        problem, answer = others[rng.integers(len(others))]
        says = answer if rng.random() < SHARE_RIGHT else int(rng.integers(-9, 19))
        talk = [{"role": "user", "content": problem}, {"role": "assistant", "content": f"{problem}={says}"}]
        chats.append({"messages": talk})
    _write(out / "chats.jsonl", chats)
    for name in ("texts", "chats"):
        options = PrepareOptions(tokenizer=str(out / "tokenizer"), validation_fraction=0.02)
        chat = (lambda: chat_template_beside(out / "tokenizer")) if name == "chats" else None
        if not (out / name).exists():
            prepare([str(out / f"{name}.jsonl")], out / name, options, chat=chat)


def configs(out: Path) -> dict[str, TrainConfig]:
    """The runs of the trainer: pre-training, context extension, fine-tuning."""
    often = dict(log_every=20, validate_every=200, validation_batches=2, checkpoint_every=1000, sample_tokens=0)
    texts = DataConfig(str(out / "texts"), sequence_length=SHORT)
    base = dataclasses.replace(TrainConfig.preset("tiny", "cpu"), model=MODEL, data=texts, **often)
    rates = dict(peak_learning_rate=4e-3, end_learning_rate=4e-4, tail_learning_rate=4e-4)
    schedule = ScheduleConfig(steps=3000, batch_size=32, warmup_steps=40, constant_until=0.5, bias_update_speed=0.01)
    pretraining = dataclasses.replace(base, schedule=dataclasses.replace(schedule, **rates))
    yarn = Yarn(LONG / SHORT, SHORT, mscale=1.0, mscale_all_dim=1.0)
    longer = dataclasses.replace(MODEL, max_position_embeddings=LONG, rope_scaling=yarn)
    gentle = dict(peak_learning_rate=1e-3, end_learning_rate=1e-4, tail_learning_rate=1e-4)
    low = dict(peak_learning_rate=5e-4, end_learning_rate=5e-4, tail_learning_rate=5e-4)
    extension = dataclasses.replace(
        base,
        model=longer,
        data=dataclasses.replace(texts, sequence_length=LONG),
        schedule=ScheduleConfig(steps=80, batch_size=8, warmup_steps=5, bias_update_speed=0.0, **low),
        init_from=str(out / "pretraining"),
    )
    chats = DataConfig(str(out / "chats"), sequence_length=SHORT, packing="best_fit", mask_documents=True)
    sft = dataclasses.replace(
        dataclasses.replace(base, model=longer).fine_tuning(),
        data=chats,
        schedule=ScheduleConfig(steps=300, batch_size=16, warmup_steps=20, bias_update_speed=0.0, **gentle),
        init_from=str(out / "extension"),
    )
    return {"pretraining": pretraining, "extension": extension, "sft": sft}


def reinforcement(out: Path, iterations: int) -> GRPOArgs:
    """The GRPO run."""
    sizes = GRPOConfig(iterations=iterations, prompts=16, samples=8, max_new_tokens=8, length=32)
    return GRPOArgs(
        str(out / "sft"),
        out / "grpo",
        "experiments.recipe.answer_reward",
        out / "problems.jsonl",
        out / "held_out.jsonl",
        grpo=sizes,
        learning_rate=2e-4,
        end_learning_rate=2e-5,
        evaluate_every=20,
        checkpoint_every=50,
    )


def acceptance(variables: Any, model: Any, prompts: Sequence[str], new: int) -> float:
    """Share of the MTP module's drafts that the model's own greedy text accepts."""
    tokenizer = load_tokenizer(None)
    sizes = EngineConfig(max_batch=32, drafts_up_to=32, max_length=48)
    engine = Engine(model, variables, sizes, end_ids={tokenizer.eos_id})
    try:
        list(engine.generate([tokenizer.encode_prompt(p).tolist() for p in prompts], max_new_tokens=new))
        return engine.stats().accepted_tokens / engine.stats().draft_tokens
    finally:
        engine.close()


def acceptances(out: Path) -> dict[str, dict[str, float]]:
    """Acceptance at each stage, on chats and on texts; `without`: GRPO's model with the MTP module as before SFT.

    The module's training doesn't reach the rest of the model, so that is the model that training without would give
    (but for the module's part in the norm at which gradients are clipped).
    """
    problems = [json.loads(line)["prompt"] for line in (out / "held_out.jsonl").read_text().splitlines()]
    chats, texts = [f"{p}?" for p in problems], [f"{p}=" for p in problems]
    loaded = {stage: load_pretrained(out / stage) for stage in ("extension", "sft", "grpo")}
    model, trained = loaded["grpo"]
    old = {k: v for k, v in loaded["extension"][1]["params"].items() if k.startswith("mtp_")}
    routers = {k: v for k, v in loaded["extension"][1]["router"].items() if k.startswith("mtp_")}
    frozen = {"params": trained["params"] | old, "router": trained["router"] | routers}
    loaded["without"] = model, frozen
    return {
        stage: {"chats": acceptance(v, m, chats, 8), "texts": acceptance(v, m, texts, 24)}
        for stage, (m, v) in loaded.items()
    }


REFERENCE = """
import sys, numpy, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = torch.from_numpy(numpy.load(sys.argv[2]))
with torch.no_grad():
    numpy.save(sys.argv[3], model(tokens).logits.numpy())
print(transformers.__version__)
"""


def compare_with_transformers(out: Path, python: str | None) -> dict[str, Any]:
    """Largest difference between our logits and transformers' on the exported files; or why there is none."""
    if python is None:
        return {"skipped": "no interpreter with transformers was named (--transformers-python)"}
    tokens = np.random.default_rng(0).integers(0, 256, (4, 100))
    np.save(out / "tokens.npy", tokens)
    files = [str(out / "hf"), str(out / "tokens.npy"), str(out / "logits.npy")]
    done = subprocess.run([python, "-c", REFERENCE, *files], capture_output=True, text=True)
    if done.returncode:
        return {"skipped": f"{python} can't: {done.stderr.strip().splitlines()[-1:]}"}
    model, variables = load_pretrained(out / "grpo")
    ours, theirs = np.asarray(model.apply(variables, tokens.astype(np.int32))), np.load(out / "logits.npy")
    version = done.stdout.split()[-1]
    return {
        "transformers": version,
        "largest_difference": float(np.abs(ours - theirs).max()),
        "largest_logit": float(np.abs(theirs).max()),
    }


# The report ------------------------------------------------------------------------------------------------


def render(results: Results) -> str:
    """The report in Markdown."""
    first, last = results["grpo"][0], results["grpo"][-1]
    rewards = [r["reward"] for r in results["grpo"] if "reward" in r]
    at_the_end = sum(rewards[-20:]) / len(rewards[-20:])  # of other problems each
    percent = lambda x: f"{100 * x:.1f} %"
    gain = 100 * (last["held_out_sampled_reward"] - first["held_out_sampled_reward"])
    rows = [
        ["mean reward of sampled texts, of at most 1", f"{rewards[0]:.3f}", f"{at_the_end:.3f} (of 20 iterations)"],
        ["held-out, sampled", f"{first['held_out_sampled_reward']:.3f}", f"{last['held_out_sampled_reward']:.3f}"],
        ["held-out, greedy", f"{first['held_out_reward']:.3f}", f"{last['held_out_reward']:.3f}"],
        ["KL to the fine-tuned model (nats per token)", "0", f"{last['kl']:.3f}"],
    ]
    mtp, names = results["acceptance"], {"extension": "before SFT", "sft": "after SFT", "grpo": "after GRPO"}
    names |= {"without": "after GRPO, MTP module as before SFT"}
    shares = [[said, percent(mtp[k]["chats"]), percent(mtp[k]["texts"])] for k, said in names.items()]
    theirs = results["transformers"]
    same = theirs.get("skipped") or (
        f"transformers {theirs['transformers']} loads the export; its logits, up to {theirs['largest_logit']:.1f}, "
        f"differ by at most {theirs['largest_difference']:.1e}."
    )
    extended = results["extension"]
    return (
        f"# The recipe, end to end\n\n{circumstances_line(results)}\n\n"
        f"{sum(results['seconds'].values()):,.0f} s in all: "
        f"{', '.join(f'{k} {v:,.0f} s' for k, v in results['seconds'].items())}.\n\n## GRPO\n\n"
        f"{table(['', 'first', 'last'], rows)}\n\nSampled held-out answers gain {gain:.1f} points. The chats of SFT "
        f"were right in {percent(results['share_right'])}. Wrong numbers get 0.1.\n\n## The MTP module\n\n"
        "Share of its drafts that greedy decoding accepts, on each model's own continuation of 40 held-out prompts:\n\n"
        f"{table(['', 'of chats', 'of texts'], shares)}\n\n## Context\n\n"
        f"Validation loss at {results['lengths'][0]} tokens: {extended['short']:.4f} nats per byte. After YaRN, at "
        f"{results['lengths'][1]} tokens: {extended['long']:.4f}.\n\n## Export\n\n{same}\n\n![GRPO](recipe.png)\n"
    )


def plot(results: Results, path: Path) -> None:
    """Draws rewards, and the acceptance of drafts, against GRPO's iteration."""
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for key in ("reward", "held_out_sampled_reward", "mtp_acceptance", "kl"):
        points = [(r["step"], r[key]) for r in results["grpo"] if key in r]
        axes.plot(*zip(*points, strict=True), label=key.replace("_", " "))
    axes.set(xlabel="GRPO iteration", title=f"after fine-tuning on chats, {results['share_right']:.0%} of them right")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(out: Path = Path("runs/recipe"), transformers_python: str | None = None, iterations: int = 500) -> None:
    """Runs all stages, those that were done before excepted, and writes the report.

    Args:
      out: the stages' directories.
      transformers_python: an interpreter that has PyTorch and transformers.
      iterations: of GRPO.
    """
    console, seconds = Console(), dict[str, float]()
    args = reinforcement(out, iterations)  # what is wrong with it is said before the stages that come first

    def train_all_steps(config: TrainConfig, directory: Path) -> None:
        if train(config, directory, resume=has_begun(directory), console=console).metrics["stopped"]:
            raise SystemExit("stopped: the same command goes on")

    def stage(name: str, work: Callable[[], Any]) -> None:
        def timed() -> float:
            began = time.monotonic()
            work()
            return time.monotonic() - began

        console.rule(name)
        seconds[name] = once(out / "seconds" / f"{name}.json", timed)

    stage("data", lambda: prepare_data(out))
    for name, config in configs(out).items():
        stage(name, lambda n=name, c=config: train_all_steps(c, out / n))
    args = dataclasses.replace(args, resume=(args.run_dir / "checkpoints").exists())
    stage("grpo", lambda: grpo_command(args, console))
    stage("export", lambda: convert_command(ConvertArgs(str(out / "grpo"), out / "hf")))
    loss = lambda name: [r for r in read_metrics(out / name / "metrics.jsonl") if "validation_loss" in r][-1]
    command = f"python -m experiments.recipe --iterations {iterations} --transformers-python PYTHON"
    results = {
        "circumstances": circumstances(command),
        "seconds": seconds,
        "share_right": SHARE_RIGHT,
        "lengths": [SHORT, LONG],
        "extension": {"short": loss("pretraining")["validation_loss"], "long": loss("extension")["validation_loss"]},
        "grpo": read_metrics(out / "grpo" / "metrics.jsonl"),
        "acceptance": once(out / "acceptance.json", lambda: acceptances(out)),
        "transformers": compare_with_transformers(out, transformers_python),
    }
    write_results(NAME, results, render, plot)


def _write(file: Path, records: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache/dsv3_jax/compiled"))
    tyro.cli(main)
