"""Requests to the engine and their results.

A result goes from the engine's thread to its caller's. To wake an event loop takes longer than all else that is done
for a token, so one call brings all results that are there, and a caller who is behind gets several steps as one.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import queue
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

import numpy as np

from dsv3_jax.inference.sampling import Sampling

Score = tuple[int, float | None, list[tuple[int, float]]]
"""A token, its log-probability (None for the first of a prompt), and those of the most likely tokens."""


class Grammar(Protocol):
    """A constraint on a text, token by token. Where it can't go on, `mask` and `accept` raise ValueError."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete."""
        ...

    def mask(self) -> np.ndarray:
        """Returns the allowed next tokens as bits of an array of integers, lowest bit first."""
        ...

    def accept(self, token: int) -> None:
        """Advances by a token."""
        ...


@dataclasses.dataclass
class Step:
    """Tokens of one request from one step of the engine.

    logprobs: of the tokens, if requested. prompt_logprobs: of the prompt's tokens, with the first step. cached_tokens:
    number of prompt tokens found in the cache. finish_reason: with the last step, "stop", "length" or "cancelled".
    stop_token: the token that ended the text, the last of `tokens`. error: with the last step, if the request failed.
    """

    tokens: list[int]
    logprobs: list[Score] | None = None
    prompt_logprobs: list[Score] | None = None
    cached_tokens: int = 0
    finish_reason: str | None = None
    stop_token: int | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether this is the last step."""
        return self.finish_reason is not None or self.error is not None

    def __add__(self, later: Step) -> Step:
        """Returns both as one step."""
        return dataclasses.replace(
            later,
            tokens=self.tokens + later.tokens,
            logprobs=self.logprobs if later.logprobs is None else (self.logprobs or []) + later.logprobs,
            prompt_logprobs=self.prompt_logprobs if later.prompt_logprobs is None else later.prompt_logprobs,
        )


class _Mailbox:
    """Steps on their way from an engine's thread to the queues of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._steps: collections.deque[tuple[asyncio.Queue[Step], Step]] = collections.deque()
        self._called = False

    def put(self, to: asyncio.Queue[Step], step: Step) -> None:
        self._steps.append((to, step))
        if not self._called and (loop := self._loop()) is not None:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop is closed, perhaps at this moment
                loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        self._called = False  # before the last look, so that a step that comes now is either seen or calls again
        while self._steps:
            to, step = self._steps.popleft()
            to.put_nowait(step)


_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = weakref.WeakKeyDictionary()


class Request:
    """A request. Iterate over its steps with `for` or, if it was submitted in an event loop, `async for`."""

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        *,
        seed: int,
        max_new_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
        grammar: Grammar | None,
    ) -> None:
        self.prompt, self.sampling, self.seed, self.max_new_tokens = prompt, sampling, seed, max_new_tokens
        self.logprobs, self.prompt_logprobs, self.grammar = logprobs, prompt_logprobs, grammar
        self.cancelled = False
        self.text: list[int] = []
        """Tokens so far."""
        self.cached: int = 0
        self.prompt_scores: list[Score] = []
        self.was_scored = False
        self.takes_drafts = True
        """False once a step with drafts wasn't finite: the text restarts without, which shows if its tokens are."""
        self._mailbox: _Mailbox | None = None
        self._steps: Any = queue.SimpleQueue[Step]()
        with contextlib.suppress(RuntimeError):  # there is no event loop
            loop = asyncio.get_running_loop()
            self._mailbox, self._steps = _mailboxes.setdefault(loop, _Mailbox(loop)), asyncio.Queue[Step]()

    @property
    def constrained(self) -> bool:
        """Whether the host needs each token before the next can be drawn."""
        return self.sampling.edits or self.grammar is not None

    def put(self, step: Step) -> None:
        """Delivers a step to the caller, from the engine's thread."""
        if self._mailbox is None:
            self._steps.put(step)
        else:
            self._mailbox.put(self._steps, step)

    def __iter__(self) -> Iterator[Step]:
        while True:
            step = self._steps.get()
            yield step
            if step.ended:
                return

    async def __aiter__(self) -> AsyncIterator[Step]:
        while True:
            step = await self._steps.get()
            while not self._steps.empty():
                later = self._steps.get_nowait()
                if later.error is not None:  # the tokens before are good
                    yield step
                    step = later
                else:
                    step += later
            yield step
            if step.ended:
                return


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts of an engine since its start, and its current state.

    running, waiting: requests. cache_usage: fraction of pages in use. preemptions: requests that lost their pages and
    restarted. prefix_queries, prefix_hits: tokens of prompts that were looked up in the cache, and found.
    drafts: verifications of drafts; draft_tokens, accepted_tokens: their tokens; accepted_per_position: by position
    among the drafts. drafts_up_to: number of texts up to which drafts are used, None if not measured yet.
    steps: decoding steps. tokens: generated. programs: number of compiled shapes.
    """

    running: int = 0
    waiting: int = 0
    cache_usage: float = 0.0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()
    drafts_up_to: int | None = None
    steps: int = 0
    tokens: int = 0
    programs: int = 0
