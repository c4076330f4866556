"""GRPO: samples groups of texts with the engine, rewards them, and trains on advantages within groups.

The engine samples with the arrays being trained: after each iteration it gets the new ones, without leaving the device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data import Tokenizer
from dsv3_jax.inference.engine import Engine, EngineConfig
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.post_training.losses import GRPOLoss, group_advantages
from dsv3_jax.post_training.rewards import Problem, Reward, SafeReward
from dsv3_jax.training.losses import IGNORE, Batch, chosen_experts, forward, model_inputs
from dsv3_jax.training.step import TrainState, make_train_step


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Parameters of sampling and training."""

    iterations: int = 100
    """Number of rounds of sampling and training."""
    prompts: int = 16
    """Problems per iteration."""
    samples: int = 8
    """Texts per problem, which form a group."""
    max_new_tokens: int = 64
    """Maximum number of tokens of a text."""
    length: int = 128
    """Maximum number of tokens of a prompt and its text: a row of the training batch."""
    epochs: int = 1
    """Epochs of training on the texts of an iteration."""
    minibatches: int = 1
    """Optimizer steps per epoch, each on a part of the texts."""
    replay_experts: bool = True
    """Whether to train each token with the experts that were chosen under the sampling weights. Otherwise, as the
    weights change within an iteration, tokens whose affinities nearly tie would change experts, and their probabilities
    would jump.
    """
    seed: int = 0
    """Seed for the order of problems and for sampling."""

    def __post_init__(self) -> None:
        for name in ("iterations", "prompts", "max_new_tokens", "length", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.samples < 2:
            raise ConfigError(
                f"samples is {self.samples}: a group needs at least 2, or nothing is better than its mean"
            )
        if self.prompts * self.samples % self.minibatches:
            raise ConfigError(
                f"minibatches is {self.minibatches}: it must divide prompts times samples, "
                f"{self.prompts * self.samples}"
            )


@dataclasses.dataclass
class Rollout:
    """A sampled text: its tokens, their log-probabilities under the sampling model, and its reward."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    reward: float = 0.0


def grpo(
    model: DeepSeekV3,
    state: TrainState,
    optimizer: Any,
    loss: GRPOLoss,
    problems: Sequence[Problem],
    reward: Reward,
    tokenizer: Tokenizer,
    config: GRPOConfig,
    *,
    end_ids: Collection[int] | None = None,
    encode: Callable[[str], list[int]] | None = None,
    reference: Any = None,
    start: int = 0,
) -> Iterator[tuple[TrainState, dict[str, float]]]:
    """Trains by GRPO. Yields the state and the metrics of each iteration.

    Args:
      state: from `init_state`, with the initial parameters. It is donated: use the yielded state instead.
      problems: each with a `prompt`; drawn without replacement until all have been used.
      reward: a function of a problem and a text; exceptions count as 0 and are reported.
      end_ids: tokens that end a text; by default the tokenizer's.
      encode: maps a prompt to tokens, such as by a chat template; by default the tokenizer's.
      reference: variables of the reference model for the KL divergence; by default those of `state`.
      start: number of previous iterations of a resumed run.

    Raises ConfigError if a prompt is too long, or if the reward function fails on every text of an iteration.
    """
    encoded = encode_prompts(problems, tokenizer, config, encode)
    sizes = EngineConfig(max_batch=config.prompts * config.samples, max_length=config.length, drafts=0, cache_share=0.2)
    ends = {tokenizer.eos_id} if end_ids is None else set(end_ids)
    engine = Engine(model, state.variables, sizes, end_ids=ends)
    step = jax.jit(make_train_step(model, optimizer, loss), donate_argnums=0)
    reference = jax.tree.map(jnp.copy, state.variables) if reference is None else reference
    safe, order = SafeReward(reward), _order(len(problems), config.seed)
    try:
        for _ in range(start * config.prompts):
            next(order)
        for iteration in range(start, config.iterations):
            chosen = [next(order) for _ in range(config.prompts)]
            engine.replace_variables(state.variables)
            rollouts = sample_groups(engine, [encoded[i] for i in chosen], config, iteration)
            before = safe.errors
            for rollout, i in zip(rollouts, np.repeat(chosen, config.samples).tolist(), strict=True):
                text = tokenizer.decode([t for t in rollout.tokens if t not in ends])
                rollout.reward = safe(problems[i], text)
            if safe.errors - before == len(rollouts):
                raise ConfigError(f"the reward function failed on every text of an iteration: {safe.last_error}")
            rewards = np.array([r.reward for r in rollouts]).reshape(config.prompts, config.samples)
            advantages = group_advantages(rewards)
            batch = grpo_batch(rollouts, advantages.ravel(), config.length)
            batch["reference_logprobs"] = np.asarray(token_logprobs(model, reference, batch))
            if config.replay_experts and config.epochs * config.minibatches > 1:  # one step chooses them anyway
                batch["experts"] = experts_of(model, state.variables, batch)
            metrics: dict[str, Any] = {}
            for pieces in _minibatches(batch, config, iteration):
                state, metrics = step(state, pieces)
            record = {k: float(v) for k, v in metrics.items() if jnp.ndim(v) == 0}
            record |= {
                "reward": float(rewards.mean()),
                "groups_without_signal": float((~advantages.any(1)).mean()),
                "length": float(np.mean([len(r.tokens) for r in rollouts])),
                "reward_errors": float(safe.errors - before),
            }
            yield state, record
    finally:
        engine.close()


def encode_prompts(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    config: GRPOConfig,
    encode: Callable[[str], list[int]] | None = None,
) -> list[list[int]]:
    """Encodes each problem's prompt. Raises ConfigError if one has no prompt, or leaves no room for an answer."""
    encode = encode or (lambda text: [int(t) for t in tokenizer.encode_prompt(text)])
    if not problems or not all(isinstance(problem.get("prompt"), str) for problem in problems):
        raise ConfigError("problems must be objects with a `prompt`, a text, and there must be some")
    encoded = [encode(problem["prompt"]) for problem in problems]
    longest = max(map(len, encoded))
    if longest + config.max_new_tokens > config.length:
        raise ConfigError(
            f"length is {config.length}: a prompt of {longest} tokens and {config.max_new_tokens} new ones exceed it"
        )
    return encoded


def mean_reward(
    engine: Engine,
    encoded: Sequence[list[int]],
    problems: Sequence[Problem],
    reward: Reward,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> float:
    """Returns the mean reward over problems, one text each. Exceptions of the reward function count as 0.

    Raises RuntimeError for a text that failed.
    """
    safe, special = SafeReward(reward), tokenizer.special_ids()
    requests = [
        engine.submit(tokens, Sampling(temperature=temperature, seed=i), max_new_tokens=max_new_tokens)
        for i, tokens in enumerate(encoded)
    ]
    rewards = []
    for problem, request in zip(problems, requests, strict=True):
        tokens: list[int] = []
        for step in request:
            if step.error is not None:
                raise RuntimeError(step.error)
            tokens += [t for t in step.tokens if t not in special]
        rewards.append(safe(problem, tokenizer.decode(tokens)))
    return float(np.mean(rewards))


def sample_groups(engine: Engine, prompts: Sequence[list[int]], config: GRPOConfig, iteration: int) -> list[Rollout]:
    """Samples `config.samples` texts per prompt at temperature 1, whose log-probabilities are the model's own."""
    requests = []
    for i, prompt in enumerate(np.repeat(np.arange(len(prompts)), config.samples).tolist()):
        seed = int(np.random.SeedSequence([config.seed, iteration, i]).generate_state(1)[0])
        how = Sampling(temperature=1.0, seed=seed)
        request = engine.submit(prompts[prompt], how, max_new_tokens=config.max_new_tokens, logprobs=0)
        requests.append((prompts[prompt], request))
    rollouts = []
    for tokens, request in requests:
        rollout = Rollout(tokens, [], [])
        for step in request:
            if step.error is not None:
                raise RuntimeError(step.error)
            rollout.tokens += step.tokens
            rollout.logprobs += [float(value) for _, value, _ in step.logprobs or [] if value is not None]
        rollouts.append(rollout)
    return rollouts


def grpo_batch(rollouts: Sequence[Rollout], advantages: np.ndarray, length: int) -> dict[str, Any]:
    """Builds `tokens` and `targets` (B, length), the latter for sampled tokens only, and GRPO's further arrays."""
    shape = len(rollouts), length
    batch: dict[str, Any] = {
        "tokens": np.zeros(shape, np.int32),
        "targets": np.full(shape, IGNORE, np.int32),
        "advantages": np.repeat(advantages[:, None], length, axis=1).astype(np.float32),
        "old_logprobs": np.zeros(shape, np.float32),
    }
    for row, r in enumerate(rollouts):
        text, start = [*r.prompt, *r.tokens][:-1], len(r.prompt) - 1
        batch["tokens"][row, : len(text)] = text
        batch["targets"][row, start : len(text)] = r.tokens
        batch["old_logprobs"][row, start : len(text)] = r.logprobs
    return batch


@functools.partial(jax.jit, static_argnums=0)
def token_logprobs(model: DeepSeekV3, variables: Any, batch: Batch) -> jax.Array:
    """Returns the log-probability of every target, (B, T) float32; 0 where there is none."""
    inputs = model_inputs(model, {k: batch[k] for k in ("tokens", "targets")})
    logits = forward(model, variables, inputs).logits
    assert logits is not None
    return jnp.where(inputs.masks[0], -logits.cross_entropy(inputs.targets[0])[0], 0)


@functools.partial(jax.jit, static_argnums=0)
def experts_of(model: DeepSeekV3, variables: Any, batch: Batch) -> Any:
    """Returns `chosen_experts` for the batch's tokens."""
    return chosen_experts(model, variables, {k: batch[k] for k in ("tokens", "targets")})


def _order(count: int, seed: int) -> Iterator[int]:
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(count).tolist()


def _minibatches(batch: dict[str, Any], config: GRPOConfig, iteration: int) -> Iterator[Batch]:
    rng = np.random.default_rng([config.seed, iteration])
    for _ in range(config.epochs):
        rows = np.arange(len(batch["tokens"])) if config.minibatches == 1 else rng.permutation(len(batch["tokens"]))
        for part in np.split(rows, config.minibatches):
            yield jax.tree.map(lambda x, part=part: jnp.asarray(x[part]), batch)
