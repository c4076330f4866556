"""`POST /v1/chat/completions`: the assistant's next message, with its reasoning and tool calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from dsv3_jax.serving.assistant import AssistantText, Delta
from dsv3_jax.serving.grammar import Grammar
from dsv3_jax.serving.protocol import (
    ChatRequest,
    RequestError,
    check_messages,
    check_supported,
    chosen_tools,
    structure,
)
from dsv3_jax.serving.responses import DONE, Answer, Namer, Usage, event, message, message_delta
from dsv3_jax.serving.service import Piece, Service, merge, start_all


class ChatCompletion:
    """One request for the assistant's next message.

    Raises:
      RequestError: the request is invalid.
    """

    def __init__(self, service: Service, request: ChatRequest) -> None:
        check_supported(request)
        self._service, self._request = service, request
        tools, must_call = chosen_tools(request)
        messages = check_messages(request.messages)
        service.check_count(request.n)
        prompt = service.render(
            messages,
            tools,
            add_generation_prompt=request.add_generation_prompt and not request.continue_final_message,
            continue_final_message=request.continue_final_message,
            extra=request.chat_template_kwargs,
        )
        ids = service.encode(prompt.text, bool(request.add_special_tokens))
        thinking = prompt.thinking is True
        grammar: Grammar | None
        if must_call:
            if structure(request) is not None:
                raise RequestError("response_format and a required tool call exclude each other", "response_format")
            grammar = service.tool_grammar(tools, several=request.parallel_tool_calls, thinking=thinking)
        else:
            grammar = service.grammar(request, thinking=thinking)
        top = (request.top_logprobs or 0) if request.logprobs else None
        if request.top_logprobs is not None and not request.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
        options = service.options(request, limit=request.max_completion_tokens, grammar=grammar)
        self._choices = [
            service.choice(ids, options, seed_offset=i, logprobs=top, prompt_logprobs=None) for i in range(request.n)
        ]
        self._texts = [AssistantText(prompt.thinking, bool(tools)) for _ in self._choices]
        self._namer = Namer(service.vocabulary, request.return_tokens_as_token_ids)
        self._usage = Usage(prompt=len(ids))

    def start(self) -> None:
        """Submits the texts to the engine. Raises RequestError if it rejects them, Busy if there is no room."""
        self._service.check_count(len(self._choices))
        start_all(self._choices)

    async def whole(self) -> dict[str, Any]:
        """Returns the whole answer."""
        pieces, deltas = [Piece() for _ in self._choices], [Delta() for _ in self._choices]
        async for i, piece in merge([choice.pieces() for choice in self._choices]):
            pieces[i] += piece
            deltas[i] += self._delta(i, piece)
        answer = Answer("chat.completion", self._service.model_name, "chatcmpl")
        entries = [
            {"index": i, "message": message(delta), **self._rest(i, piece)}
            for i, (piece, delta) in enumerate(zip(pieces, deltas, strict=True))
        ]
        return answer.json(entries, self._count())

    async def events(self) -> AsyncIterator[str]:
        """Streams the answer as server-sent events: the role first, then parts of the message."""
        answer = Answer("chat.completion.chunk", self._service.model_name, "chatcmpl")
        options = self._request.stream_options
        always = self._count if options and options.continuous_usage_stats else lambda: None
        for i in range(len(self._choices)):
            first = {"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            yield event(answer.json([first], always()))
        async for i, piece in merge([choice.pieces() for choice in self._choices]):
            delta = self._delta(i, piece)
            if delta or piece.scores or piece.finish_reason:
                entry = {"index": i, "delta": message_delta(delta), **self._rest(i, piece)}
                yield event(answer.json([entry], always()))
        if options and options.include_usage:
            yield event(answer.json([], self._count()))
        yield DONE

    def close(self) -> None:
        """Cancels unfinished texts."""
        for choice in self._choices:
            choice.cancel()

    def _delta(self, i: int, piece: Piece) -> Delta:
        delta = self._texts[i].add(piece.text)
        if piece.finish_reason:
            delta += self._texts[i].end()
        if not self._request.parallel_tool_calls:
            delta.calls = [call for call in delta.calls if call.index == 0]
        return delta

    def _rest(self, i: int, piece: Piece) -> dict[str, Any]:
        """Returns the fields of a choice besides its text."""
        called = piece.finish_reason == "stop" and self._texts[i].calls
        return {
            "logprobs": self._namer.chat(piece.scores) if self._request.logprobs else None,
            "finish_reason": "tool_calls" if called else piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def _count(self) -> Usage:
        self._usage.completion = sum(choice.generated for choice in self._choices)
        self._usage.cached = self._choices[0].cached
        return self._usage
