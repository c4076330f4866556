"""The tokenizer of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from dsv3_jax.checkpoint.runs import read_config
from dsv3_jax.config import ConfigError
from dsv3_jax.data import Tokenizer, has_tokenizer, load_tokenizer
from dsv3_jax.json_input import check_type


def run_tokenizer(directory: Path) -> Tokenizer:
    """Returns the tokenizer of the run in `directory`. Its prompts begin with bos, as documents do in training.

    It is the run's own copy or, if there is none, the one in its config, or bytes.

    Raises:
      ConfigError: the copy has changed or isn't a tokenizer, or the one in the config doesn't exist.
    """
    file = directory / "config.json"
    data = check_type(read_config(file).get("data", {}), dict[str, Any], f"{file}: data", ConfigError)
    if kept_files(directory) or has_tokenizer(directory):
        return load_tokenizer(directory, add_bos_token=True)
    path = check_type(data.get("tokenizer"), str | None, f"{file}: data.tokenizer", ConfigError)
    try:
        return load_tokenizer(path, add_bos_token=True)
    except ConfigError as error:
        raise ConfigError(
            f"{directory} was trained with the tokenizer {path} and keeps no copy ({error}): copy it into {directory}"
        ) from None


def kept_files(directory: Path) -> dict[str, str]:
    """Returns the names and hashes of a run's tokenizer files, after checking the hashes.

    Raises ConfigError if a file has changed.
    """
    what = f"{directory / 'config.json'}: tokenizer_files"
    found = read_config(directory / "config.json").get("tokenizer_files", {})
    recorded: dict[str, str] = check_type(found, dict[str, str], what, ConfigError)
    for name, digest in recorded.items():
        if Path(name).name != name:
            raise ConfigError(f"{what} names {name!r}: it must be a file's name")
        file = directory / name
        if not file.is_file() or xxhash.xxh3_128_hexdigest(file.read_bytes()) != digest:
            how = "isn't what it was" if file.exists() else "is gone, which was there"
            raise ConfigError(f"{file} {how} when the run began: put the original back (xxh3_128 {digest})")
    return recorded
