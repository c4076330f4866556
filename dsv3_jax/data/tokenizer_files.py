"""Tokenizers by path: bytes, a `tokenizer.json`, a `tiktoken.model`, or a folder that contains one."""

from __future__ import annotations

from pathlib import Path

from dsv3_jax.config import ConfigError
from dsv3_jax.data.byte_tokenizer import ByteTokenizer
from dsv3_jax.data.hf_tokenizer import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, TOKENIZER_JSON, HuggingFaceTokenizer
from dsv3_jax.data.tiktoken_tokenizer import TIKTOKEN_MODEL, TiktokenTokenizer
from dsv3_jax.data.tokenizer import Tokenizer

BYTES = "bytes"
CHAT_TEMPLATE = "chat_template.jinja"
"""File in which newer versions of transformers write the chat template, formerly in tokenizer_config.json."""
BESIDE_TOKENIZER = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, CHAT_TEMPLATE)
"""Companion files of a tokenizer."""
TOKENIZER_FILES = (TOKENIZER_JSON, TIKTOKEN_MODEL, *BESIDE_TOKENIZER)
"""Files of a tokenizer that runs and prepared data store, under the names in Hugging Face checkpoints."""

_NAMES = (TOKENIZER_JSON, TIKTOKEN_MODEL)
_ELSEWHERE = {
    "tokenizer.model": "SentencePiece",
    "spiece.model": "SentencePiece",
    "vocab.json": "the older format, of two files",
    "vocab.txt": "WordPiece",
}
"""Unsupported tokenizer formats, which transformers can convert to tokenizer.json."""


def load_tokenizer(path: str | Path | None = None, *, add_bos_token: bool | None = None) -> Tokenizer:
    """Loads a tokenizer: bytes for None or "bytes", else from a file or folder.

    Args:
      path: a `tokenizer.json` or `tiktoken.model`, or a folder that contains one; `tokenizer_config.json` beside it
        names bos and eos.
      add_bos_token: whether prompts begin with bos; by default as in the files.

    Raises:
      ConfigError: the file doesn't exist, can't be read, or has no end-of-document token.
    """
    if path is None or str(path) == BYTES:
        return ByteTokenizer()
    path = Path(path)
    file = _file_in(path) if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"no tokenizer at {file}: give the path of a {TOKENIZER_JSON}, or {BYTES!r}")
    read = TiktokenTokenizer.from_file if file.name == TIKTOKEN_MODEL else HuggingFaceTokenizer.from_file
    return read(file, {} if add_bos_token is None else {"add_bos_token": add_bos_token})


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory contains a tokenizer for `load_tokenizer`."""
    return any((directory / name).is_file() for name in _NAMES)


def tokenizer_sources(path: str | Path | None) -> dict[str, Path]:
    """Maps names of copies to the files of the tokenizer at `path`, a file or folder. Empty for bytes."""
    if path is None or str(path) == BYTES:
        return {}
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    found = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if path.is_dir():
        return found
    beside = {name: file for name, file in found.items() if name in BESIDE_TOKENIZER}
    return {TIKTOKEN_MODEL if path.name == TIKTOKEN_MODEL else TOKENIZER_JSON: path} | beside


def _file_in(directory: Path) -> Path:
    for name in _NAMES:
        if (directory / name).is_file():
            return directory / name
    for name, kind in _ELSEWHERE.items():
        if (directory / name).is_file():
            raise ConfigError(
                f"{directory} has no {TOKENIZER_JSON}, only {name} ({kind}), which isn't read here: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers makes the one of the other"
            )
    raise ConfigError(
        f"no tokenizer in {directory} (neither {TOKENIZER_JSON} nor {TIKTOKEN_MODEL}): give the path of one, "
        f"or {BYTES!r} if tokens are bytes"
    )
