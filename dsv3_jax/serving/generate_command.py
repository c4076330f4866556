"""`python -m dsv3_jax generate`: continues a text, or answers in a chat, and streams the output."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsv3_jax.checkpoint import load_pretrained
from dsv3_jax.checkpoint.remote import fetched
from dsv3_jax.checkpoint.runs import CHECKPOINTS
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.data import Tokenizer, has_tokenizer, load_tokenizer
from dsv3_jax.data.tokenizer import valid_unicode
from dsv3_jax.inference.engine import Engine, EngineConfig
from dsv3_jax.inference.generation_config import GENERATION_CONFIG, GenerationConfig, read_generation_config
from dsv3_jax.inference.request import Request
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.text import end_tokens, own_tokenizer, rounded_length
from dsv3_jax.serving.chat import ChatTemplate, read_chat_template, template_file
from dsv3_jax.serving.detokenize import Detokenizer, Vocabulary

ParameterDtype = Literal["float32", "bfloat16", "fp8"]
_TEMPERATURE, _TOP_P = 0.7, 0.95


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
    """Continue a text with a model from a training run, a Hugging Face directory, or a converted checkpoint.

    Sampling options default to the checkpoint's generation_config.json. The text goes to standard output, and a line
    about the sampling to standard error.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Directory of the run or checkpoint, or a URL, such as gs://bucket/run."""
    prompt: str = ""
    """Text to continue. Names of special tokens become those tokens. With --chat, the user message; by default each
    line of standard input.
    """
    chat: bool = False
    """Answer as an assistant, using the chat template, instead of continuing the text."""
    system: str | None = None
    """With --chat, the system message."""
    chat_template: Path | None = None
    """File with a Jinja template for --chat; by default the checkpoint's own."""
    max_new_tokens: int = 200
    """Maximum number of tokens to generate."""
    temperature: float | None = None
    """Sampling temperature; 0 selects the most likely token. By default generation_config.json's, else 0.7."""
    top_k: int | None = None
    """Sample only from this many most likely tokens; by default generation_config.json's, else all."""
    top_p: float | None = None
    """Sample only from the most likely tokens with this total probability; by default generation_config.json's, else
    0.95.
    """
    seed: int = 0
    """Seed of the sampling."""
    tokenizer: str | None = None
    """A tokenizer.json, a tiktoken.model, a folder that contains one, or "bytes"; by default the model's own."""
    dtype: ParameterDtype = "float32"
    """Dtype of the parameters. fp8 keeps the matrices of an FP8 checkpoint in their blocks and multiplies in FP8."""
    check_hashes: bool = True
    """Compare the files of a converted checkpoint or run with their hashes while reading."""


def generate_command(args: GenerateArgs) -> None:
    """Runs `python -m dsv3_jax generate`.

    Raises:
      CheckpointError, FileNotFoundError: the checkpoint is damaged or incomplete.
      ConfigError: the directory has no tokenizer, or that of another model, or an option is invalid.
    """
    args = dataclasses.replace(args, model=fetched(args.model))
    if not args.model.is_dir():
        raise FileNotFoundError(f"{args.model} is no directory: give that of a training run or checkpoint")
    tokenizer = chosen_tokenizer(args.model, args.tokenizer)
    template = chosen_template(args.model, args.chat_template, tokenizer) if args.chat else None
    if args.chat and template is None:
        raise ConfigError(f"{args.model} has no chat template: give one with --chat-template, or leave out --chat")
    stored = read_generation_config(args.model)
    sampling, said = _sampling(args, stored)
    model, variables = load_pretrained(args.model, dtype=args.dtype, mtp=False, check_hashes=args.check_hashes)
    check_tokenizer(tokenizer, model.config, args.tokenizer or f"of {args.model}")
    ends = end_tokens(args.model, model.config, tokenizer)
    vocabulary, text = Vocabulary(tokenizer), valid_unicode(args.prompt)
    prompt = tokenizer.encode_prompt(text).tolist()
    # A chat may grow to whatever the model takes.
    length = None if args.chat else rounded_length(model.config, len(prompt) + args.max_new_tokens)
    engine = Engine(model, variables, EngineConfig(max_batch=1, max_length=length, seed=args.seed), end_ids=ends)

    def begin(prompt: list[int]) -> Request:
        return engine.submit(prompt, sampling, max_new_tokens=args.max_new_tokens)

    def show(request: Request) -> str:
        """Prints the text as it is drawn, and returns it. Raises RuntimeError if it fails."""
        text, whole = Detokenizer(vocabulary), ""
        for step in request:
            if step.error is not None:
                raise RuntimeError(step.error)
            for token in step.tokens:
                if token not in ends:
                    print(piece := text.add(token), end="", flush=True)
                    whole += piece
        print(last := text.end())
        return whole + last

    how = f"{said}; ends at token {', '.join(map(str, sorted(ends)))}"
    if template is None:
        request = begin(prompt)  # or an error, before anything is printed
        print(how, file=sys.stderr, flush=True)
        print(text, end="", flush=True)
        show(request)
        return
    print(how, file=sys.stderr, flush=True)
    talk = [] if args.system is None else [{"role": "system", "content": args.system}]
    for line in [text] if text else _lines():
        talk.append({"role": "user", "content": valid_unicode(line)})
        written = template.render(talk).text
        said_back = show(begin(tokenizer.encode_prompt(written, add_special_tokens=False).tolist()))
        talk.append({"role": "assistant", "content": said_back})


def _lines() -> Iterator[str]:
    """Yields the user messages: lines of standard input, with a prompt if that is a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def chosen_template(model: Path, file: Path | None, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Returns the chat template in a file, or else the checkpoint's own; None if it has none. Raises ConfigError."""
    name = Vocabulary(tokenizer).name
    special = {"bos_token": name(tokenizer.bos_id), "eos_token": name(tokenizer.eos_id)}
    return read_chat_template(model, special) if file is None else template_file(file, special)


def chosen_tokenizer(model: Path, path: str | None) -> Tokenizer:
    """Returns the requested tokenizer, or the model's own. Raises ConfigError if there is none."""
    is_run = (model / CHECKPOINTS).is_dir()
    if path is not None:
        return load_tokenizer(path, add_bos_token=True if is_run else None)
    try:
        return own_tokenizer(model)
    except ConfigError as error:
        if is_run or has_tokenizer(model):
            raise
        raise ConfigError(f"{error}, with --tokenizer") from None


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, name: str) -> None:
    """Raises ConfigError if a tokenizer has more tokens than the model."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer {name} has {tokenizer.vocab_size} tokens, but the model's "
            f"vocab_size is {config.vocab_size}: it is another model's"
        )


def _sampling(args: GenerateArgs, stored: GenerationConfig) -> tuple[Sampling, str]:
    """Returns the sampling parameters, and a description with the source of each."""
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
