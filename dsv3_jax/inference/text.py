"""Text generation: `generate` with the tokenizer and end tokens of the checkpoint that a model was loaded from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint.load import open_checkpoint
from dsv3_jax.checkpoint.run_tokenizer import run_tokenizer
from dsv3_jax.checkpoint.runs import CHECKPOINTS
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.data import Tokenizer, has_tokenizer, load_tokenizer
from dsv3_jax.data.tokenizer import valid_unicode
from dsv3_jax.inference.engine import Engine, EngineConfig
from dsv3_jax.inference.generation_config import read_generation_config
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.model.auto import PAGE
from dsv3_jax.model.transformer import DeepSeekV3


def generate(
    model: DeepSeekV3,
    variables: Mapping[str, Any],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Iterator[str]:
    """Continues each prompt on an engine, up to 32 at a time, and yields the new text of each, in their order.

    Args:
      max_new_tokens: maximum number of new tokens; a text ends earlier at one of the checkpoint's end tokens.
      sampling: sampling parameters; greedy by default.
      seed: of the sampling.
      tokenizer: by default that of the checkpoint given to `load_pretrained`.

    Raises:
      ConfigError: the model has no tokenizer, or the engine refuses a prompt.
      RuntimeError: a text failed.
    """
    source = None if model.source is None else Path(model.source)
    if tokenizer is None:
        if source is None:
            raise ConfigError("the model wasn't loaded from a checkpoint: pass tokenizer=load_tokenizer(path)")
        tokenizer = own_tokenizer(source)
    ends = {tokenizer.eos_id} if source is None else end_tokens(source, model.config, tokenizer)
    encoded = [tokenizer.encode_prompt(valid_unicode(prompt)).tolist() for prompt in prompts]
    size = max(map(len, encoded), default=1) + max_new_tokens
    config = EngineConfig(
        max_batch=max(min(len(encoded), 32), 1), max_length=rounded_length(model.config, size), seed=seed
    )
    engine = Engine(model, variables, config, end_ids=ends)
    drawn = engine.generate(encoded, sampling or Sampling(temperature=0), max_new_tokens=max_new_tokens)
    try:
        for prompt, new in zip(encoded, drawn, strict=True):
            length = next((i for i, token in enumerate(new) if token in ends), len(new))
            before = len(tokenizer.decode(prompt))
            yield tokenizer.decode([*prompt, *new[:length]])[before:]
    finally:
        drawn.close()
        engine.close()


def rounded_length(config: ModelConfig, tokens: int) -> int:
    """An engine's `max_length` for texts of so many tokens: one of few, since each has programs of its own."""
    return max(min(max(PAGE, 1 << (tokens - 1).bit_length()), config.max_position_embeddings), 2)


def own_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer of a run or checkpoint. Raises ConfigError or CheckpointError, naming what is missing."""
    if (path / CHECKPOINTS).is_dir():
        return run_tokenizer(path)
    try:
        return load_tokenizer(path)
    except ConfigError:
        if not has_tokenizer(path):
            open_checkpoint(path)  # if that isn't one, this is what to say
        raise


def end_tokens(path: Path, config: ModelConfig, tokenizer: Tokenizer) -> set[int]:
    """Returns the end tokens of the model in `path`: for a run, the tokenizer's eos, which ends its documents."""
    if (path / CHECKPOINTS).is_dir():
        return {tokenizer.eos_id}
    stored = read_generation_config(path).end_ids
    return {tokenizer.eos_id, *(config.eos_token_ids if stored is None else stored)}
