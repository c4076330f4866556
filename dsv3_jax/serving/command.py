"""`python -m dsv3_jax serve`: a model behind an OpenAI-compatible API."""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from dsv3_jax.checkpoint import load_pretrained
from dsv3_jax.checkpoint.remote import fetched
from dsv3_jax.inference.engine import Engine, EngineConfig
from dsv3_jax.inference.generation_config import read_generation_config
from dsv3_jax.inference.text import end_tokens
from dsv3_jax.model.auto import PAGE
from dsv3_jax.serving.generate_command import ParameterDtype, check_tokenizer, chosen_template, chosen_tokenizer
from dsv3_jax.serving.server import Address, Server, bind, run
from dsv3_jax.serving.service import Limits, Service

_KEY = "DSV3_JAX_API_KEY"


@dataclasses.dataclass(frozen=True)
class ServeArgs:
    """Serve a model from a training run, a Hugging Face directory, or a converted checkpoint.

    The API is OpenAI-compatible: completions, and chat with tools and structured output. There are also /metrics,
    /health, and a web page for chatting at /. Ctrl-C or SIGTERM lets running requests finish.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Directory of the run or checkpoint, or a URL, such as gs://bucket/run."""
    host: str = "127.0.0.1"
    """Address to listen on; by default only this machine can connect. 0.0.0.0 means all addresses of this machine."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """API key that requests must send; by default that in the environment variable DSV3_JAX_API_KEY, else none."""
    model_name: str | None = None
    """Name of the model in requests; by default that of the directory."""
    chat_template: Path | None = None
    """File with a Jinja template for conversations; by default the checkpoint's own."""
    tokenizer: str | None = None
    """A tokenizer.json, a tiktoken.model, a folder that contains one, or "bytes"; by default the model's own."""
    grace_seconds: float = 30.0
    """Seconds that running requests have to finish after SIGTERM."""
    dtype: ParameterDtype = "float32"
    """Dtype of the parameters. fp8 keeps the matrices of an FP8 checkpoint in their blocks and multiplies in FP8."""
    check_hashes: bool = True
    """Compare the files of a converted checkpoint or run with their hashes while reading."""
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    limits: Limits = dataclasses.field(default_factory=Limits)


def serve_command(args: ServeArgs) -> None:
    """Runs `python -m dsv3_jax serve`.

    Raises:
      CheckpointError, FileNotFoundError: the checkpoint is damaged or incomplete.
      ConfigError: the directory has no tokenizer, or an option is invalid.
      OSError: the address can't be used.
    """
    args = dataclasses.replace(args, model=fetched(args.model))
    if not args.model.is_dir():
        raise FileNotFoundError(f"{args.model} is no directory: give that of a training run or checkpoint")
    tokenizer = chosen_tokenizer(args.model, args.tokenizer)
    template = chosen_template(args.model, args.chat_template, tokenizer)
    address = Address(args.host, args.port, args.api_key or os.environ.get(_KEY), args.grace_seconds)
    bound = bind(address)  # before what takes long
    model, variables = load_pretrained(args.model, dtype=args.dtype, check_hashes=args.check_hashes)
    check_tokenizer(tokenizer, model.config, args.tokenizer or f"of {args.model}")
    ends = end_tokens(args.model, model.config, tokenizer)
    engine = Engine(model, variables, args.engine, end_ids=ends)
    room = engine.pages.total * PAGE
    _say(
        f"cache of {room:,} tokens, {room * engine.bytes_per_token / 2**30:.2f} GiB; "
        f"texts of up to {engine.max_length:,} tokens, {args.engine.max_batch} at a time, "
        f"{engine.speculation}"
    )
    engine.warm_up(_Progress())
    service = Service(
        engine,
        tokenizer,
        end_ids=ends,
        template=template,
        defaults=read_generation_config(args.model),
        model_name=args.model_name or args.model.resolve().name,
        limits=args.limits,
    )
    chat = "with" if template else "without"
    run(Server(service, address), bound, lambda url: _say(f"{service.model_name} at {url}, {chat} a chat template"))
    _say(str(engine.speculation))  # what was chosen meanwhile


class _Progress:
    """Prints how many programs have been compiled, at most every five seconds."""

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()

    def __call__(self, done: int, count: int) -> None:
        now = time.monotonic()
        if done == count:
            _say(f"{count} programs compiled in {now - self._began:.0f} s")
        elif done and now - self._said > 5:
            left = datetime.timedelta(seconds=round((now - self._began) / done * (count - done)))
            _say(f"compiling: {done} of {count} programs, {left} left")
            self._said = now


def _say(line: str) -> None:
    """Prints a message to standard error."""
    print(line, file=sys.stderr, flush=True)
