"""Structured output: which tokens a JSON schema, a regular expression or a tool call allows next, by llguidance."""

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
    """A schema or expression that can't be followed, in one line."""


class Grammar:
    """The tokens that may come next; one for each text that is generated.

    Args:
      matcher: of llguidance, before the first token.
      vocab_size: of the model; ids that the tokenizer doesn't have are never allowed.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._words = matcher, -(-vocab_size // 32)

    def mask(self) -> np.ndarray:
        """(ceil(V / 32),) uint32: bit i % 32 of word i // 32 says whether token i may come next.

        At the text's end these are the end tokens alone.

        Raises:
          GrammarError: the grammar became too complex to follow.
        """
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error():
            raise GrammarError(one_line(f"the grammar can't be followed: {self._matcher.get_error()}"))
        mask = np.zeros(self._words, np.uint32)
        mask[: len(allowed)] = allowed[: self._words]
        return mask

    def accept(self, token: int) -> None:
        """Takes the token that came. Raises GrammarError if it isn't allowed."""
        if not self._matcher.consume_token(token):
            raise GrammarError(one_line(f"token {token} isn't allowed here: {self._matcher.get_error()}"))

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token can follow."""
        return self._matcher.is_stopped()

    def copy(self) -> Grammar:
        """Another of the same state."""
        return Grammar(self._matcher.deep_copy(), self._words * 32)


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
      tokenizer: whose tokens are to follow the grammars.
      vocabulary: its tokens' bytes.
      end_ids: tokens that end a text.
      vocab_size: of the model.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary, end_ids: Collection[int], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        ends = [i for i in end_ids if i < len(vocabulary.bytes)]
        tokens: Any = _Tokens(tokenizer, vocabulary)
        self._tokens = LLTokenizer(tokens, eos_token=ends or [tokenizer.eos_id])

    def json_schema(self, schema: Mapping[str, Any], *, thinking: bool = False) -> Grammar:
        """JSON of a schema; `{}` for any. thinking: after reasoning, which ends with `</think>`.

        Raises GrammarError if the schema is none, or has what can't be followed token by token.
        """
        return self._compile(f"answer: {_json(schema)}", thinking)

    def json_object(self, *, thinking: bool = False) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"}, thinking=thinking)

    def regex(self, expression: str, *, thinking: bool = False) -> Grammar:
        """A whole match of a regular expression, of the syntax of Rust's regex. Raises GrammarError if it is none."""
        return self._compile(f"answer: /{_escape_slashes(expression)}/", thinking)

    def choice(self, choices: Sequence[str], *, thinking: bool = False) -> Grammar:
        """One of some texts."""
        return self._compile("answer: " + " | ".join(json.dumps(text) for text in choices), thinking)

    def tool_calls(
        self, tools: Sequence[Mapping[str, Any]], *, fenced: bool, several: bool, thinking: bool = False
    ) -> Grammar:
        """One or, if `several`, more calls of some tools, their arguments as their schemas say.

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
        """A text in a grammar; where it holds special tokens, those."""
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
        return Grammar(matcher, self._vocab_size)


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"


def _escape_slashes(expression: str) -> str:
    """A regular expression between slashes: those within escaped, unless they are; no newline, which would end it."""
    parts, escaped = [], False
    for char in expression:
        parts.append("\\/" if char == "/" and not escaped else "\\n" if char == "\n" else char)
        escaped = char == "\\" and not escaped
    return "".join(parts)


class _Tokens:
    """A tokenizer as llguidance takes it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.bytes
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(vocabulary.special)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return [int(i) for i in self._encode(text)]
