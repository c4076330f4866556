"""Text <-> token ids: bytes by default, or any Hugging Face `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer as _RustTokenizer

from dsv3_jax.config import ConfigError


class Tokenizer(Protocol):
    """What the pipeline and the command line need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's vocabulary must be at least as large."""
        ...

    @property
    def bos_id(self) -> int:
        """What a document begins with."""
        ...

    @property
    def eos_id(self) -> int:
        """What a document ends with."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """(n,) int32, without bos and eos. Text can't forge special tokens: their names are encoded as text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores where that helps."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, without special tokens. Never fails on ids below `vocab_size`."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; bos, eos and pad follow."""

    bos_id = 256
    eos_id = 257
    pad_id = 258
    vocab_size = 259

    def encode(self, text: str) -> np.ndarray:
        # Lone surrogates, which JSON can hold, have no UTF-8: they become "?".
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        # A sampled sequence may end inside a character or hold no UTF-8 at all.
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json` read by the `tokenizers` library.

    bos and eos are what a `tokenizer_config.json` in the same folder says, or else the usual names that the
    vocabulary holds. Without a bos, eos stands for it, as in GPT-2.

    Raises:
      ConfigError: `path` is missing or no tokenizer, or has no eos.
    """

    _USUAL_BOS = (
        "<｜begin▁of▁sentence｜>",
        "<s>",
        "<|begin_of_text|>",
        "<bos>",
        "<|bos|>",
        "<|startoftext|>",
    )
    _USUAL_EOS = ("<｜end▁of▁sentence｜>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|endoftext|>")

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"no tokenizer at {path}: give the path of a tokenizer.json")
        try:
            self._tokenizer = _RustTokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"{path} is not a Hugging Face tokenizer.json: {error}") from None
        self._tokenizer.encode_special_tokens = True
        # What inference would need (truncation, padding) may be stored in the file; a corpus wants neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have gaps, so that the number of tokens can be below the largest id.
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        declared = _declared_specials(path.with_name("tokenizer_config.json"))
        eos = self._find("eos", declared, self._USUAL_EOS, path)
        if eos is None:
            raise ConfigError(
                f"{path} has no known end-of-document token: name it in a tokenizer_config.json beside it, "
                'as {"eos_token": "..."}'
            )
        self.eos_id: int = eos
        bos = self._find("bos", declared, self._USUAL_BOS, path)
        self.bos_id: int = eos if bos is None else bos

    def _find(self, kind: str, declared: dict[str, str], usual: Sequence[str], path: Path) -> int | None:
        if kind in declared:
            found = self._tokenizer.token_to_id(declared[kind])
            if found is None:
                raise ConfigError(f"{kind}_token {declared[kind]!r} of tokenizer_config.json is not in {path}")
            return found
        return next((i for name in usual if (i := self._tokenizer.token_to_id(name)) is not None), None)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def _declared_specials(path: Path) -> dict[str, str]:
    """{"bos": ..., "eos": ...}, as far as a tokenizer_config.json exists and names them."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        named = {kind: config.get(f"{kind}_token") for kind in ("bos", "eos")}
        # Written as plain text or as the fields of an AddedToken.
        return {k: v["content"] if isinstance(v, dict) else v for k, v in named.items() if v}
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is not a tokenizer_config.json: {error!r}") from None


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """Bytes without a path; else the `tokenizer.json` at `path`, or in the folder `path`. Raises ConfigError."""
    if path is None:
        return ByteTokenizer()
    path = Path(path)
    return HuggingFaceTokenizer(path / "tokenizer.json" if path.is_dir() else path)
