"""The tokenizer that a training run was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.config import ConfigError
from dsv3_jax.data import Tokenizer, has_tokenizer, load_tokenizer
from dsv3_jax.json_input import check_type, read_json


def run_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of the run in `directory`; its prompts begin with bos, as documents do in training.

    It is the run's own copy; of a run that kept none, what its config names, or bytes.

    Raises:
      CheckpointError: the copy isn't what it was, or there is none and the one that the config names isn't there.
      ConfigError: the files are no tokenizer.
    """
    file = directory / "config.json"
    config = read_json(file, CheckpointError)
    if kept_files(directory, config) or has_tokenizer(directory):
        return load_tokenizer(directory, add_bos_token=True)
    data = check_type(config.get("data", {}), dict[str, Any], f"{file}: data", CheckpointError)
    path = check_type(data.get("tokenizer"), str | None, f"{file}: data.tokenizer", CheckpointError)
    try:
        return load_tokenizer(path, add_bos_token=True)
    except ConfigError as error:
        raise CheckpointError(
            f"{directory} was trained with the tokenizer {path} and keeps no copy ({error}): copy it into {directory}"
        ) from None


def kept_files(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """The tokenizer files of a run's directory by their names, with their hashes, which are compared.

    Raises CheckpointError if a file isn't what it was when the run began.
    """
    what = f"{directory / 'config.json'}: tokenizer_files"
    recorded: dict[str, str] = check_type(config.get("tokenizer_files", {}), dict[str, str], what, CheckpointError)
    for name, digest in recorded.items():
        if Path(name).name != name:
            raise CheckpointError(f"{what} names {name!r}: it must be a file's name")
        file = directory / name
        if not file.is_file() or xxhash.xxh3_128_hexdigest(file.read_bytes()) != digest:
            raise CheckpointError(
                f"{file} {'is not what it was' if file.exists() else 'is gone, which was there'} when the run began: "
                f"put the original back (xxh3_128 {digest})"
            )
    return recorded
