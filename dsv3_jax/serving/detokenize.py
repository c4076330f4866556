"""Incremental detokenisation, and splitting of text at marks, both in constant time per token."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from dsv3_jax.data import Tokenizer


class Vocabulary:
    """The bytes that each token of a tokenizer adds to a text.

    Args:
      tokenizer: may have fewer ids than the model; ids beyond add nothing.
      shown: names of special tokens that are part of the text, such as those that mark tool calls.

    Raises:
      ConfigError: text isn't the concatenation of the tokenizer's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Collection[str] = ()) -> None:
        self.bytes = tokenizer.token_bytes()
        named = {name.encode() for name in shown}
        self.special = frozenset(i for i in tokenizer.special_ids() if i < len(self.bytes))
        self.hidden = frozenset(i for i in self.special if self.bytes[i] not in named)

    def name(self, token: int) -> str:
        """Returns the text of a token or, if it isn't UTF-8, `bytes:` and its bytes, as in OpenAI; unique by bytes."""
        data = self.bytes[token] if 0 <= token < len(self.bytes) else b""
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Detokenizer:
    """Decodes tokens one at a time. Incomplete characters are held back.

    Args:
      vocabulary: bytes of the tokens.
      skip_special_tokens: omit special tokens, as the tokenizer's `decode` does.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool = True) -> None:
        self._bytes = vocabulary.bytes
        self._hidden = vocabulary.hidden if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.length = 0
        """Characters that `add` has returned."""

    def add(self, token: int) -> str:
        """Returns the text that this token completes."""
        if token in self._hidden or not 0 <= token < len(self._bytes):
            return ""
        text = self._decoder.decode(self._bytes[token])
        self.length += len(text)
        return text

    def end(self) -> str:
        """Returns the remaining text: U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", True)


class Marks:
    """Splits text that arrives in pieces at the first of several marks.

    The end of a piece that may begin a mark is held back until that is clear.
    """

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> None:
        """Appends the next piece."""
        self._held += text

    def until(self, marks: Sequence[str]) -> tuple[str, str | None]:
        """Returns the text before the first complete mark, and that mark; or text that can't belong to a mark, and
        None.

        Of marks that end at the same character the longest is used. Text after a mark is left for the next call.
        """
        found = [(start + len(mark), start, mark) for mark in marks if (start := self._held.find(mark)) >= 0]
        if found:
            end, start, mark = min(found)
            text, self._held = self._held[:start], self._held[end:]
            return text, mark
        kept = max((_overlap(self._held, mark) for mark in marks), default=0)
        cut = len(self._held) - kept
        text, self._held = self._held[:cut], self._held[cut:]
        return text, None

    def rest(self) -> str:
        """Returns what was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, mark: str) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
