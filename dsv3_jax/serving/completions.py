"""`POST /v1/completions`: texts or token ids, continued, and scored with `echo` and `logprobs`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from dsv3_jax.serving.detokenize import Detokenizer
from dsv3_jax.serving.protocol import CompletionRequest, RequestError, check_supported
from dsv3_jax.serving.responses import DONE, Answer, Namer, Usage, event
from dsv3_jax.serving.service import Choice, Piece, Service, merge, start_all

_DEFAULT_TOKENS = 16


class Completion:
    """One request to continue prompts.

    Raises:
      RequestError: the request is invalid.
    """

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        check_supported(request)
        self._service, self._request = service, request
        self._answer = Answer("text_completion", service.model_name, "cmpl")
        self._namer = Namer(service.vocabulary, request.return_tokens_as_token_ids)
        self._usage = Usage()
        prompts = self._prompts()
        service.check_count(len(prompts) * request.n)
        scored = request.logprobs if request.echo and request.logprobs is not None else None
        options = service.options(request, default_tokens=_DEFAULT_TOKENS)
        self._choices = [
            service.choice(prompt, options, seed_offset=i, logprobs=request.logprobs, prompt_logprobs=scored)
            for prompt in prompts
            for i in range(request.n)
        ]
        self._usage.prompt = sum(map(len, prompts))
        self._echoed = self._echoes(prompts) if request.echo else [""] * len(prompts)
        # Of each choice: the text before the next token, for `text_offset`.
        self._before = [Detokenizer(service.vocabulary, request.skip_special_tokens) for _ in self._choices]

    def _prompts(self) -> list[list[int]]:
        prompt = self._request.prompt
        listed: Any = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not listed:
            raise RequestError("prompt is empty: it must hold at least one text or token", "prompt")
        adds = self._request.add_special_tokens is not False
        return [self._service.encode(p, adds) if isinstance(p, str) else self._service.check_ids(p) for p in listed]

    def _echoes(self, prompts: list[list[int]]) -> list[str]:
        """Returns each prompt for `echo`: as given, or the text of its tokens."""
        given = self._request.prompt
        texts: list[Any] = [given] if isinstance(given, str) else list(given)
        return [
            texts[i] if isinstance(texts[i % len(texts)], str) else self._service.tokenizer.decode(prompt)
            for i, prompt in enumerate(prompts)
        ]

    def start(self) -> None:
        """Submits the texts to the engine. Raises RequestError if it rejects them, Busy if there is no room."""
        self._service.check_count(len(self._choices))
        start_all(self._choices)

    async def whole(self) -> dict[str, Any]:
        """Returns the whole answer."""
        pieces = [Piece() for _ in self._choices]
        async for i, piece in merge([choice.pieces() for choice in self._choices]):
            pieces[i] += piece
        return self._answer.json([self._entry(i, piece, begun=False) for i, piece in enumerate(pieces)], self._count())

    async def events(self) -> AsyncIterator[str]:
        """Streams the answer as server-sent events."""
        options = self._request.stream_options
        always = self._count if options and options.continuous_usage_stats else lambda: None
        begun = [False] * len(self._choices)
        async for i, piece in merge([choice.pieces() for choice in self._choices]):
            if piece or not begun[i]:
                yield event(self._answer.json([self._entry(i, piece, begun=begun[i])], always()))
                begun[i] = True
        if options and options.include_usage:
            yield event(self._answer.json([], self._count()))
        yield DONE

    def close(self) -> None:
        """Cancels unfinished texts."""
        for choice in self._choices:
            choice.cancel()

    def _count(self) -> Usage:
        self._usage.completion = sum(choice.generated for choice in self._choices)
        self._usage.cached = sum(choice.cached for choice in self._choices[:: self._request.n])
        return self._usage

    def _entry(self, i: int, piece: Piece, *, begun: bool) -> dict[str, Any]:
        choice: Choice = self._choices[i]
        scores, text = list(piece.scores), piece.text
        if self._request.echo and not begun:
            scores, text = [*choice.prompt_scores, *scores], self._echoed[i // self._request.n] + text
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = self._namer.completion(scores, self._before[i])
        return {
            "index": i,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
