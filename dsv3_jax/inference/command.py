"""`python -m dsv3_jax generate`: continues a text, printing it as it comes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro

from dsv3_jax.checkpoint import load_pretrained
from dsv3_jax.checkpoint.runs import CHECKPOINTS
from dsv3_jax.config import ConfigError
from dsv3_jax.data import Tokenizer, has_tokenizer, load_tokenizer
from dsv3_jax.data.tokenizer import valid_unicode
from dsv3_jax.inference.generate import stream
from dsv3_jax.inference.generation_config import GENERATION_CONFIG, GenerationConfig, read_generation_config
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.text import end_tokens, own_tokenizer

_TEMPERATURE, _TOP_P = 0.7, 0.95


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
    """Continue a text with a model from a training run, a Hugging Face directory, or a converted checkpoint.

    What isn't given is as the checkpoint's generation_config.json says. The text goes to standard output; how it is
    drawn, in one line, to standard error.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Directory of the run or checkpoint."""
    prompt: str = ""
    """Text to continue. Names of special tokens become those tokens."""
    max_new_tokens: int = 200
    """How many tokens to add at most."""
    temperature: float | None = None
    """0 takes the most likely token each time; else generation_config.json's, else 0.7."""
    top_k: int | None = None
    """Draw among this many most likely tokens; else generation_config.json's, else all."""
    top_p: float | None = None
    """Draw among the fewest tokens that together have this probability; else generation_config.json's, else 0.95."""
    seed: int = 0
    """Seed of the sampling."""
    tokenizer: str | None = None
    """A tokenizer.json, a tiktoken.model, a folder that holds one, or "bytes"; by default the model's own."""
    check_hashes: bool = True
    """Compare the files of a converted checkpoint or a run with their hashes, as they are read."""


def generate_command(args: GenerateArgs) -> None:
    """Runs `python -m dsv3_jax generate`.

    Raises:
      CheckpointError, FileNotFoundError: the checkpoint is damaged or incomplete.
      ConfigError: the directory has no tokenizer, that of another model, or an option isn't possible.
    """
    if not args.model.is_dir():
        raise FileNotFoundError(f"{args.model} is no directory: give that of a training run or checkpoint")
    is_run = (args.model / CHECKPOINTS).is_dir()
    tokenizer = _tokenizer(args, is_run)
    stored = GenerationConfig() if is_run else read_generation_config(args.model)
    sampling, said = _sampling(args, stored)
    model, variables = load_pretrained(args.model, mtp=False, check_hashes=args.check_hashes)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer {args.tokenizer or f'of {args.model}'} has {tokenizer.vocab_size} tokens, but the model's "
            f"vocab_size is {model.config.vocab_size}: it is another model's"
        )
    ends = end_tokens(args.model, model.config, tokenizer)
    text = valid_unicode(args.prompt)
    prompt = tokenizer.encode_prompt(text).tolist()
    key = jax.random.key(args.seed)
    drawn = stream(model, variables, [prompt], args.max_new_tokens, sampling=sampling, key=key, end_ids=ends)
    print(f"{said}; ends at token {', '.join(map(str, sorted(ends)))}", file=sys.stderr, flush=True)
    print(text, end="", flush=True)
    tokens, shown = list(prompt), len(tokenizer.decode(prompt))
    for token in drawn:
        if int(token[0]) in ends:
            break
        tokens.append(int(token[0]))
        text = tokenizer.decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the rest of a character may still come
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print(tokenizer.decode(tokens)[shown:])


def _tokenizer(args: GenerateArgs, is_run: bool) -> Tokenizer:
    """The tokenizer that is asked for, or the model's own."""
    if args.tokenizer is not None:
        return load_tokenizer(args.tokenizer, add_bos_token=True if is_run else None)
    try:
        return own_tokenizer(args.model)
    except ConfigError as error:
        if is_run or has_tokenizer(args.model):
            raise
        raise ConfigError(f"{error}, with --tokenizer") from None


def _sampling(args: GenerateArgs, stored: GenerationConfig) -> tuple[Sampling, str]:
    """How tokens are drawn, and that in words, each with where it is from."""
    chosen, said = {}, []
    for name, default in (("temperature", _TEMPERATURE), ("top_k", None), ("top_p", _TOP_P)):
        given, kept = getattr(args, name), getattr(stored, name)
        chosen[name] = given if given is not None else kept if kept is not None else default
        if chosen[name] is not None:
            source = " (asked for)" if given is not None else f" ({GENERATION_CONFIG})" if kept is not None else ""
            said.append(f"{name} {chosen[name]:g}{source}")
    if chosen["temperature"] == 0:
        said = said[:1]
    return Sampling(**chosen), ", ".join(said)  # type: ignore[arg-type]
