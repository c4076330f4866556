"""The server's OpenAPI description, generated from the request dataclasses."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from dsv3_jax.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenIds,
    TokenizeRequest,
    fields_of,
    nested_kind,
)

_POSTS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_GETS = ("/v1/models", "/health", "/tokenizer_info", "/metrics")
_ERRORS = {
    "400": "The request can't be fulfilled; `error.message` says why",
    "401": "The API key is missing or wrong",
    "404": "There is no such model",
    "413": "The request is too large",
    "429": "Too many requests are waiting",
    "503": "The server is stopping",
}


_KEYWORDS: dict[str, dict[str, Any]] = {
    "choice": {"minItems": 1},
    "guided_choice": {"minItems": 1},
    "messages": {"minItems": 1},
    "modalities": {"const": ["text"]},
}
"""JSON schema of what a field must be besides its type and bounds."""


def openapi() -> dict[str, Any]:
    """Returns the description, in OpenAPI 3.1."""
    failures = {status: {"description": text} for status, text in _ERRORS.items()}
    answers = {"200": {"description": "The answer"}, **failures}
    paths: dict[str, Any] = {path: {"get": {"responses": answers}} for path in _GETS}
    for path, kind in _POSTS.items():
        body = {"required": True, "content": {"application/json": {"schema": _object(kind)}}}
        paths[path] = {"post": {"requestBody": body, "responses": answers}}
    return {"openapi": "3.1.0", "info": {"title": "dsv3_jax", "version": "1"}, "paths": paths}


def _object(kind: Any) -> dict[str, Any]:
    properties, required = {}, []
    for field, hint in fields_of(kind):
        properties[field.name] = schema = _schema(hint)
        if field.default is dataclasses.MISSING:
            required.append(field.name)
        else:  # null is as if it weren't there
            properties[field.name] = {"anyOf": [schema, {"type": "null"}]}
        for name, bound in (("minimum", field.metadata.get("least")), ("maximum", field.metadata.get("most"))):
            if bound is not None:
                schema[name] = bound
        schema.update(_KEYWORDS.get(field.name, {}))
    return {"type": "object", "properties": properties, "required": required}


def _schema(hint: Any) -> dict[str, Any]:
    """Returns the JSON schema of a type supported by `json_input`, without null."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if (nested := nested_kind(hint)) is not None:
        return _object(nested)
    if origin in (typing.Union, types.UnionType):
        options = [_schema(option) for option in args if option is not types.NoneType]
        return options[0] if len(options) == 1 else {"anyOf": options}
    if origin is Literal:
        return {"enum": list(args)}
    if hint == TokenIds:
        return {"type": "array", "items": {"type": "integer", "minimum": 0}}
    if origin is list:
        return {"type": "array", "items": _schema(args[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": True if args[1] is Any else _schema(args[1])}
    return {"type": {int: "integer", float: "number", str: "string", bool: "boolean"}[hint]}
