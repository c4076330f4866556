"""The tokenizer interface: text <-> token ids."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash


class Tokenizer(Protocol):
    """A tokenizer, as the pipeline and the command line use it."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's vocabulary must be at least as large."""
        ...

    @property
    def bos_id(self) -> int:
        """Token that a document begins with."""
        ...

    @property
    def eos_id(self) -> int:
        """Token that a document ends with."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """(n,) int32, without bos and eos. Text can't forge special tokens: their names are encoded as text.

        Lone surrogates, which a Python string can hold and UTF-8 can't, count as U+FFFD.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores where that helps."""
        ...

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
        """(n,) int32: a text for a model to continue, with what the tokenizer puts before a text, but nothing after.

        Names of special tokens become those tokens, as in transformers. At least one token: bos if there is no other.
        Without `add_special_tokens` nothing is put before the text, and an empty one has no tokens.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, without special tokens. Never fails, whatever the ids."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes that each id below `vocab_size` adds within a text; b"" for an id without a token.

        Special tokens add their names. A character may be spread over several tokens.

        Raises:
          ConfigError: text isn't made of tokens one after another, as in WordPiece.
        """
        ...

    def special_ids(self) -> frozenset[int]:
        """Tokens that `decode` leaves out."""
        ...

    def token_id(self, name: str) -> int | None:
        """The id of a token by its name, or None."""
        ...

    def save(self, directory: Path) -> None:
        """Writes the files by which `load_tokenizer(directory)` and transformers make this tokenizer again.

        Its prompts then begin with bos, as documents do in training.
        """
        ...


def identity(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that make equal tokens of documents, whatever files they come from."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(Path(directory))
        files = [
            path for path in sorted(Path(directory).iterdir()) if path.name in ("tokenizer.json", "tiktoken.model")
        ]
        digest = xxhash.xxh3_128(f"{tokenizer.bos_id} {tokenizer.eos_id} {tokenizer.vocab_size}".encode())
        for path in files:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def valid_unicode(text: str) -> str:
    """`text` with U+FFFD for lone surrogates, which JSON's escapes and a terminal's odd bytes leave in strings."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
