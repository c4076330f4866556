"""`prepare` on the command line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from dsv3_jax.config import ConfigError
from dsv3_jax.data.preparation import PrepareOptions, prepare
from dsv3_jax.data.shards import INDEX, Prepared
from dsv3_jax.data.tokenize import Conversation


@dataclasses.dataclass(frozen=True)
class PrepareArgs:
    """Tokenise texts into a directory that `train --data.source DST` reads, in bounded memory.

    The directory appears when everything is done; after an interruption, the same command continues.
    """

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE... DST")]
    """Files or folders of .txt, .md, .rst, .py, .jsonl (.gz, .zst) and .parquet, "stdlib", or data sets of the Hugging
    Face Hub as OWNER/NAME, OWNER/NAME:CONFIG or OWNER/NAME:CONFIG@SPLIT; and the directory to make."""
    options: Annotated[PrepareOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=PrepareOptions)
    workers: int = os.cpu_count() or 1
    """Number of worker processes."""
    chat: bool = False
    """Sources are JSONL of conversations (`messages`), rendered with the chat template beside the tokenizer; only what
    the assistant writes is a target.
    """
    check: bool = False
    """Compare the shards of DST with the hashes in its index instead."""


def prepare_command(args: PrepareArgs, chat_template: Callable[[str | None], Callable[[], Conversation]]) -> None:
    """Runs `prepare`. chat_template: from a tokenizer's path to a factory of its chat template. Raises ConfigError."""
    *sources, last = args.paths or ("",)
    destination = Path(last)
    if args.check:
        Prepared.open(destination).check_hashes()
        print(f"{destination} is what was written")
        return
    if not sources:
        raise ConfigError("prepare takes one source or more, and then the directory to make")
    if args.workers < 0:
        raise ConfigError(f"workers is {args.workers}: it must not be negative")
    if (destination / INDEX).exists():
        raise ConfigError(f"{destination} holds prepared data already: choose another place or remove it")
    chat = chat_template(args.options.tokenizer) if args.chat else None
    prepare(sources, destination, args.options, workers=args.workers, chat=chat, console=Console())
