"""Streaming parser of an assistant's text into reasoning, content and tool calls."""

from __future__ import annotations

import dataclasses
import enum
import uuid

from dsv3_jax.serving.detokenize import Marks
from dsv3_jax.serving.tools import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    FENCE,
    FENCE_END,
    FENCED,
    SEPARATOR,
)

THINK, THINK_END = "<think>", "</think>"


@dataclasses.dataclass
class CallDelta:
    """A part of a tool call: the first has the id and name, all append to the arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclasses.dataclass
class Delta:
    """A part of the assistant's message."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)

    def __add__(self, other: Delta) -> Delta:
        """Joins two parts, merging calls of the same index."""
        calls = {call.index: dataclasses.replace(call) for call in self.calls}
        for call in other.calls:
            if call.index in calls:
                calls[call.index].arguments += call.arguments
            else:
                calls[call.index] = dataclasses.replace(call)
        return Delta(self.reasoning + other.reasoning, self.content + other.content, list(calls.values()))


class _State(enum.Enum):
    START, REASONING, CONTENT, BETWEEN_CALLS, HEADER, NAME, ARGUMENTS = range(7)


class AssistantText:
    """Parses the parts of a text that arrives in pieces, independent of where it is split.

    Args:
      thinking: whether the text begins within reasoning opened by the prompt; None if it may open reasoning itself.
      tools: whether to parse tool calls; otherwise they are content.
    """

    def __init__(self, thinking: bool | None, tools: bool) -> None:
        self._state = {None: _State.START, True: _State.REASONING, False: _State.CONTENT}[thinking]
        self._tools, self._marks = tools, Marks()
        self._start = self._header = ""
        self._fenced, self.calls = False, 0

    def add(self, text: str) -> Delta:
        """Returns the parts that the next piece adds."""
        if self._state is _State.START:
            text = self._opened(text)
        self._marks.add(text)
        delta = Delta()
        while self._step(delta):
            pass
        return delta

    def end(self) -> Delta:
        """Returns what was held back, at the end of the text."""
        rest = self._start + self._marks.rest()
        self._start = ""
        match self._state:
            case _State.REASONING:
                return Delta(reasoning=rest)
            case _State.ARGUMENTS:
                return Delta(calls=[CallDelta(self.calls - 1, rest)] if rest else [])
            case _State.HEADER:
                return Delta(content=CALL_BEGIN + self._header + rest)  # cut off before it was a call
            case _State.NAME:
                return Delta(content=CALL_BEGIN + FENCED + SEPARATOR + self._header + rest)
            case _State.BETWEEN_CALLS:
                return Delta()
        return Delta(content=rest)

    def _opened(self, text: str) -> str:
        """Returns the text to pass on, and leaves START, once it is clear whether it begins with `<think>`."""
        self._start += text
        stripped = self._start.lstrip()
        if stripped.startswith(THINK):
            self._state, passed = _State.REASONING, stripped.removeprefix(THINK)
        elif THINK.startswith(stripped):
            return ""
        else:
            self._state, passed = _State.CONTENT, self._start
        self._start = ""
        return passed

    def _step(self, delta: Delta) -> bool:
        """Advances to the next mark in the text so far. Returns whether one was found."""
        match self._state:
            case _State.START:
                return False
            case _State.REASONING:
                text, mark = self._marks.until([THINK_END])
                delta.reasoning += text
                if mark:
                    self._state = _State.CONTENT
            case _State.CONTENT:
                text, mark = self._marks.until([CALLS_BEGIN] if self._tools else [])
                delta.content += text
                if mark:
                    self._state = _State.BETWEEN_CALLS
            case _State.BETWEEN_CALLS:
                _, mark = self._marks.until([CALL_BEGIN, CALLS_END])
                if mark:
                    self._state, self._header = (_State.HEADER if mark == CALL_BEGIN else _State.CONTENT), ""
            case _State.HEADER:
                text, mark = self._marks.until([SEPARATOR, CALL_END])
                self._header += text
                if mark == SEPARATOR and self._header.strip() == FENCED:
                    self._state, self._header = _State.NAME, ""
                elif mark == SEPARATOR:
                    self._begin(delta, fenced=False)
                elif mark == CALL_END:  # no call: nothing says which part is the name
                    delta.content += self._header
                    self._state = _State.BETWEEN_CALLS
            case _State.NAME:
                text, mark = self._marks.until([FENCE])
                self._header += text
                if mark:
                    self._begin(delta, fenced=True)
            case _State.ARGUMENTS:
                text, mark = self._marks.until([FENCE_END + CALL_END, CALL_END] if self._fenced else [CALL_END])
                if text:
                    _add(delta, CallDelta(self.calls - 1, text))
                if mark:
                    self._state = _State.BETWEEN_CALLS
        return mark is not None

    def _begin(self, delta: Delta, fenced: bool) -> None:
        self._state, self._fenced = _State.ARGUMENTS, fenced
        _add(delta, CallDelta(self.calls, "", f"call_{uuid.uuid4().hex[:24]}", self._header.strip()))
        self.calls += 1


def _add(delta: Delta, call: CallDelta) -> None:
    delta.calls = (delta + Delta(calls=[call])).calls
