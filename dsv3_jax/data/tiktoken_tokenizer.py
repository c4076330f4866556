"""The `tiktoken.model` of Moonlight and Kimi, read by the tiktoken library.

Such a file contains only the ranks of a BPE. The pattern that splits text into words and the ids of special tokens are
in the Python file that comes with it, `tokenization_moonshot.py` or `tokenization_kimi.py`; they are the same in both,
and are repeated here, since code from checkpoints isn't executed.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data.hf_tokenizer import TOKENIZER_CONFIG, TOKENIZER_JSON, declared_token, read_tokenizer_config
from dsv3_jax.data.tokenizer import valid_unicode
from dsv3_jax.json_input import one_line

TIKTOKEN_MODEL = "tiktoken.model"

_KNOWN = ("tokenization_moonshot.TikTokenTokenizer", "tokenization_kimi.TikTokenTokenizer")

_UPPER, _LOWER = (rf"[\p{{{first}}}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for first in (r"Lu}\p{Lt", "Ll"))
_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

_SPECIAL_TOKENS = 256
"""Number of ids after the ranks. The original code has two more, without names and beyond the models' vocabularies."""

_CHUNK, _RUN = 400_000, 25_000
"""In characters, as in the original code: text is split into chunks, and within longer runs of spaces or non-spaces."""


class TiktokenTokenizer:
    """A `tiktoken.model`, and the names of its special tokens from the tokenizer_config.json beside it.

    Args:
      path: of the file.
      config: the fields of the tokenizer_config.json.

    bos and eos are `[BOS]` and `[EOS]` unless that file says otherwise. A prompt begins with bos only if
    `add_bos_token` says so.

    Raises:
      ConfigError: the file can't be read, is of another model, or the tiktoken library isn't installed.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        try:
            import tiktoken
        except ImportError:
            raise ConfigError(
                f"reading {path} needs the tiktoken library: pip install tiktoken, or give a {TOKENIZER_JSON}"
            ) from None
        self._path, self._config = path, config
        _check_kind(path, config)
        ranks = _read_ranks(path)
        if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
            raise ConfigError(f"{path} is not a {TIKTOKEN_MODEL}: every byte must be in it, ranks one after another")
        special = _special_tokens(len(ranks), self._config)
        try:
            self._encoding = tiktoken.Encoding(
                name=str(path), pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=special
            )
        except ValueError as error:  # names of special tokens that are too long
            raise ConfigError(f"{path} can't be used: {one_line(str(error))[:200]}") from None
        self._ordinary, self.vocab_size = len(ranks), len(ranks) + _SPECIAL_TOKENS
        self.bos_id, self.eos_id = (_special_id(kind, special, self._config, path) for kind in ("bos", "eos"))

    @classmethod
    def from_file(cls, path: Path, config: dict[str, Any]) -> TiktokenTokenizer:
        """Reads a tiktoken.model, and beside it tokenizer_config.json, whose fields `config` overrides."""
        return cls(path, read_tokenizer_config(path.parent) | config)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces = [list(_pieces(valid_unicode(text))) for text in texts]
        encoded = iter(self._encoding.encode_ordinary_batch([piece for text in pieces for piece in text]))
        return [np.array([i for _ in text for i in next(encoded)], np.int32) for text in pieces]

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
        pieces = _pieces(valid_unicode(text))
        ids = [i for piece in pieces for i in self._encoding.encode(piece, allowed_special="all")]
        if not add_special_tokens:
            return np.array(ids, np.int32)
        before = [self.bos_id] if self._config.get("add_bos_token") and ids[:1] != [self.bos_id] else []
        return np.array(before + ids or [self.bos_id], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._encoding.decode([int(i) for i in ids if 0 <= i < self._ordinary])

    def token_bytes(self) -> list[bytes]:
        return [self._encoding.decode_single_token_bytes(i) for i in range(self.vocab_size)]

    def special_ids(self) -> frozenset[int]:
        return frozenset(range(self._ordinary, self.vocab_size))

    def token_id(self, name: str) -> int | None:
        try:
            return self._encoding.encode_single_token(name)
        except KeyError:
            return None

    def save(self, directory: Path) -> None:
        for file in (self._path, *self._path.parent.glob("tokenization_*.py")):
            shutil.copyfile(file, directory / file.name)
        fields = self._config | {"add_bos_token": True}
        (directory / TOKENIZER_CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Reads lines of a token in base64 and its rank.

    tiktoken's own reader keeps a copy in the machine's temporary folder under the name of the path, and returns the
    copy when the file has changed.
    """
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token)] = int(rank)
        except ValueError:
            raise ConfigError(
                f"{path} is not a {TIKTOKEN_MODEL}: line {number} isn't a token in base64 and its rank"
            ) from None
    return ranks


def _check_kind(path: Path, config: dict[str, Any]) -> None:
    """Rejects files unless their pattern is known to be the one above: another would silently give other tokens."""
    classes = config.get("auto_map", {})
    classes = classes.get("AutoTokenizer") if isinstance(classes, dict) else None
    named = [str(c).rpartition("--")[2] for c in (classes if isinstance(classes, list) else [classes]) if c]
    if not set(named) & set(_KNOWN):
        raise ConfigError(
            f"{path} can be read only as Moonlight's and Kimi's, but auto_map.AutoTokenizer in "
            f"{path.with_name(TOKENIZER_CONFIG)} is {', '.join(named) or 'missing'}, and not {' or '.join(_KNOWN)}: "
            f"give a {TOKENIZER_JSON}"
        )


def _special_tokens(first: int, config: dict[str, Any]) -> dict[str, int]:
    """Names the ids after the ranks as in `added_tokens_decoder`; others are reserved tokens."""
    named = {key: token.get("content") for key, token in (config.get("added_tokens_decoder") or {}).items()}
    places = range(first, first + _SPECIAL_TOKENS)
    return {str(named.get(str(i)) or f"<|reserved_token_{i}|>"): i for i in places}


def _special_id(kind: str, special: dict[str, int], config: dict[str, Any], path: Path) -> int:
    name = declared_token(config, kind) or f"[{kind.upper()}]"
    if name not in special:
        raise ConfigError(
            f"{kind}_token {name!r} is none of {path}'s special tokens: "
            f"{path.with_name(TOKENIZER_CONFIG)} must list it in added_tokens_decoder, as [BOS] and [EOS] are"
        )
    return special[name]


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), _CHUNK):
        chunk = text[start : start + _CHUNK]
        cuts = [0]
        for run in re.finditer(rf"\s{{{_RUN + 1},}}|\S{{{_RUN + 1},}}", chunk):
            cuts += range(run.start() + _RUN, run.end(), _RUN)
        yield from (chunk[i:j] for i, j in zip(cuts, [*cuts[1:], len(chunk)], strict=True))
