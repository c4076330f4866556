"""`generation_config.json` of a released checkpoint: sampling parameters and end tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint.runs import CHECKPOINTS
from dsv3_jax.config import ConfigError
from dsv3_jax.json_input import check_type, read_json

GENERATION_CONFIG = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Sampling parameters and end tokens in the file; None if missing."""

    temperature: float | None = None
    """0 if the file specifies greedy decoding (`do_sample` false)."""
    top_k: int | None = None
    top_p: float | None = None
    end_ids: tuple[int, ...] | None = None
    """Tokens that end a text (`eos_token_id`)."""


def read_generation_config(directory: Path) -> GenerationConfig:
    """Reads a directory's generation_config.json; empty if there is none, or for a training run.

    Raises:
      ConfigError: it isn't JSON, or a field has the wrong type or range.
    """
    path = directory / GENERATION_CONFIG
    if not path.exists() or (directory / CHECKPOINTS).is_dir():
        return GenerationConfig()
    fields = read_json(path, ConfigError)

    def take(name: str, kind: Any) -> Any:
        return check_type(fields.get(name), kind | None, f"{path}: {name}", ConfigError)

    temperature, top_k, top_p = take("temperature", float), take("top_k", int), take("top_p", float)
    ends = take("eos_token_id", int | list[int])
    for name, value, possible in (
        ("temperature", temperature, temperature is None or temperature >= 0),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1),
    ):
        if not possible:
            raise ConfigError(f"{path}: {name} is {value!r}, which is out of range")
    return GenerationConfig(
        temperature=0.0 if take("do_sample", bool) is False else temperature,
        top_k=None if top_k is None or top_k < 1 else top_k,  # 0 and -1 are ways to say "all"
        top_p=top_p,
        end_ids=ends if ends is None else tuple(ends) if isinstance(ends, list) else (ends,),
    )
