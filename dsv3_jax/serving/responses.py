"""Responses in the formats of the OpenAI API."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_jax.serving.assistant import Delta
from dsv3_jax.serving.detokenize import Detokenizer, Vocabulary


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token, its log probability (None for the first of a prompt), and the most likely alternatives with theirs."""

    token: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()


@dataclasses.dataclass
class Usage:
    """Token counts of an answer, over all its choices."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    """Tokens of the prompt that were found in the cache."""

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclasses.dataclass(frozen=True)
class Answer:
    """Fields shared by all chunks of an answer, or by the whole answer."""

    kind: str
    """`object` of the JSON."""
    model: str
    prefix: str
    id: str = ""
    created: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.prefix}-{uuid.uuid4().hex}")
        object.__setattr__(self, "created", int(time.time()))

    def json(self, choices: list[dict[str, Any]], usage: Usage | None = None, **more: Any) -> dict[str, Any]:
        answer = {"id": self.id, "object": self.kind, "created": self.created, "model": self.model, "choices": choices}
        return answer | more | ({} if usage is None else {"usage": usage.json()})


def event(value: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"


class Namer:
    """Returns the text of tokens in lists of log probabilities: their own, or `token_id:N`."""

    def __init__(self, vocabulary: Vocabulary, as_ids: bool) -> None:
        self._vocabulary = vocabulary
        self._name: Callable[[int], str] = (lambda token: f"token_id:{token}") if as_ids else vocabulary.name

    def completion(self, scores: Sequence[TokenLogprob], text: Detokenizer) -> dict[str, Any]:
        """Builds the lists of `/v1/completions`. text: of earlier tokens in the answer."""
        offsets = []
        for score in scores:
            offsets.append(text.length)
            text.add(score.token)
        return {
            "tokens": [self._name(score.token) for score in scores],
            "token_logprobs": [_finite(score.logprob) for score in scores],
            "top_logprobs": [
                None  # the token itself is among them in any case, as in OpenAI
                if score.logprob is None
                else {self._name(i): _finite(value) for i, value in (*score.top, (score.token, score.logprob))}
                for score in scores
            ],
            "text_offset": offsets,
        }

    def chat(self, scores: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Builds the list of `/v1/chat/completions`."""
        return {
            "content": [
                {
                    **self._entry(score.token, score.logprob),
                    "top_logprobs": [self._entry(token, value) for token, value in score.top],
                }
                for score in scores
            ]
        }

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self._vocabulary.bytes[token] if token < len(self._vocabulary.bytes) else b""
        return {"token": self._name(token), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float | None) -> float | None:
    """Replaces infinities, which JSON doesn't have, by OpenAI's lowest log probability."""
    return logprob if logprob is None else max(logprob, -9999.0)


def message_delta(delta: Delta) -> dict[str, Any]:
    """Builds a part of the assistant's message for a chunk, with reasoning under both names that clients use."""
    fields: dict[str, Any] = {}
    if delta.reasoning:
        fields |= {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}
    if delta.content:
        fields["content"] = delta.content
    if delta.calls:
        fields["tool_calls"] = [
            {
                "index": call.index,
                **({} if call.id is None else {"id": call.id, "type": "function"}),
                "function": {**({} if call.name is None else {"name": call.name}), "arguments": call.arguments},
            }
            for call in delta.calls
        ]
    return fields


def message(delta: Delta) -> dict[str, Any]:
    """Builds the assistant's whole message."""
    fields: dict[str, Any] = {"role": "assistant", "content": delta.content, "refusal": None}
    if delta.reasoning:
        fields |= {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}
    if delta.calls:
        fields["content"] = delta.content or None
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in delta.calls
        ]
    return fields
