"""Reading documents, and the split by document."""

import json
import sysconfig
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.data import load_documents, split_documents


def test_stdlib_is_text_and_code_and_loads_fast():
    began = time.monotonic()
    documents = load_documents()
    assert time.monotonic() - began < 5
    assert documents == load_documents()
    assert sum(map(len, documents)) > 4_000_000
    assert any(d.startswith('The "assert" statement') for d in documents)
    with open(json.__file__, encoding="utf-8") as file:
        assert file.read() in documents
    with open(pytest.__file__, encoding="utf-8") as file:  # site-packages lie within the same folder
        assert file.read() not in documents


def test_folder_in_sorted_order_with_every_format(tmp_path):
    (tmp_path / "b.txt").write_text("plain\r\ntext", newline="")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_text("\ufeffmark", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "one\u2028line"}\n\n{"text": "two"}\n', encoding="utf-8")
    pq.write_table(pa.table({"text": ["three", None, "  "], "n": [1, 2, 3]}), tmp_path / "d.parquet")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\xff\xfe")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    assert load_documents(tmp_path) == ["mark", "plain\ntext", "one\u2028line", "two", "three"]
    assert load_documents(tmp_path / "b.txt") == ["plain\ntext"]


def test_other_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}')
    pq.write_table(pa.table({"content": pa.array(["y"], pa.large_string())}), tmp_path / "b.parquet")
    assert load_documents(tmp_path, text_field="content") == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a\.jsonl, line 2 has no field 'text'"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', r"a\.jsonl, line 2 has no field 'text'"),
        ("a.jsonl", b"7\n", r"a\.jsonl, line 1 has no field 'text'"),
        ("a.jsonl", b'\n{"text": "x"\n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: field 'text' is 5, not text"),
        (
            "a.jsonl",
            b'{"text": "x"}\n' + b"[" * 100_000,
            r"a\.jsonl, line 2 is not JSON of text: it is nested too deeply",
        ),
        ("a.jsonl", b'{"text": "x", "n": ' + b"1" * 5000 + b"}", r"a\.jsonl, line 1 is not JSON"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 \(byte 3\)"),
        ("a.parquet", b"not parquet", r"can't read .*a\.parquet as parquet"),
        ("a.csv", b"x", r"holds no text \(files read: \.txt"),
        ("a.txt", b" \n", "holds no text"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_documents(tmp_path)
    assert "\n" not in str(error.value)


def test_lone_surrogates_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "cut emoji \\ud83d here"}\n{"text": "\\ud83d\\ude00"}\n')
    documents = load_documents(tmp_path)
    assert documents == ["cut emoji \ufffd here", "\N{GRINNING FACE}"]
    assert len("".join(documents).encode())


def test_parquet_text_that_is_not_utf8_is_named(tmp_path):
    array = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: column 'text' holds text that is not UTF-8"):
        load_documents(tmp_path)


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing' doesn't exist"):
        load_documents(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no text"):
        load_documents(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"must end in one of \.txt"):
        load_documents(tmp_path / "a.csv")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "n.parquet")
    with pytest.raises(ValueError, match=r"no column 'text'.* to one of n"):
        load_documents(tmp_path)
    with pytest.raises(ValueError, match="column 'n' holds int64"):
        load_documents(tmp_path, text_field="n")


def test_stdlib_leaves_out_what_some_distributions_leave_out():
    outside = Path(sysconfig.get_path("stdlib")) / "tkinter" / "constants.py"
    if not outside.exists():
        pytest.skip("needs a Python with tkinter")
    assert outside.read_text(encoding="utf-8") not in load_documents()


@given(st.text(alphabet="ab\n", max_size=60).filter(str.strip), st.integers(1, 10))
def test_cut_documents_lose_no_text(text, limit):
    from dsv3_jax.data.sources import _cut

    pieces = list(_cut(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)


@given(st.lists(st.text(max_size=5), min_size=1, max_size=30), st.floats(0, 0.99), st.randoms())
def test_split_is_disjoint_complete_and_without_order(documents, fraction, random):
    training, validation = split_documents(documents, fraction)
    assert sorted(training + validation) == sorted(documents)
    assert not set(training) & set(validation)  # equal texts stay together
    assert training, "some text is always left to train on"
    if fraction and len(set(documents)) > 1:
        assert validation
    random.shuffle(documents)
    again = split_documents(documents, fraction)
    assert [sorted(side) for side in again] == [sorted(training), sorted(validation)]


def test_split_takes_about_the_fraction_and_stays_when_documents_come():
    documents = [f"document {i}" for i in range(4000)]
    validation = split_documents(documents, 0.1)[1]
    assert 0.08 < len(validation) / len(documents) < 0.12
    more = split_documents(documents + [f"new {i}" for i in range(1000)], 0.1)[1]
    assert set(validation) <= set(more)
    assert split_documents(documents, 0)[1] == []
