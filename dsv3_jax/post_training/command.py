"""`python -m dsv3_jax grpo`: reinforcement learning, in a directory that other commands read like a training run's."""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from dsv3_jax.checkpoint.load import load_pretrained
from dsv3_jax.checkpoint.remote import as_url, fetched
from dsv3_jax.checkpoint.runs import CHECKPOINTS, read_config
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.data import Tokenizer
from dsv3_jax.inference.engine import Engine, EngineConfig
from dsv3_jax.inference.text import own_tokenizer
from dsv3_jax.integrity import SEAL
from dsv3_jax.json_input import parse_json
from dsv3_jax.model.router import ROUTER
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.post_training.grpo import GRPOConfig, encode_prompts, grpo, mean_reward
from dsv3_jax.post_training.losses import GRPOLoss, Normalisation
from dsv3_jax.post_training.rewards import Problem, Reward, arithmetic_problems, load_reward
from dsv3_jax.runtime import Runtime
from dsv3_jax.serving.chat import read_chat_template
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.directory import CONFIG, LOCK, METRICS, has_begun, locked, visible, write_fields
from dsv3_jax.training.guard import all_finite, name_not_finite, stop_on_signal
from dsv3_jax.training.metrics import MetricsLog, read_metrics
from dsv3_jax.training.mirror import working_copy
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class GRPOArgs:
    """Reinforcement learning by GRPO (DeepSeek-R1, section 2.2.1), with rewards by rule.

    Starts from the weights of a run, a converted checkpoint or a Hugging Face directory, on one device. Ctrl-C saves
    and stops; `--resume` continues.
    """

    init_from: str
    """The weights to start from, which are also the reference for the KL divergence."""
    run_dir: Path = Path("runs/grpo")
    """The run's directory."""
    reward: str = "dsv3_jax.post_training.rewards.arithmetic_reward"
    """Dotted path of the reward, a function of a problem and the model's text."""
    problems: Path | None = None
    """JSON lines of objects with a `prompt` and whatever the reward needs; by default 4096 generated sums."""
    held_out: Path | None = None
    """Held-out problems, answered greedily and sampled to measure the mean reward; by default 256 other sums."""
    grpo: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
    """Sampling and training."""
    clip_low: float = 0.2
    """The ratio of a token's probabilities is clipped below 1 - clip_low,"""
    clip_high: float = 0.2
    """and above 1 + clip_high; 0.28 in DAPO."""
    kl_weight: float = 0.001
    """Weight of the KL divergence to the reference, beta; 0.001 in R1."""
    normalise: Normalisation = "sequence"
    """`sequence` averages over the tokens of a text and then over texts (R1), `token` over all tokens (DAPO)."""
    mtp_weight: float = 0.1
    """Weight of the MTP modules' cross entropy on sampled texts, which doesn't affect the model; 0 for no training."""
    learning_rate: float = 3e-6
    """Learning rate after a warm-up of 5 steps; 3e-6 in R1."""
    end_learning_rate: float | None = None
    """Learning rate at the end of a cosine decay that begins half-way; by default the learning rate is constant."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(weight_decay=0.0))
    """Other parameters of AdamW."""
    runtime: Runtime = dataclasses.field(default_factory=lambda: Runtime.for_backend(jax.default_backend()))
    """How the run computes the model."""
    evaluate_every: int = 10
    """Iterations between evaluations on the held-out problems, besides the start and the end."""
    checkpoint_every: int = 50
    """Iterations between checkpoints, besides the last one."""
    resume: bool = False
    """Continue the run in run_dir from its newest checkpoint, with the same options."""

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("learning_rate", "end_learning_rate"):
            if (rate := getattr(self, name)) is not None and not rate > 0:
                raise ConfigError(f"{name} is {rate}: it must be positive")


def grpo_command(args: GRPOArgs, console: Console | None = None) -> None:
    """Runs `python -m dsv3_jax grpo`.

    Raises:
      ConfigError: an option is invalid, the directory contains something else, or problems can't be read.
      CheckpointError, FileNotFoundError: the weights to start from can't be read.
    """
    console = console or Console()
    with working_copy(args.run_dir, console) as here:
        _grpo(dataclasses.replace(args, run_dir=here), console)
    console.print(f"done: {as_url(args.run_dir) or args.run_dir}/report.md")


def _grpo(args: GRPOArgs, console: Console) -> None:
    directory = args.run_dir
    reward = load_reward(args.reward)
    if args.problems is not None and args.held_out is None:
        raise ConfigError("--problems needs --held-out, other problems of the same kind: the default ones are sums")
    held_out = _problems(args.held_out, lambda: arithmetic_problems(256, args.grpo.seed + 1))
    prompts = {problem["prompt"] for problem in held_out}
    problems = _problems(args.problems, lambda: arithmetic_problems(4096, args.grpo.seed))
    problems = [problem for problem in problems if problem["prompt"] not in prompts]
    weights = fetched(args.init_from)
    tokenizer = own_tokenizer(weights)
    encode = _chat_encoding(weights, tokenizer)
    encode_prompts(problems, tokenizer, args.grpo, encode)  # what is wrong is said before anything is made
    model, variables = load_pretrained(weights, runtime=args.runtime)
    config = dataclasses.replace(model.config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    loss = GRPOLoss(config, args.clip_low, args.clip_high, args.kl_weight, args.normalise, args.mtp_weight)
    content = _config(args, config)
    _check_directory(args, content)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory) as warning:
        if warning:
            console.print(f"warning: {warning}")
        write_fields(directory, content, weights)
        _Run(args, model, variables, loss, problems, held_out, reward, tokenizer, encode, console).train()


class _Run:
    """A run of GRPO in its directory: metrics, evaluation on held-out problems, checkpoints, report."""

    def __init__(
        self,
        args: GRPOArgs,
        model: DeepSeekV3,
        variables: Any,
        loss: GRPOLoss,
        problems: list[Problem],
        held_out: list[Problem],
        reward: Reward,
        tokenizer: Tokenizer,
        encode: Callable[[str], list[int]] | None,
        console: Console,
    ) -> None:
        self.args, self.model, self.variables, self.loss, self.console = args, model, variables, loss, console
        self.problems, self.held_out, self.reward = problems, held_out, reward
        self.tokenizer, self.encode = tokenizer, encode
        self.encoded = encode_prompts(held_out, tokenizer, args.grpo, encode)
        end = args.end_learning_rate or args.learning_rate
        rates = dict(peak_learning_rate=args.learning_rate, end_learning_rate=end, tail_learning_rate=end)
        steps = args.grpo.iterations * args.grpo.epochs * args.grpo.minibatches
        how: dict[str, Any] = dict(steps=steps, batch_size=1, warmup_steps=5, constant_until=0.5) | rates
        schedule = Schedule(ScheduleConfig(**how))
        self.optimizer = make_optimizer(args.optimizer, schedule)
        sizes = EngineConfig(max_batch=64, max_length=args.grpo.length, cache_share=0.2, drafts_up_to=64)
        self.engine = Engine(model, variables, sizes, end_ids={tokenizer.eos_id})

    def train(self) -> None:
        args, g = self.args, self.args.grpo
        checkpoints = Checkpoints(args.run_dir / CHECKPOINTS, 2)
        params = jax.tree.map(jnp.copy, self.variables["params"])  # training takes the arrays over
        router = jax.tree.map(jnp.copy, self.variables.get(ROUTER, {}))
        begin = jax.jit(self.optimizer.init)(params)
        state = TrainState(jnp.zeros((), jnp.int32), params, router, begin, jax.random.key(g.seed))
        if args.resume:
            state = self.restored(checkpoints, state)
        done = start = int(state.step) // (g.epochs * g.minibatches)
        log = None
        try:
            if not args.resume:
                checkpoints.save(state, {})
            first = None if start else self.evaluate(state)  # also if a run was killed before it was written
            checkpoints.wait()  # without a checkpoint, a directory with metrics isn't begun in again
            log = MetricsLog(args.run_dir, first_step=start or -1)
            if first is not None:
                log.write(0, first)
            how: dict[str, Any] = dict(encode=self.encode, reference=self.variables, start=start)
            began = time.monotonic()
            with stop_on_signal() as stopping:
                rounds = grpo(
                    self.model, state, self.optimizer, self.loss, self.problems, self.reward, self.tokenizer, g, **how
                )
                for state, metrics in rounds:
                    done += 1
                    if done % args.evaluate_every == 0 or done == g.iterations:
                        metrics = metrics | self.evaluate(state)
                    log.write(done, metrics)
                    left = (time.monotonic() - began) / (done - start) * (g.iterations - done)
                    self.console.print(_line(done, g.iterations, metrics, left), soft_wrap=True)
                    stop = stopping()  # asked once: a signal that comes later is for the next iteration
                    if done % args.checkpoint_every == 0 or done == g.iterations or stop:
                        checkpoints.save(state, {})
                    if stop:
                        break
        finally:
            if log is not None:
                log.close()
            checkpoints.close()
            self.engine.close()
        records = read_metrics(args.run_dir / METRICS)
        plot(args.run_dir / "metrics.png", records, str(args.run_dir))
        (args.run_dir / "report.md").write_text(report(args, records))
        if done < g.iterations:
            raise KeyboardInterrupt

    def restored(self, checkpoints: Checkpoints, like: TrainState) -> TrainState:
        """Restores the newest valid and finite state. Newer checkpoints are set aside, with a message."""
        finite = jax.jit(all_finite)
        found, passed_over = checkpoints.restore_newest(like, lambda state: name_not_finite(state, finite(state)))
        checkpoints.pass_over(passed_over, lambda line: self.console.print(line, soft_wrap=True))
        self.console.print(f"going on from the checkpoint of step {int(found.state.step)}")
        return found.state

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Mean rewards on the held-out problems, and the fraction of accepted MTP drafts."""
        self.engine.replace_variables(state.variables)
        before = self.engine.stats()
        new, g = self.held_out, self.args.grpo
        how = (self.encoded, new, self.reward, self.tokenizer, g.max_new_tokens)
        metrics = {"held_out_reward": mean_reward(self.engine, *how)}
        after = self.engine.stats()
        if drafted := after.draft_tokens - before.draft_tokens:
            metrics["mtp_acceptance"] = (after.accepted_tokens - before.accepted_tokens) / drafted
        return metrics | {"held_out_sampled_reward": mean_reward(self.engine, *how, temperature=1.0)}


def _problems(path: Path | None, generated: Callable[[], list[dict[str, str]]]) -> list[Problem]:
    if path is None:
        return list(generated())
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"problems {path} can't be read: {error}") from None
    found: list[Problem] = [
        parse_json(line, f"{path}: line {i}", ConfigError) for i, line in enumerate(lines, 1) if line.strip()
    ]
    if not found or not all(isinstance(p, dict) and isinstance(p.get("prompt"), str) for p in found):
        raise ConfigError(f"{path} must hold JSON lines, each an object with a `prompt`, a text")
    return found


def _chat_encoding(path: Path, tokenizer: Tokenizer) -> Callable[[str], list[int]] | None:
    """Encodes a prompt as a user message, if the checkpoint has a chat template."""
    template = read_chat_template(path, {"bos_token": "", "eos_token": ""})
    if template is None:
        return None

    def encode(prompt: str) -> list[int]:
        text = template.render([{"role": "user", "content": prompt}]).text
        tokens = [int(t) for t in tokenizer.encode_prompt(text, add_special_tokens=False)]
        return tokens if tokens[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *tokens]

    return encode


def _config(args: GRPOArgs, model: ModelConfig) -> dict[str, Any]:
    """Returns the run as JSON, with `model` where other commands expect it."""
    fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(args), default=str))
    return {k: v for k, v in fields.items() if k not in ("run_dir", "resume")} | {"model": dataclasses.asdict(model)}


def _check_directory(args: GRPOArgs, content: dict[str, Any]) -> None:
    """Raises ConfigError if the directory contains anything other than the run to resume."""
    directory, config = args.run_dir, args.run_dir / CONFIG
    if not args.resume:
        saved_nothing = config.exists() and not has_begun(directory) and "grpo" in read_config(config)
        if directory.exists() and visible(directory) - {LOCK} and not saved_nothing:
            raise ConfigError(f"{directory} is not empty: choose another --run-dir, or go on with --resume")
        return
    if not has_begun(directory):
        raise ConfigError(f"{directory} holds no run to resume: start it without --resume")
    before = read_config(config)
    now = json.loads(json.dumps(content))
    for name in sorted(set(before) - {"tokenizer_files", SEAL}):
        if before[name] != now.get(name):
            raise ConfigError(f"{directory} holds a run with {name} {before[name]!r}, not {now.get(name)!r}")


def _line(done: int, iterations: int, metrics: dict[str, Any], left: float) -> str:
    shown = {k: metrics[k] for k in ("reward", "held_out_reward", "kl", "length", "mtp_acceptance") if k in metrics}
    parts = "  ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in shown.items())
    return f"iteration {done}/{iterations}  {parts}  {datetime.timedelta(seconds=round(left))} left"


def plot(path: Path, records: list[dict[str, Any]], title: str) -> None:
    """Plots rewards, KL and text length by iteration into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for axes, keys in zip(
        all_axes,
        (("reward", "held_out_sampled_reward", "held_out_reward", "mtp_acceptance"), ("kl",), ("length",)),
        strict=True,
    ):
        for key in keys:
            if points := [(r["step"], r[key]) for r in records if key in r]:
                axes.plot(*zip(*points, strict=True), label=key.replace("_", " "))
        axes.set(xlabel="iteration")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(args: GRPOArgs, records: list[dict[str, Any]]) -> str:
    """Formats the run's report in Markdown: its metrics at the start and at the end."""
    first: dict[str, Any] = {}
    last: dict[str, Any] = {}
    for record in records:
        first, last = record | first, last | record
    names = [k for k, v in last.items() if isinstance(v, float)]
    rows = "\n".join(f"| {k.replace('_', ' ')} | {first[k]:.4g} | {last[k]:.4g} |" for k in names)
    return (
        f"# GRPO from {args.init_from}\n\n| | first | last |\n|---|---|---|\n{rows}\n\n"
        f"{datetime.date.today()}, {jax.devices()[0].device_kind}, jax {jax.__version__}. The KL is to the model of "
        "the start, in nats per token. The run's config is in `config.json`.\n\n![rewards, KL, length](metrics.png)\n"
    )
