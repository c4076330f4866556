"""The tokenizer interface: text <-> token ids."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from dsv3_jax.config import ConfigError


class EncodingError(ConfigError):
    """A tokenizer's library fails at a text. Its file may be damaged, but other texts can be encoded."""


class Tokenizer(Protocol):
    """The tokenizer protocol of the pipeline and the command line."""

    @property
    def vocab_size(self) -> int:
        """The largest id plus one; a model's vocabulary must be at least as large."""
        ...

    @property
    def bos_id(self) -> int:
        """Token at the beginning of a document."""
        ...

    @property
    def eos_id(self) -> int:
        """Token at the end of a document."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Encodes text to (n,) int32, without bos and eos. Names of special tokens are encoded as ordinary text.

        Lone surrogates, which Python strings allow but UTF-8 doesn't, become U+FFFD. Raises EncodingError.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes each text, on all cores if that helps."""
        ...

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
        """Encodes a prompt to (n,) int32, with the tokens that the tokenizer adds before a text, but none after.

        Names of special tokens become those tokens, as in transformers. There is at least one token, bos if necessary.
        Without `add_special_tokens` nothing is added, and an empty text has no tokens. Raises EncodingError.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decodes `ids` to text without special tokens. Accepts any ids. Raises ConfigError if its file is damaged."""
        ...

    def token_bytes(self) -> list[bytes]:
        """Returns the UTF-8 bytes that each id below `vocab_size` adds within a text; b"" for an id without a token.

        Special tokens add their names. A character may span several tokens.

        Raises:
          ConfigError: text isn't the concatenation of its tokens, as in WordPiece.
        """
        ...

    def special_ids(self) -> frozenset[int]:
        """Tokens that `decode` omits."""
        ...

    def token_id(self, name: str) -> int | None:
        """Returns the id of a token by name, or None."""
        ...

    def save(self, directory: Path) -> None:
        """Writes files from which `load_tokenizer(directory)` and transformers load an equal tokenizer.

        Its prompts begin with bos, as documents do in training.
        """
        ...


def identity(tokenizer: Tokenizer) -> str:
    """A fingerprint that is equal for tokenizers that encode documents equally, whatever their files."""
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
    """Replaces lone surrogates, from JSON escapes or invalid bytes on a terminal, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
