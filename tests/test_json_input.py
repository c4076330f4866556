"""JSON of others: what is refused, and that each refusal is one line naming file and field."""

import json
import time
from typing import Any, Literal

import hypothesis
import hypothesis.strategies as st
import pytest

from dsv3_jax.json_input import check_type, field, is_type, parse_json, read_json


class Refused(ValueError):
    pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "f.json isn't valid JSON"),
        (b"", "f.json isn't valid JSON"),
        (b"\xff\xfe{}", "f.json isn't valid JSON: 'utf-8'"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "f.json isn't valid JSON: Exceeds the limit"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": [-Infinity]}', "holds -Infinity"),
        (b'{"a": 1, "a": 2}', "f.json names 'a' twice"),
        (b'{"a": {"b\\n": 1, "b\\n": 2}}', r"names 'b.n' twice"),
        (b'{"\\ud800": 1}', "half of a surrogate pair"),
        (b"[1]", r"f.json holds \[1\]: it must hold a JSON object"),
        (b"null", "f.json holds None"),
    ],
    ids=range(13),
)
def test_bad_json(text, message):
    with pytest.raises(Refused, match=message) as caught:
        parse_json(text, "f.json", Refused)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_name_that_comes_twice_among_many_is_found_at_once():
    names = ", ".join(f'"{i}": 0' for i in range(30_000))
    began = time.perf_counter()
    with pytest.raises(Refused, match="'29999' twice"):
        parse_json(f'{{{names}, "29999": 0}}', "f.json", Refused)
    assert time.perf_counter() - began < 5


def test_surrogate_pairs_and_files(tmp_path):
    assert parse_json(r'{"a": "\ud83d\ude00"}', "f", Refused) == {"a": "\N{GRINNING FACE}"}
    (tmp_path / "f").write_text('{"a": 1e400}')
    assert not is_type(read_json(tmp_path / "f", Refused)["a"], float)
    with pytest.raises(FileNotFoundError, match="gone doesn't exist"):
        read_json(tmp_path / "gone", Refused)


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [
        (1, int, True),
        (1.0, int, False),
        (True, int, False),
        (2**63, int, False),
        ("1", int, False),
        (1, float, True),
        (10**400, float, False),
        (float("nan"), float, False),
        (float("inf"), float, False),
        (False, float, False),
        ("false", bool, False),
        (0, bool, False),
        (False, bool, True),
        (None, int | None, True),
        ("a", int | None, False),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ([1, 2, 3], tuple[int, ...], True),
        ([1, "2"], list[int], False),
        ({"a": [1]}, dict[str, list[int]], True),
        ({"a": 1}, dict[str, list[int]], False),
        ("keep", Literal["keep", "fp8"], True),
        ("kept", Literal["keep", "fp8"], False),
        (True, Literal[1], False),
        ({}, Any, True),
    ],
)
def test_types(value, kind, fits):
    assert is_type(value, kind) == fits
    if not fits:
        with pytest.raises(Refused, match=r"^f.json: size is .*: it must be ") as caught:
            check_type(value, kind, "f.json: size", Refused)
        assert "\n" not in str(caught.value)


def test_missing_field():
    assert field({"a": 1}, "a", int, "f.json", Refused) == 1
    with pytest.raises(Refused, match=r"f.json has no b: it must be a list of 2: a string, true or false"):
        field({"a": 1}, "b", tuple[str, bool], "f.json", Refused)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@hypothesis.given(st.binary(max_size=200) | anything.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_an_object_or_refused(text):
    try:
        found = parse_json(text, "f.json", Refused)
    except Refused as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return
    assert found == json.loads(text)
