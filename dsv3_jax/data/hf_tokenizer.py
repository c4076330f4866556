"""Tokenizers from a Hugging Face `tokenizer.json`, with bos and eos from the `tokenizer_config.json` beside it."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors

from dsv3_jax.config import ConfigError
from dsv3_jax.data.token_bytes import bytes_reader
from dsv3_jax.data.tokenizer import EncodingError, valid_unicode
from dsv3_jax.json_input import check_type, one_line, read_json, show

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
"""File in which older versions of transformers wrote the special tokens."""

_USUAL = {
    "bos": (
        "<｜begin▁of▁sentence｜>",
        "<s>",
        "<|begin_of_text|>",
        "<bos>",
        "<|bos|>",
        "<|startoftext|>",
    ),
    "eos": ("<｜end▁of▁sentence｜>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|endoftext|>"),
}


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library.

    Args:
      tokenizer: the library's object, which must not be used elsewhere afterwards.
      config: the fields of a tokenizer_config.json. bos and eos are those that it names, or else the usual names in the
        vocabulary. Without a bos, eos is used for it, as in GPT-2. A prompt begins with bos if `add_bos_token` says so;
        if it is missing, with what tokenizer.json adds before a text.
      name: the name in error messages.

    Raises:
      ConfigError: there is no eos, or bos or eos isn't in the vocabulary.
    """

    def __init__(self, tokenizer: RustTokenizer, config: dict[str, Any], name: str) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._name = name
        tokenizer.encode_special_tokens = True  # as text
        # What inference would need (truncation, padding) may be stored in the file; a corpus wants neither.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Ids may have gaps, so that the number of tokens can be below the largest id.
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < self.vocab_size < 2**31:
            raise ConfigError(
                f"{name} has ids up to {self.vocab_size - 1}: there must be tokens, their ids below 2**31"
            )
        self._eos, self._bos = self._special("eos", name), self._special("bos", name)
        if self._eos is None:
            raise ConfigError(
                f"{name} has no known end-of-document token: name it in a {TOKENIZER_CONFIG} beside it, "
                'as {"eos_token": "..."}'
            )
        self.bos_id, self.eos_id = (self._tokenizer.get_vocab()[token] for token in (self._bos or self._eos, self._eos))

    @classmethod
    def from_file(cls, path: Path, config: dict[str, Any]) -> HuggingFaceTokenizer:
        """Reads a tokenizer.json, and beside it tokenizer_config.json, whose fields `config` overrides.

        Raises ConfigError.
        """
        with _refused(f"{path} is not a Hugging Face {TOKENIZER_JSON}"):
            _check_merges(path.read_bytes())
            tokenizer = RustTokenizer.from_file(str(path))
            tokenizer.encode("a")  # a template without its tokens fails only now
        return cls(tokenizer, read_tokenizer_config(path.parent) | config, str(path))

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with _refused(f"{self._name} can't encode a text", EncodingError):
            encodings = self._tokenizer.encode_batch_fast([valid_unicode(t) for t in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
        with _refused(f"{self._name} can't encode a text", EncodingError):
            tokenizer, before = self._for_prompts
            ids = tokenizer.encode(valid_unicode(text), add_special_tokens=False).ids
        if not add_special_tokens:
            return np.array(ids, np.int32)
        if ids[:1] != [self.bos_id]:  # a chat template's text has its own bos: two would be another prompt
            ids = before + ids
        return np.array(ids or [self.bos_id], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        with _refused(f"{self._name} can't decode ids"):
            return self._tokenizer.decode([int(i) for i in ids if i >= 0], skip_special_tokens=True)

    def token_bytes(self) -> list[bytes]:
        read = bytes_reader(json.loads(self._tokenizer.to_str())["decoder"])
        tokens = (self._tokenizer.id_to_token(i) for i in range(self.vocab_size))
        return [b"" if token is None else read(token) for token in tokens]

    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    def token_id(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def save(self, directory: Path) -> None:
        bos, eos = self._bos or self._eos, self._eos
        written = RustTokenizer.from_str(self._tokenizer.to_str())
        written.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, self.bos_id)])
        written.save(str(directory / TOKENIZER_JSON))
        # Classes of one model's tokenizer would build it anew from its vocabulary instead of reading the file.
        kept = {k: v for k, v in self._config.items() if k not in ("auto_map", "tokenizer_class")}
        fields = {"tokenizer_class": "PreTrainedTokenizerFast"} | kept
        fields |= {"bos_token": bos, "eos_token": eos, "add_bos_token": True}
        (directory / TOKENIZER_CONFIG).write_text(json.dumps(fields, indent=2) + "\n")

    def _special(self, kind: str, name: str) -> str | None:
        declared = declared_token(self._config, kind)
        if declared is not None:
            if self._tokenizer.token_to_id(declared) is None:
                raise ConfigError(f"{kind}_token {declared!r} of {TOKENIZER_CONFIG} is not in {name}")
            return declared
        return next((token for token in _USUAL[kind] if self._tokenizer.token_to_id(token) is not None), None)

    @functools.cached_property
    def _for_prompts(self) -> tuple[RustTokenizer, list[int]]:
        """A tokenizer with special tokens by name, and the tokens before a prompt."""
        tokenizer = RustTokenizer.from_str(self._tokenizer.to_str())
        adds = self._config.get("add_bos_token")
        if adds is not None:
            return tokenizer, [self.bos_id] if adds else []
        whole, text = (tokenizer.encode("a", add_special_tokens=add).ids for add in (True, False))
        extra = range(len(whole) - len(text) + 1)
        return tokenizer, whole[: next((i for i in extra if whole[i : i + len(text)] == text), 0)]


@contextlib.contextmanager
def _refused(what: str, kind: type[ConfigError] = ConfigError) -> Iterator[None]:
    """Turns the library's errors into one of ours. A damaged file may be read, and fail at some texts or ids only."""
    try:
        yield
    except BaseException as error:  # the library raises nothing narrower than Exception, and panics besides
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise kind(f"{what}: {one_line(str(error))[:300]}") from None


def _check_merges(content: bytes) -> None:
    """Checks that second parts of merges begin with `continuing_subword_prefix`, if there is one. Raises ValueError.

    The library cuts it off without looking, and if that isn't between two characters, it ends the process.
    """
    if not re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', content):
        return
    model = json.loads(content).get("model", {})
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges", []):
        second = merge.split(" ")[-1] if isinstance(merge, str) else merge[-1]
        if not second.startswith(prefix):
            raise ValueError(f"the merge {show(merge)} doesn't go on with continuing_subword_prefix, {show(prefix)}")


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """Reads the fields of a directory's tokenizer_config.json, if there is one, with bos and eos as text.

    Raises:
      ConfigError: it isn't JSON, or a field that is used here has the wrong type.
    """
    config: dict[str, Any] = {}
    for path in (directory / SPECIAL_TOKENS_MAP, directory / TOKENIZER_CONFIG):
        if path.exists():
            read = read_json(path, ConfigError)
            _check(read, path)
            kept = {"bos_token", "eos_token"} if path.name != TOKENIZER_CONFIG else set(read)
            config |= {k: v for k, v in read.items() if k in kept and v is not None}
    return config


def declared_token(config: dict[str, Any], kind: str) -> str | None:
    """Returns the text of "bos" or "eos" in a tokenizer_config.json: a string, or the fields of an AddedToken."""
    token = config.get(f"{kind}_token")
    return (token["content"] if isinstance(token, dict) else token) or None


def _check(config: dict[str, Any], path: Path) -> None:
    for kind in ("bos", "eos"):
        token, where = config.get(f"{kind}_token"), f"{path}: {kind}_token"
        if isinstance(token, dict):
            check_type(token.get("content"), str, f"{where}.content", ConfigError)
        else:
            check_type(token, str | None, where, ConfigError)
    check_type(config.get("add_bos_token"), bool | None, f"{path}: add_bos_token", ConfigError)
    check_type(config.get("tokenizer_class"), str | None, f"{path}: tokenizer_class", ConfigError)
    check_type(
        config.get("added_tokens_decoder"),
        dict[str, dict[str, Any]] | None,
        f"{path}: added_tokens_decoder",
        ConfigError,
    )
