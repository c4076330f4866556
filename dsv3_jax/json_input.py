"""Strict parsing of JSON input, with type-checked values and one-line errors that name the file and field.

`kind` is a type annotation: int, float, str, bool, list[int], tuple[int, int], dict[str, float], `int |
None`, Literal, Any. `error` is the exception type to raise, called with the message.
"""

from __future__ import annotations

import collections
import json
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

Raise = Callable[[str], Exception]

_NAMES = {
    int: "an integer of 64 bits",
    float: "a finite number",
    str: "a string",
    bool: "true or false",
    types.NoneType: "null",
}


def read_json(path: Path, error: Raise) -> dict[str, Any]:
    """Reads the object in a file. Raises `error`, or FileNotFoundError."""
    try:
        return parse_json(path.read_bytes(), str(path), error)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} doesn't exist") from None
    except IsADirectoryError:
        raise error(f"{path} is a directory: it must be a JSON file") from None


def parse_json(text: bytes | str, what: str, error: Raise) -> dict[str, Any]:
    """Parses a JSON object in UTF-8, strictly enough that all parsers agree on it.

    Rejects duplicate names, NaN and infinities, lone surrogates, and nesting or integers beyond Python's limits. what:
    the name of the file for messages.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((twice, _),) = collections.Counter(name for name, _ in pairs).most_common(1)
            raise error(f"{what} names {show(twice)} twice: it must name it once")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"it holds {name}, which JSON doesn't have")

    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=unique, parse_constant=constant)
        if "\\u" in decoded:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise error(f"{what} isn't valid JSON: it is nested too deeply") from None
    except UnicodeEncodeError:
        raise error(f"{what} isn't valid JSON: it holds half of a surrogate pair") from None
    except ValueError as reason:  # also of text that isn't UTF-8, and of integers of thousands of digits
        if type(reason) not in (ValueError, json.JSONDecodeError, UnicodeDecodeError):
            raise
        raise error(f"{what} isn't valid JSON: {str(reason)[:200]}") from None
    if not isinstance(value, dict):
        raise error(f"{what} holds {show(value)}: it must hold a JSON object")
    return value


def check_type(value: Any, kind: Any, what: str, error: Raise) -> Any:
    """Returns `value` if it is of `kind`; raises `error` otherwise.

    An integer is also a float if a float can represent it; true and false aren't integers; integers have at most 64
    bits.

    what: the name of the field for messages, with the file's if that isn't clear: "config.json: vocab_size".
    """
    if not is_type(value, kind):
        raise error(f"{what} is {show(value)}: it must be {describe(kind)}")
    return value


def field(values: Mapping[str, Any], name: str, kind: Any, what: str, error: Raise) -> Any:
    """Returns the value of a required field of `kind`. what: the owner of the field, usually the file."""
    if name not in values:
        raise error(f"{what} has no {name}: it must be {describe(kind)}")
    return check_type(values[name], kind, f"{what}: {name}", error)


def is_type(value: Any, kind: Any) -> bool:
    """Whether a parsed JSON value is of `kind`. Tuples are lists in JSON."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(is_type(value, k) for k in args)
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return isinstance(value, list | tuple) and all(is_type(v, args[0]) for v in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(args) and all(map(is_type, value, args))
    if origin is dict:
        return isinstance(value, dict) and all(is_type(v, args[1]) for v in value.values())
    if kind is types.NoneType or kind is None:
        return value is None
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if kind is int:
        return type(value) is int and -(2**63) <= value < 2**63
    return type(value) is kind


def describe(kind: Any) -> str:
    """Describes a kind in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(k) for k in args)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"a list, each entry {describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(map(describe, args))}"
    if origin is dict:
        return "an object" if args[1] is Any else f"an object, each value {describe(args[1])}"
    return {dict: "an object", list: "a list"}.get(kind) or _NAMES.get(kind) or str(getattr(kind, "__name__", kind))


def show(value: Any) -> str:
    """Formats a value for a message, on one short line."""
    return _SHORT.repr(value)


def one_line(message: str) -> str:
    """Formats a message that contains names from files: printable, and shortened in the middle if too long."""
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    return plain if len(plain) <= 1000 else f"{plain[:600]} ... {plain[-300:]}"


_SHORT = reprlib.Repr(maxlevel=3, maxstring=80, maxother=80, maxlong=40, maxdict=3, maxlist=6)
