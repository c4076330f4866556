"""Tokens to text, the parts of an assistant's text, and grammars: whatever the pieces in which text comes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.data import load_tokenizer
from dsv3_jax.serving.assistant import AssistantText, CallDelta, Delta
from dsv3_jax.serving.detokenize import Detokenizer, Marks, Vocabulary
from dsv3_jax.serving.grammar import GrammarError, Grammars
from dsv3_jax.serving.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR
from tests.conftest import new_rng

TOKENIZERS = Path(__file__).parents[1] / "golden/tokenizers"
NAMES = ["bytes", "deepseek", "glm", "kimi", "sentencepiece"]


@pytest.fixture(scope="module")
def tokenizers():
    return {name: load_tokenizer(name if name == "bytes" else TOKENIZERS / name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_of_tokens_is_the_tokenizers_decode(name, tokenizers):
    """Token sequences of real texts, of tokens in any order, which aren't UTF-8, and after a prompt."""
    tokenizer = tokenizers[name]
    vocabulary, rng = Vocabulary(tokenizer), new_rng()
    texts = ["naïve Ⅷ \N{GRINNING FACE}\N{ZERO WIDTH JOINER}", "def f(x):\n\treturn 你好", "a\ufffdb é"]
    if name != "sentencepiece":  # it has no token for other characters than its corpus's and counts bytes differently
        texts += ["".join(map(chr, rng.integers(32, 0x2FFF, 50)))]
    cases = [tokenizer.encode(text).tolist() for text in texts]
    if name != "sentencepiece":
        cases += rng.integers(0, tokenizer.vocab_size, (50, 40)).tolist()
    for ids in cases:
        stream = Detokenizer(vocabulary)
        pieces = [stream.add(i) for i in ids]
        text = "".join(pieces) + stream.end()
        start = tokenizer.encode("x").tolist()  # what the decoder strips from a text's beginning isn't stripped here
        assert text == tokenizer.decode([*start, *ids])[len(tokenizer.decode(start)) :]


def test_a_character_of_several_tokens_comes_once_and_whole(tokenizers):
    stream = Detokenizer(Vocabulary(tokenizers["bytes"]))
    assert [stream.add(i) for i in "é\N{GRINNING FACE}".encode()] == ["", "é", "", "", "", "\N{GRINNING FACE}"]
    assert [stream.add(i) for i in [0xE4, 0xBD, 65, 257, 300, -1]] == ["", "", "\ufffdA", "", "", ""]
    assert stream.add(0xE4) + stream.end() == "\ufffd"
    assert Detokenizer(Vocabulary(tokenizers["bytes"]), skip_special_tokens=False).add(257) == "<eos>"
    assert Vocabulary(tokenizers["bytes"]).name(0xE4) == "bytes:\\xe4"


def pieces_of(text, cuts):
    cuts = sorted({min(c, len(text)) for c in cuts})
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(st.text("ab<|", max_size=24), st.lists(st.text("ab<|", min_size=1, max_size=4), max_size=3), st.data())
def test_marks_are_found_whatever_the_pieces(text, marks, data):
    def cut(pieces):
        stream, out = Marks(), []
        for piece in pieces:
            stream.add(piece)
            while True:
                shown, mark = stream.until(marks)
                out.append(shown)
                if mark is None:
                    break
                out.append(("mark", mark))
        out.append(stream.rest())
        joined = []
        for part in out:
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        return joined

    found = cut(pieces_of(text, data.draw(st.lists(st.integers(0, 24), max_size=24))))
    assert found == cut(list(text) or [""])
    if len(marks) == 1:
        assert [part for part in found if isinstance(part, str)] == text.split(marks[0])


V31 = (
    f'Let me look.{CALLS_BEGIN}{CALL_BEGIN}weather{SEPARATOR}{{"city": "Paris"}}{CALL_END}'
    f"{CALL_BEGIN}time{SEPARATOR}{{}}{CALL_END}{CALLS_END}"
)
V3 = (
    f'{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}weather\n```json\n{{"city": "Paris"}}\n```{CALL_END}\n'
    f"{CALL_BEGIN}function{SEPARATOR}time\n```json\n{{}}\n```{CALL_END}{CALLS_END}"
)
CALLS = [("weather", '{"city": "Paris"}'), ("time", "{}")]


@pytest.mark.parametrize(
    ("text", "thinking", "tools", "reasoning", "content", "calls"),
    [
        ("\n<think>\nhm <b>\n</think>\n\nYes.", None, False, "\nhm <b>\n", "\n\nYes.", []),
        ("hm</think>Yes </think>.", True, True, "hm", "Yes </think>.", []),
        ("hm", True, False, "hm", "", []),
        (" <thin", None, False, "", " <thin", []),
        ("a <think> b", None, False, "", "a <think> b", []),
        ("<think>a</think>b", False, False, "", "<think>a</think>b", []),
        (V31, False, True, "", "Let me look.", CALLS),
        (f"hm</think>{V3}", True, True, "hm", "", CALLS),
        (V3, None, False, "", V3, []),
        (f'{CALLS_BEGIN}{CALL_BEGIN}f{SEPARATOR}{{"a', None, True, "", "", [("f", '{"a')]),
        (f"{CALLS_BEGIN}{CALL_BEGIN}function", False, True, "", f"{CALL_BEGIN}function", []),
        (V3[: V3.find("ther\n")], False, True, "", V3[len(CALLS_BEGIN) : V3.find("ther\n")], []),
    ],
)
def test_parts_of_an_assistants_text(text, thinking, tools, reasoning, content, calls):
    rng = new_rng()
    for cuts in ([], range(len(text)), *(rng.integers(0, len(text), 5).tolist() for _ in range(20))):
        parts, whole = AssistantText(thinking, tools), Delta()
        for piece in pieces_of(text, cuts):
            whole += parts.add(piece)
        whole += parts.end()
        assert (whole.reasoning, whole.content) == (reasoning, content)
        assert [(call.name, call.arguments) for call in whole.calls] == calls
        assert all(re.fullmatch("call_[0-9a-f]{24}", call.id) for call in whole.calls)


def test_a_call_streams_its_name_before_its_arguments():
    parts = AssistantText(False, True)
    assert not parts.add(f"{CALLS_BEGIN}{CALL_BEGIN}weather")
    (first,) = parts.add(SEPARATOR).calls
    assert (first.index, first.name, first.arguments) == (0, "weather", "")
    assert parts.add('{"city"').calls == [CallDelta(0, '{"city"')]


def follow(grammar, ids):
    """How many of `ids` a grammar takes, and whether only the end can follow."""
    for n, i in enumerate(ids):
        if not grammar.mask()[i // 32] >> (i % 32) & 1:
            return n, grammar.finished
        grammar.accept(i)
    return len(ids), grammar.finished


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "n": {"type": "integer"}},
    "required": ["city", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", ["bytes", "deepseek", "kimi"])
def test_grammars_allow_what_matches_and_nothing_else(name, tokenizers):
    tokenizer = tokenizers[name]
    grammars = Grammars(tokenizer, Vocabulary(tokenizer), [tokenizer.eos_id], tokenizer.vocab_size + 50)
    ids = lambda text: tokenizer.encode_prompt(text, add_special_tokens=False).tolist()
    taken = lambda grammar, text: follow(grammar, ids(text)) == (len(ids(text)), True)
    assert taken(grammars.json_schema(SCHEMA), '{"city": "Paris", "n": 3}')
    assert not taken(grammars.json_schema(SCHEMA), '{"city": "London", "n": 3}')
    assert not taken(grammars.json_schema(SCHEMA), '{"n": 3}')
    assert taken(grammars.json_object(), '{"a": [1, null]}')
    assert taken(grammars.regex(r"[a-c]{2}/\d\n"), "ab/7\n")
    assert taken(grammars.regex("a/\\/\\\\\\\nb\n"), "a//\\\nb\n")
    assert not taken(grammars.regex("[a-c]{2}"), "ad")
    assert taken(grammars.choice(['yes "a"', "no"]), 'yes "a"')
    assert taken(grammars.json_schema(SCHEMA, thinking=True), 'hm { </thin </think>{"city":"","n":0}')
    mask = grammars.regex("a").mask()
    assert mask.shape == (-(-(tokenizer.vocab_size + 50) // 32),)
    assert mask.dtype == np.uint32
    ended = grammars.regex("ab")
    for i in ids("ab"):
        ended.accept(i)
    bits = np.unpackbits(ended.mask().view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [tokenizer.eos_id]
    copy = (first := grammars.regex("ab|ac")).copy()
    first.accept(ids("a")[0])
    assert follow(copy, ids("ac"))[1]
    for fenced in (False, True):
        tools = [{"function": {"name": "weather", "parameters": SCHEMA}}, {"function": {"name": "time"}}]
        calls = grammars.tool_calls(tools, fenced=fenced, several=True)
        text = (V3 if fenced else V31[len("Let me look.") :]).replace('"Paris"}', '"Paris", "n": 1}')
        assert taken(calls, text)
        assert not taken(grammars.tool_calls(tools, fenced=fenced, several=False), text)


def test_what_no_grammar_can_follow_is_said_in_a_line(tokenizers):
    tokenizer = tokenizers["bytes"]
    grammars = Grammars(tokenizer, Vocabulary(tokenizer), [257], 272)
    for make, said in (
        (lambda: grammars.regex("[a-c"), "unclosed character class"),
        (lambda: grammars.json_schema({"type": "objec"}), "objec"),
        (lambda: grammars.json_schema({"type": "object", "properties": 3}), "properties"),
        (lambda: grammars.json_schema(json.loads('{"$ref": "#/nowhere"}')), "nowhere"),
        (lambda: grammars.json_schema({"$ref": "#"}), "can't be followed"),
    ):
        with pytest.raises(GrammarError, match=said) as error:
            make()
        assert "\n" not in str(error.value)
    with pytest.raises(GrammarError, match="isn't allowed"):
        grammars.regex("a").accept(98)
    with pytest.raises(GrammarError, match="too many expressions") as error:
        follow(grammars.regex("(a?){2000}a{2000}"), b"aa")
    assert len(str(error.value)) < 200
