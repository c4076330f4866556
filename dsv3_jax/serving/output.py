"""The output text of one request, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from dsv3_jax.serving.detokenize import Detokenizer, Marks, Vocabulary


class TextOutput:
    """Turns tokens into text that can be shown immediately. Text that may begin a stop string is held back.

    Args:
      vocabulary: the tokens' bytes.
      stops: texts that end the output, at the first one to be complete.
      include_stop: whether the stop string is part of the text.
      skip_special_tokens: whether special tokens are left out.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = Detokenizer(vocabulary, skip_special_tokens)
        self._marks, self._stops, self._include = Marks(), list(stops), include_stop
        self.stopped: str | None = None
        """The stop string that was found."""

    def add(self, token: int) -> str:
        """Returns the text that can be shown after this token; empty after a stop string."""
        return self._cut(self._detokenizer.add(token))

    def end(self) -> str:
        """Returns the remaining text when there are no more tokens."""
        text = self._cut(self._detokenizer.end())
        return text + (self._marks.rest() if self.stopped is None else "")

    def _cut(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        self._marks.add(text)
        text, self.stopped = self._marks.until(self._stops)
        return text + self.stopped if self.stopped is not None and self._include else text
