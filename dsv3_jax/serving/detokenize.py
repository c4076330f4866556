"""Token ids to text, one at a time, and text cut at marks: both in constant time per token."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from dsv3_jax.data import Tokenizer


class Vocabulary:
    """The bytes that each token of a tokenizer adds to a text.

    Args:
      tokenizer: its ids may be fewer than the model's; ids beyond add nothing.
      shown: names of special tokens that are part of the text, as those that mark tool calls.

    Raises:
      ConfigError: the tokenizer's text isn't made of tokens one after another.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Collection[str] = ()) -> None:
        self.bytes = tokenizer.token_bytes()
        named = {name.encode() for name in shown}
        self.special = frozenset(i for i in tokenizer.special_ids() if i < len(self.bytes))
        self.hidden = frozenset(i for i in self.special if self.bytes[i] not in named)

    def name(self, token: int) -> str:
        """A token's text; where that is no UTF-8, `bytes:` and its bytes, as OpenAI writes them. No two are the same
        unless their bytes are."""
        data = self.bytes[token] if 0 <= token < len(self.bytes) else b""
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Detokenizer:
    """The text of tokens that come one at a time; a character of which bytes are missing waits for them.

    Args:
      vocabulary: bytes of the tokens.
      skip_special_tokens: leave out special tokens, as the tokenizer's `decode` does.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool = True) -> None:
        self._bytes = vocabulary.bytes
        self._hidden = vocabulary.hidden if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that is complete with this token."""
        if token in self._hidden or not 0 <= token < len(self._bytes):
            return ""
        return self._decoder.decode(self._bytes[token])

    def end(self) -> str:
        """The text that remains: U+FFFD if a character never became complete."""
        return self._decoder.decode(b"", True)


class Marks:
    """Text that comes in pieces, cut at the first of some marks, whatever the pieces.

    A piece's end that may be the beginning of a mark is held back until that is clear.
    """

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> None:
        """Takes the next piece."""
        self._held += text

    def until(self, marks: Sequence[str]) -> tuple[str, str | None]:
        """The text before the mark that is complete first, and that mark; or what can't belong to any, and None.

        Of marks that end at the same character the longest counts. What comes after a mark is left for the next call.
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
    """The length of the longest end of `text` that begins `mark`, but isn't all of it."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
