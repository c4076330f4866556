"""Requests of the OpenAI API as dataclasses, parsed from JSON with validated types and ranges.

Fields that default to None may be null or missing. A field's `metadata` has its bounds, which the OpenAPI description
shows too. Unknown fields are ignored, as in other servers, since clients send many.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from dsv3_jax.json_input import check_type, parse_json, show

TokenIds = list[int]


class RequestError(ValueError):
    """An invalid request: a message of one line, the HTTP status, and the field, if any."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


def _field(default: Any = None, *, least: float | None = None, most: float | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"least": least, "most": most})


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """Options for streaming."""

    include_usage: bool = False
    """End with a chunk of token counts."""
    continuous_usage_stats: bool = False
    """Include token counts in every chunk."""


@dataclasses.dataclass(frozen=True)
class StructuredOutputs:
    """Constraints on the text, of which one may be given."""

    json: dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Fields shared by completions and chat."""

    model: str | None = None
    max_tokens: int | None = _field(least=0)
    temperature: float | None = _field(least=0, most=100)
    top_p: float | None = _field(least=0, most=1)
    top_k: int | None = _field(least=-1)
    min_p: float | None = _field(least=0, most=1)
    presence_penalty: float = _field(0.0, least=-2, most=2)
    frequency_penalty: float = _field(0.0, least=-2, most=2)
    repetition_penalty: float = _field(1.0, least=0.01, most=100)
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int = _field(1, least=1)
    best_of: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool = True
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool = False
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    echo: bool = False
    logprobs: int | None = _field(least=0, most=20)
    prompt_logprobs: int | None = _field(least=0, most=20)
    suffix: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = _field(least=0)
    logprobs: bool = False
    top_logprobs: int | None = _field(least=0, most=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """`POST /tokenize`: of a text, or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetokenizeRequest:
    """`POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds


def parse_request[T](kind: type[T], body: bytes) -> T:
    """Parses a request from its body. Raises RequestError, naming the field."""
    return _build(kind, parse_json(body, "the request's body", RequestError), "")


def _build[T](kind: type[T], values: Mapping[str, Any], prefix: str) -> T:
    chosen = {}
    for field, hint in fields_of(kind):
        name, value = prefix + field.name, values.get(field.name)
        nested = nested_kind(hint)
        if value is None:
            if field.default is dataclasses.MISSING:
                raise RequestError(f"{name} is missing", name)
            continue
        error = functools.partial(RequestError, param=name)
        if nested is not None:
            chosen[field.name] = _build(nested, check_type(value, dict[str, Any], name, error), f"{name}.")
            continue
        check_type(value, hint, name, error)
        least, most = field.metadata.get("least"), field.metadata.get("most")
        if (least is not None and value < least) or (most is not None and value > most):
            bounds = f"at least {least:g}" if most is None else f"from {least:g} to {most:g}"
            raise RequestError(f"{name} is {show(value)}: it must be {bounds}", name)
        chosen[field.name] = value
    return kind(**chosen)


def fields_of(kind: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    """Returns the fields of a request's dataclass with their types."""
    hints = _hints(kind)
    return [(field, hints[field.name]) for field in dataclasses.fields(kind)]


def nested_kind(hint: Any) -> Any:
    """Returns the dataclass in `dataclass | None`, if the type has this form."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


# Parts of a chat request whose form isn't that of a field --------------------------------------------------

_Role = Literal["system", "developer", "user", "assistant", "tool"]


def check_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages with text as content. Raises RequestError for content that a template would silently omit."""
    if not messages:
        raise RequestError("messages is empty: it must hold at least one message", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: dict[str, Any], name: str) -> dict[str, Any]:
    def take(field: str, kind: Any) -> Any:
        return check_type(message.get(field), kind, f"{name}.{field}", functools.partial(RequestError, param=name))

    take("role", _Role)
    content = take("content", str | list[dict[str, Any]] | None)
    calls = take("tool_calls", list[dict[str, Any]] | None)
    for field in ("reasoning", "reasoning_content", "name", "tool_call_id"):
        take(field, str | None)
    if content is None and not (message["role"] == "assistant"):
        raise RequestError(f"{name}.content is missing: a message of role {message['role']} has one", name)
    for i, call in enumerate(calls or []):
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{name}.tool_calls[{i}] has no function with a name", name)
        if not isinstance(function.setdefault("arguments", "{}"), str):
            raise RequestError(f"{name}.tool_calls[{i}].function.arguments must be a string of JSON", name)
    return {**message, "content": _plain(content, name) if isinstance(content, list) else content}


def _plain(parts: list[dict[str, Any]], name: str) -> str:
    texts = []
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"{name}.content has a part of type {show(part.get('type'))}: the model reads text, "
                'each part {"type": "text", "text": ...}',
                name,
            )
        texts.append(part["text"])
    return "\n".join(texts)


def chosen_tools(request: ChatRequest) -> tuple[list[dict[str, Any]], bool]:
    """Returns the tools that may be called, and whether one must be. Raises RequestError."""
    tools, choice = request.tools or [], request.tool_choice
    names = [_tool_name(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else choice.get("name")
        if name not in names:
            raise RequestError(f"tool_choice names {show(name)}: it must be one of tools", "tool_choice")
        return [tools[names.index(name)]], True
    if choice not in (None, "none", "auto", "required"):
        raise RequestError(
            f"tool_choice is {show(choice)}: it must be none, auto, required or a function's name", "tool_choice"
        )
    if choice == "required" and not tools:
        raise RequestError("tool_choice is 'required', but there are no tools", "tool_choice")
    return ([] if choice == "none" else tools), choice == "required"


def _tool_name(tool: dict[str, Any], name: str) -> str:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise RequestError(f'{name} must be {{"type": "function", "function": {{...}}}}', name)

    def take(field: str, kind: Any) -> Any:
        refuse = functools.partial(RequestError, param=name)
        return check_type(function.get(field), kind, f"{name}.function.{field}", refuse)

    take("description", str | None)
    take("parameters", dict[str, Any] | None)
    tool_name: str = take("name", str)
    if not 0 < len(tool_name) <= 128 or not tool_name.replace("-", "_").replace(".", "_").isidentifier():
        raise RequestError(f"{name}.function.name is {show(tool_name)}: it must be letters, digits, _, - and .", name)
    return tool_name


def structure(request: Generation) -> tuple[str, Any] | None:
    """Returns the constraint on the text: ("json", schema), ("regex", expression), ("choice", texts), or None.

    Raises RequestError if there are several, or an unsupported one.
    """
    asked: list[tuple[str, Any]] = []
    outputs = request.structured_outputs or StructuredOutputs()
    for kind, values in (
        ("json", (outputs.json, request.guided_json)),
        ("regex", (outputs.regex, request.guided_regex)),
        ("choice", (outputs.choice, request.guided_choice)),
    ):
        asked += [(kind, value) for value in values if value is not None]
    form = request.response_format or {"type": "text"}
    if form.get("type") == "json_object":
        asked.append(("json", {"type": "object"}))
    elif form.get("type") == "json_schema":
        wrapped = form.get("json_schema")
        schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
        if not isinstance(schema, dict):
            raise RequestError("response_format.json_schema.schema is missing: it must be an object", "response_format")
        asked.append(("json", schema))
    elif form.get("type") != "text":
        raise RequestError(
            f"response_format.type is {show(form.get('type'))}: it must be text, json_object or json_schema",
            "response_format",
        )
    if len(asked) > 1:
        raise RequestError("the form of the output is asked for more than once", "response_format")
    if asked and asked[0][0] == "choice" and not asked[0][1]:
        raise RequestError("choice is empty: it must hold at least one text", "structured_outputs")
    return asked[0] if asked else None


def check_supported(request: CompletionRequest | ChatRequest) -> None:
    """Raises RequestError for unsupported fields that would change the answer."""
    refused = []
    if request.best_of not in (None, request.n):
        refused.append(("best_of", "it must be n, or left out"))
    if isinstance(request, CompletionRequest):
        if request.suffix:
            refused.append(("suffix", "text can only be continued"))
        if request.prompt_logprobs is not None:
            refused.append(("prompt_logprobs", "use echo and logprobs"))
    if isinstance(request, ChatRequest):
        if request.functions:
            refused.append(("functions", "use tools"))
        if request.audio or request.modalities not in (None, ["text"]):
            refused.append(("modalities", "the model writes text"))
    for name, why in refused:
        raise RequestError(f"{name} isn't supported: {why}", name)
