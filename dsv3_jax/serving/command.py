"""`python -m dsv3_jax serve`: a model behind an OpenAI-compatible API."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

from dsv3_jax.checkpoint import load_pretrained
from dsv3_jax.inference.engine import Engine, EngineConfig
from dsv3_jax.inference.generation_config import read_generation_config
from dsv3_jax.inference.text import end_tokens
from dsv3_jax.serving.generate_command import check_tokenizer, chosen_template, chosen_tokenizer
from dsv3_jax.serving.server import Address, Server, run
from dsv3_jax.serving.service import Limits, Service

_KEY = "DSV3_JAX_API_KEY"


@dataclasses.dataclass(frozen=True)
class ServeArgs:
    """Serve a model from a training run, a Hugging Face directory, or a converted checkpoint.

    The API is OpenAI's: completions, chat with tools and structured output, and beside it /metrics, /health, and a page
    to chat with at /. Ctrl-C or SIGTERM lets running requests finish.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Directory of the run or checkpoint."""
    host: str = "127.0.0.1"
    """Address to listen on: by default this machine alone reaches it; 0.0.0.0 is every address of this machine."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """Key that requests must send; by default that in the environment variable DSV3_JAX_API_KEY, else none."""
    model_name: str | None = None
    """Name that requests call the model by; by default the directory's."""
    chat_template: Path | None = None
    """File of a Jinja template for conversations; by default the checkpoint's own."""
    tokenizer: str | None = None
    """A tokenizer.json, a tiktoken.model, a folder that holds one, or "bytes"; by default the model's own."""
    grace_seconds: float = 30.0
    """How long running requests may go on after SIGTERM."""
    check_hashes: bool = True
    """Compare the files of a converted checkpoint or a run with their hashes, as they are read."""
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    limits: Limits = dataclasses.field(default_factory=Limits)


def serve_command(args: ServeArgs) -> None:
    """Runs `python -m dsv3_jax serve`.

    Raises:
      CheckpointError, FileNotFoundError: the checkpoint is damaged or incomplete.
      ConfigError: the directory has no tokenizer, or an option isn't possible.
      OSError: the address can't be used.
    """
    if not args.model.is_dir():
        raise FileNotFoundError(f"{args.model} is no directory: give that of a training run or checkpoint")
    tokenizer = chosen_tokenizer(args.model, args.tokenizer)
    template = chosen_template(args.model, args.chat_template, tokenizer)
    model, variables = load_pretrained(args.model, check_hashes=args.check_hashes)
    check_tokenizer(tokenizer, model.config, args.tokenizer or f"of {args.model}")
    ends = end_tokens(args.model, model.config, tokenizer)
    service = Service(
        Engine(model, variables, args.engine, end_ids=ends),
        tokenizer,
        end_ids=ends,
        template=template,
        defaults=read_generation_config(args.model),
        model_name=args.model_name or args.model.resolve().name,
        limits=args.limits,
    )
    key = args.api_key or os.environ.get(_KEY)
    server = Server(service, Address(args.host, args.port, key, args.grace_seconds))
    chat = "with" if template else "without"
    run(
        server, lambda url: print(f"{service.model_name} at {url}, {chat} a chat template", file=sys.stderr, flush=True)
    )
