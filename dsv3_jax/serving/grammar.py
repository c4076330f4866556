"""Structured output: the tokens that a JSON schema, a regular expression or a tool call allows next, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from dsv3_jax.data import Tokenizer
from dsv3_jax.json_input import one_line
from dsv3_jax.serving.assistant import THINK_END
from dsv3_jax.serving.detokenize import Vocabulary
from dsv3_jax.serving.tools import CALLS_BEGIN, CALLS_END, written_call

_JSON_OPTIONS = {"whitespace_pattern": r"[\x20\n\r\t]{0,20}"}  # unbounded, a weak model writes nothing else


class GrammarError(ValueError):
    """An unsupported schema or expression. The message is one line."""


class Grammar:
    """The state of a grammar for one text: the tokens that may come next.

    Args:
      matcher: of llguidance, before the first token. vocab_size: of the model; ids beyond the tokenizer's are never
      allowed.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._words = matcher, -(-vocab_size // 32)

    def mask(self) -> np.ndarray:
        """Returns (ceil(V / 32),) uint32: bit i % 32 of word i // 32 is set if token i may come next.

        At the end of the text only end tokens are allowed.

        Raises:
          GrammarError: the grammar has become too complex.
        """
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error():
            raise GrammarError(f"the grammar can't be followed: {self._error()}")
        mask = np.zeros(self._words, np.uint32)
        mask[: len(allowed)] = allowed[: self._words]
        return mask

    def accept(self, token: int) -> None:
        """Advances by a token. Raises GrammarError if it isn't allowed, or the grammar has become too complex."""
        if not self._matcher.consume_token(token):
            raise GrammarError(f"token {token} isn't allowed here: {self._error()}")

    def _error(self) -> str:
        return one_line(self._matcher.get_error().split("\n<state>")[0])  # without the library's own state

    @property
    def finished(self) -> bool:
        """Whether only an end token can follow."""
        return self._matcher.is_stopped()

    def copy(self) -> Grammar:
        """Returns a copy of the state."""
        return Grammar(self._matcher.deep_copy(), self._words * 32)


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
      tokenizer: the model's.
      vocabulary: the bytes of its tokens.
      end_ids: tokens that end a text.
      vocab_size: of the model.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary, end_ids: Collection[int], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        ends = [i for i in end_ids if i < len(vocabulary.bytes)]
        tokens: Any = _Tokens(tokenizer, vocabulary)
        self._tokens = LLTokenizer(tokens, eos_token=ends or [tokenizer.eos_id])

    def json_schema(self, schema: Mapping[str, Any], *, thinking: bool = False) -> Grammar:
        """JSON that follows a schema; `{}` for any. thinking: after reasoning, which ends with `</think>`.

        Raises GrammarError if the schema is invalid, or has unsupported parts.
        """
        return self._compile(f"answer: {_json(schema)}", thinking)

    def json_object(self, *, thinking: bool = False) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"}, thinking=thinking)

    def regex(self, expression: str, *, thinking: bool = False) -> Grammar:
        """A full match of a regular expression in Rust's syntax. Raises GrammarError if it is invalid."""
        return self._compile(f"answer: /{_escape_slashes(expression)}/", thinking)

    def choice(self, choices: Sequence[str], *, thinking: bool = False) -> Grammar:
        """One of several texts."""
        return self._compile("answer: " + " | ".join(json.dumps(text) for text in choices), thinking)

    def tool_calls(
        self, tools: Sequence[Mapping[str, Any]], *, fenced: bool, several: bool, thinking: bool = False
    ) -> Grammar:
        """One or, if `several`, more calls of the tools, with arguments that follow their schemas.

        fenced: in the format of V3 and R1, otherwise in V3.1's.
        """
        rules, names = [], []
        for i, tool in enumerate(tools):
            function = tool["function"]
            before, after = written_call(function["name"], "\0", fenced).split("\0")
            schema = function.get("parameters") or {"type": "object"}
            rules += [f"call_{i}: {self._text(before)} arguments_{i} {self._text(after)}"]
            rules += [f"arguments_{i}: {_json(schema)}"]
            names.append(f"call_{i}")
        joined = f'"\\n" ({" | ".join(names)})' if fenced else " | ".join(names)
        more = f"({joined})*" if several else ""
        rules.append(f"answer: {self._text(CALLS_BEGIN)} ({' | '.join(names)}) {more} {self._text(CALLS_END)}")
        return self._compile("\n".join(rules), thinking)

    def _text(self, text: str) -> str:
        """Encodes a text for a grammar, with special tokens by name."""
        ids = self._tokens.tokenize_str(text, parse_special=True)
        if not any(self._tokens.is_special_token(i) for i in ids):
            return json.dumps(text, ensure_ascii=False)
        parts, plain = [], b""
        for i in ids:
            if self._tokens.is_special_token(i):
                parts += [json.dumps(plain.decode(), ensure_ascii=False)] * bool(plain) + [f"<[{i}]>"]
                plain = b""
            else:
                plain += self._tokens.decode_bytes([i])
        return " ".join(parts + [json.dumps(plain.decode(), ensure_ascii=False)] * bool(plain))

    def _compile(self, rules: str, thinking: bool) -> Grammar:
        thought = f"thought[suffix={json.dumps(THINK_END)}]: /(?s:.*)/\n" if thinking else ""
        grammar = f"start: {'thought ' if thinking else ''}answer\n{thought}{rules}\n"
        try:
            matcher = LLMatcher(self._tokens, grammar, log_level=0)
        except (ValueError, RuntimeError) as error:
            raise GrammarError(one_line(str(error))) from None
        if matcher.is_error():
            raise GrammarError(one_line(" ".join(matcher.get_error().split())))
        made = Grammar(matcher, self._vocab_size)
        made.mask()  # some show only now that they can't be followed
        return made


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"


def _escape_slashes(expression: str) -> str:
    """Writes a regular expression between slashes, with unescaped slashes escaped, and without newlines."""
    parts, escaped = [], False
    for char in expression:
        if char in "/\n" and not escaped:
            parts.append("\\")
        parts.append("n" if char == "\n" else char)
        escaped = char == "\\" and not escaped
    return "".join(parts)


class _Tokens:
    """Converts a tokenizer for llguidance."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.bytes
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(vocabulary.special)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return [int(i) for i in self._encode(text)]
