"""Preparing: every format, the split, bad input named, work that ends early, FIM and the random split, chats."""

import dataclasses
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dsv3_jax.config import ConfigError
from dsv3_jax.data import ByteTokenizer, PrepareOptions, load_tokenizer, prepare, sources
from dsv3_jax.data.shards import ShardWriter
from dsv3_jax.data.sources import LongDocument, cut, find_files, json_text
from dsv3_jax.data.tokenize import Tokenize
from dsv3_jax.serving.chat import ChatTemplate

BYTES = ByteTokenizer()
DEEPSEEK = Path(__file__).parents[1] / "golden/tokenizers/deepseek"
EVERYTHING = PrepareOptions(validation_fraction=0, max_bad_fraction=0)


def documents(prepared, split="training"):
    """The tokens of each document, in the order on disk."""
    data, found = prepared.split(split), []
    for block in range(len(data.block_tokens)):
        shard, bounds = data.block(block)
        found += data.read(shard, list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)))
    return found


def texts(prepared, split="training", tokenizer=BYTES):
    found = documents(prepared, split)
    assert all(d[0] == tokenizer.bos_id and d[-1] == tokenizer.eos_id for d in found)
    return [tokenizer.decode(d[1:-1]) for d in found]


def prepared_texts(source, tmp_path, options=EVERYTHING, **how):
    made = prepare([str(source)], tmp_path / "made" / str(time.monotonic_ns()), options, **how)
    return texts(made), made


def test_folder_in_sorted_order_with_every_format(tmp_path):
    folder = tmp_path / "texts"
    (folder / "a").mkdir(parents=True)
    (folder / "b.txt").write_text("plain\r\ntext", newline="")
    (folder / "a" / "x.md").write_text("\ufeffmark", encoding="utf-8")
    (folder / "c.jsonl").write_text('\ufeff{"text": "one\u2028line"}\n\n{"text": "two"}\n', encoding="utf-8")
    with gzip.open(folder / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "three"}\n{"text": " "}')
    with pa.CompressedOutputStream(str(folder / "e.jsonl.zst"), "zstd") as file:
        file.write(b'{"text": "four"}')
    pq.write_table(pa.table({"text": ["five", None, "  "], "n": [1, 2, 3]}), folder / "f.parquet")
    (folder / "blank.txt").write_text(" \n")
    (folder / "empty.jsonl").write_text("")
    (folder / "image.png").write_bytes(b"\xff\xfe")
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("hidden")
    found, made = prepared_texts(folder, tmp_path)
    assert found == ["mark", "plain\ntext", "one\u2028line", "two", "three", "four", "five"]
    (counts,) = made.index["sources"]
    assert counts["documents"] == 7
    assert counts["bytes"] == sum(len(t.encode()) for t in found)
    assert counts["tokens"] == counts["bytes"] + 2 * 7


def test_other_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}')
    pq.write_table(pa.table({"content": pa.array(["y"], pa.large_string())}), tmp_path / "b.parquet")
    options = dataclasses.replace(EVERYTHING, text_field="content")
    assert prepared_texts(tmp_path / "a.jsonl", tmp_path, options)[0] == ["x"]
    assert prepared_texts(tmp_path / "b.parquet", tmp_path, options)[0] == ["y"]
    for kind in (pa.dictionary(pa.int32(), pa.string()), pa.string_view()):
        pq.write_table(pa.table({"content": pa.array(["z", "z"], kind)}), tmp_path / "c.parquet")
        assert prepared_texts(tmp_path / "c.parquet", tmp_path, options)[0] == ["z", "z"]


def truncated_gz():
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb") as file:
        file.write(b"".join(b'{"text": "%d"}\n' % i for i in range(2000)))
    return out.getvalue()[:-1000]


def truncated_zst():
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as file:
        file.write(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(9000)))
    return out.getvalue().to_pybytes()[:-1000]


def damaged_parquet():
    """pyarrow says in two lines what is wrong with it."""
    out = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["x"]}), out, compression="none")
    content = out.getvalue().to_pybytes()
    return content[:4] + b"\xff" * 8 + content[12:]


BAD = [
    ("a.parquet", damaged_parquet(), r"can't read .*a\.parquet as parquet \(after row 0\): Couldn't deserialize"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a\.jsonl, line 2: no field 'text'"),
    ("a.jsonl", b'{"text": "x"}\n["y"]\n', r"a\.jsonl, line 2: no field 'text'"),
    ("a.jsonl", b"7\n", r"a\.jsonl, line 1: no field 'text'"),
    ("a.jsonl", b'\n{"text": "x"\n', r"a\.jsonl, line 2: not JSON"),
    ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: field 'text' is 5, not text"),
    ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, r"a\.jsonl, line 2: not JSON of text: it is nested too deeply"),
    ("a.jsonl", b'{"text": "x", "n": ' + b"1" * 5000 + b"}", r"a\.jsonl, line 1: not JSON"),
    ("a.jsonl", b'{"text": "caf\xe9"}', r"a\.jsonl, line 1: not UTF-8 \(byte"),
    ("a.txt", b"caf\xe9", r"a\.txt: not UTF-8 \(byte 3\)"),
    ("a.parquet", b"not parquet", r"can't read .*a\.parquet as parquet"),
    ("a.csv", b"x", r"holds no text \(files read: \.txt"),
    ("a.txt", b" \n", "holds no text"),
    ("a.jsonl", b"", "holds no text"),
    ("a.jsonl", '{"text": "x"}'.encode("utf-16"), r"a\.jsonl, line 1: not UTF-8"),
    ("a.jsonl", b'{"text": "\xed\xa0\x80"}', r"a\.jsonl, line 1: not UTF-8"),  # a surrogate as if it were a character
    ("a.jsonl.gz", truncated_gz(), r"a\.jsonl\.gz is damaged or cut off after line 1\d\d\d:"),
    ("a.jsonl.gz", b"", r"a\.jsonl\.gz is cut off: it has no bytes"),
    ("a.jsonl.gz", b"not gz", r"a\.jsonl\.gz is damaged or cut off after line 0"),
    ("a.jsonl.zst", truncated_zst(), r"a\.jsonl\.zst is damaged or cut off after line \d+"),
    ("a.jsonl.zst", b"", r"a\.jsonl\.zst is cut off: it has no bytes"),
    ("a.jsonl.zst", b"not zst", r"a\.jsonl\.zst is damaged or cut off after line 0"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files_are_named(tmp_path, name, content, message):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        prepare([str(folder)], tmp_path / "made", EVERYTHING)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


def test_parquet_columns_that_are_no_text_are_named(tmp_path):
    refused = lambda field, match: pytest.raises(ConfigError, match=match)
    pq.write_table(pa.table({"n": [1], "talk": [[{"role": "x"}]]}), tmp_path / "n.parquet")
    for field, match in (
        ("text", r"no column 'text'.* to one of n, talk"),
        ("n", "column 'n' holds int64"),
        ("talk", r"column 'talk' holds list<.*struct"),
    ):
        with refused(field, match):
            prepared_texts(tmp_path / "n.parquet", tmp_path, dataclasses.replace(EVERYTHING, text_field=field))
    array = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    with refused("text", r"a\.parquet, row 1: not UTF-8 \(byte 0\)"):
        prepared_texts(tmp_path / "a.parquet", tmp_path)


def test_a_share_of_bad_lines_is_left_out_counted_and_named(tmp_path):
    lines = [f'{{"text": "{i}"}}' for i in range(3000)]
    lines[7], lines[2000] = "{", '{"text": null}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    said = io.StringIO()
    found, made = prepared_texts(
        tmp_path / "a.jsonl", tmp_path, PrepareOptions(), console=Console(file=said, width=500)
    )
    assert len(found) + len(texts(made, "validation")) == 2998
    assert made.index["sources"][0]["rejected"] == 2
    assert [m.split(": ")[0].rpartition("/")[2] for m in made.index["rejected"]] == [
        "a.jsonl, line 8",
        "a.jsonl, line 2001",
    ]
    assert "left out" in said.getvalue()
    strict = PrepareOptions(max_bad_fraction=0.0005)
    with pytest.raises(ConfigError, match=r"line 8: not JSON.* \(2 of .*more than max_bad_fraction, 0\.0005\)"):
        prepared_texts(tmp_path / "a.jsonl", tmp_path, strict)


def test_a_share_of_bad_rows_is_left_out_too(tmp_path):
    binary = pa.array([b"first", b"caf\xe9", b"last"])
    for kind in (pa.string(), pa.large_string()):
        columns = pa.table(
            {"text": binary.cast(pa.large_binary() if kind == pa.large_string() else pa.binary()).view(kind)}
        )
        pq.write_table(columns, tmp_path / f"{kind}.parquet")
        lenient = dataclasses.replace(EVERYTHING, max_bad_fraction=0.5)
        found, made = prepared_texts(tmp_path / f"{kind}.parquet", tmp_path, lenient)
        assert found == ["first", "last"]
        assert [m.rpartition("/")[2] for m in made.index["rejected"]] == [f"{kind}.parquet, row 2: not UTF-8 (byte 3)"]


def test_lone_surrogates_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "cut emoji \\ud83d here"}\n{"text": "\\ud83d\\ude00"}\n')
    assert prepared_texts(tmp_path / "a.jsonl", tmp_path)[0] == ["cut emoji \ufffd here", "\N{GRINNING FACE}"]


def test_bad_sources_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    for source, match in (
        (tmp_path / "missing", "missing' doesn't exist"),
        (tmp_path / "a.csv", r"must end in one of \.txt"),
    ):
        with pytest.raises(ConfigError, match=match):
            find_files([str(source)], "text")
    with pytest.raises(ConfigError, match=r"missing/a\.jsonl' doesn't exist: give a file"):
        find_files(["missing/a.jsonl"], "text")


def rows_of_the_hub(name, config, *, split, revision, streaming):
    """A stand-in for `datasets.load_dataset`: two texts, and rows that are none."""
    rows = {"train": [{"text": "one", "n": 1}, {"text": None, "n": 2}, {"text": "three", "n": 3}], "bad": [{"text": 5}]}

    class Rows(list):
        def skip(self, count):
            return self[count:]

    assert (name, config, revision, streaming) == ("some-one/texts", "20231101.en", "abc", True)
    return Rows(rows[split])


@pytest.fixture
def hub(monkeypatch):
    api = types.SimpleNamespace(dataset_info=lambda name: types.SimpleNamespace(sha="abc"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=rows_of_the_hub))
    return api


def test_data_sets_of_the_hub(hub, tmp_path, monkeypatch):
    name = "some-one/texts:20231101.en"
    assert prepared_texts(name, tmp_path)[0] == ["one", "three"]
    (file,) = find_files([name], "n")
    assert [(r.data, r.number, r.offset) for r in find_files([name], "text")[0].records(2, 2)] == [("three", 3, 3)]
    before = file.state
    hub.dataset_info = lambda name: types.SimpleNamespace(sha="changed")
    assert find_files([name], "text")[0].state != before
    hub.dataset_info = lambda name: types.SimpleNamespace(sha="abc")
    for source, field, match in (
        (name, "body", r"some-one/texts:20231101\.en has no field 'body': set text_field to one of n, text"),
        (name + "@bad", "text", r"texts:20231101\.en@bad, row 1: field 'text' is not text"),
        (name + "@none", "text", r"can't read .*@none from the Hub: 'none'"),
    ):
        with pytest.raises(ConfigError, match=match):
            list(find_files([source], field)[0].records(0, 0))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"to read a data set of that name from .* Hub: pip install datasets"):
        find_files([name], "text")


def test_the_datasets_library_reads_rows_from_any_place_on(hub, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "datasets")
    datasets = pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(1, 100)))
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *rest, **how: load(str(tmp_path), *rest, **how))
    (file,) = find_files(["some-one/texts"], "text")
    assert [(r.data, r.number) for r in file.records(90, 90)] == [(f"row {i}", i) for i in range(91, 100)]


def test_stdlib_is_text_and_code_without_what_some_distributions_leave_out():
    (file,) = find_files(["stdlib"], "text")
    found = [record.data for record in file.records(0, 0)]
    assert sum(map(len, found)) > 4_000_000
    assert any(d.startswith('The "assert" statement') for d in found)
    assert Path(json.__file__).read_text("utf-8") in found
    assert Path(pytest.__file__).read_text("utf-8") not in found  # site-packages lie within the same folder
    outside = Path(sysconfig.get_path("stdlib")) / "tkinter" / "constants.py"
    assert not outside.exists() or outside.read_text("utf-8") not in found


# Long documents and cuts --------------------------------------------------------------------------------------


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 10), st.integers(1, 7), st.booleans())
def test_cuts_lose_no_text(text, limit, step, between_words):
    pieces = list(cut((text[i : i + step] for i in range(0, len(text), step)), limit, between_words=between_words))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)


values = st.recursive(st.none() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v))


@given(st.dictionaries(st.sampled_from(["text", "a", 'te"xt', "\\"]), values, min_size=1), st.text(), st.booleans())
def test_a_long_lines_text_is_what_json_reads(record, text, ascii_only):
    record["text"] = text
    line = json.dumps(record, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    old, sources._PIECE = sources._PIECE, 3
    try:
        assert "".join(json_text(line, "text")) == text
    finally:
        sources._PIECE = old
    for cut_off in (line[:-1], line + b"}"):
        with pytest.raises(ValueError, match="JSON"):
            list(json_text(cut_off, "text"))


@pytest.fixture
def short_is_long(monkeypatch):
    from dsv3_jax.data import preparation

    monkeypatch.setattr(sources, "_LONG", 300)
    monkeypatch.setattr(sources, "_PIECE", 100)
    monkeypatch.setattr(preparation, "_PIECE", 100)


def test_long_documents_are_tokenised_in_pieces_to_the_same_tokens(tmp_path, short_is_long):
    long = "".join(f"Line {i} of a long text, with words;\n\n" for i in range(40))
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 1, "text": long}) + '\n{"text": "short"}\n')
    (tmp_path / "b.txt").write_text(long)
    (tmp_path / "c.jsonl").write_text('{"text": 7, "x": "' + "x" * 400 + '"}\n')
    tokenizer = load_tokenizer(DEEPSEEK)
    options = dataclasses.replace(EVERYTHING, tokenizer=str(DEEPSEEK), max_bad_fraction=0.5, deduplicate=True)
    assert isinstance(next(find_files([str(tmp_path / "b.txt")], "text")[0].records(0, 0)).data, LongDocument)
    made = prepare([str(tmp_path)], tmp_path.parent / "long", options)
    whole = np.array([tokenizer.bos_id, *tokenizer.encode(long), tokenizer.eos_id])
    found = documents(made)
    np.testing.assert_array_equal(found[0], whole)
    assert len(found) == 2  # b.txt is the same text
    assert made.index["sources"][0]["duplicates"] == 1
    assert "c.jsonl, line 1: field 'text' is not text" in made.index["rejected"][0]
    cut_up = dataclasses.replace(options, max_document_characters=50)
    assert (
        "".join(texts(prepare([str(tmp_path / "b.txt")], tmp_path.parent / "cut", cut_up), tokenizer=tokenizer)) == long
    )


def test_bytes_of_long_documents_that_are_no_text_are_named_without_a_wrong_place(tmp_path, short_is_long):
    (tmp_path / "a.txt").write_bytes(b"word " * 4000 + b"\xff")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "' + b"word " * 4000 + b'\xff"}\n{"text": "good"}\n')
    made = prepare([str(tmp_path)], tmp_path.parent / "m", dataclasses.replace(EVERYTHING, max_bad_fraction=1.0))
    assert texts(made) == ["good"]
    assert [m.rpartition("/")[2] for m in made.index["rejected"]] == ["a.txt: not UTF-8", "b.jsonl, line 1: not UTF-8"]


def test_a_long_conversation_is_left_out_rather_than_learnt_as_text(tmp_path, short_is_long):
    messages = [{"role": "user", "content": "a " * 200}, {"role": "assistant", "content": "b"}]
    lines = [{"messages": messages[1:]}, {"messages": messages, "text": "a document"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = dataclasses.replace(EVERYTHING, max_bad_fraction=0.5)
    made = prepare([str(tmp_path / "a.jsonl")], tmp_path / "made", options, chat=lambda: ChatTemplate(TEMPLATE, {}, ""))
    assert made.index["sources"][0]["documents"] == 1
    assert "a.jsonl, line 2: a conversation of" in made.index["rejected"][0]


# The split ---------------------------------------------------------------------------------------------------


def test_the_split_is_by_text_and_about_the_fraction(tmp_path):
    options = dataclasses.replace(EVERYTHING, validation_fraction=0.1)
    lines = [json.dumps({"text": f"document {i}"}) for i in range(4000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[::-1] + lines[:500]))
    (trained, first), (_, second) = (prepared_texts(tmp_path / f"{n}.jsonl", tmp_path, options) for n in "ab")
    validation = texts(first, "validation")
    assert 0.08 < len(validation) / 4000 < 0.12
    assert sorted(trained + validation) == sorted(f"document {i}" for i in range(4000))
    assert set(texts(second, "validation")) == set(validation)


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_of_two_documents_one_is_on_each_side(tmp_path, fraction):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    found, made = prepared_texts(
        tmp_path / "a.jsonl", tmp_path, dataclasses.replace(EVERYTHING, validation_fraction=fraction)
    )
    assert len(found) == len(texts(made, "validation")) == 1


# Work that ends early ----------------------------------------------------------------------------------------


def tree(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.slow
def test_killed_at_any_moment_and_gone_on_with_it_is_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma,", "delta.\n", "{", "}\n\n"]
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        lines = (" ".join(rng.choice(words, rng.integers(1, 400))) for _ in range(4000))
        (folder / name).write_text("\n".join(json.dumps({"text": line}) for line in lines))
    command = [sys.executable, "-m", "dsv3_jax", "prepare", str(folder), str(tmp_path / "made"), "--tokenizer"]
    command += [str(DEEPSEEK), "--workers", "1", "--shard-tokens", "100000", "--deduplicate"]
    straight = tmp_path / "straight"
    options = PrepareOptions(tokenizer=str(DEEPSEEK), shard_tokens=100_000, deduplicate=True)
    prepare([str(folder)], straight, options)
    kills = 0
    for _ in range(60):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=float(rng.uniform(0.8, 1.8)))
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            if (tmp_path / "made").exists():  # killed after the last moment: it must be whole
                assert tree(tmp_path / "made") == tree(straight)
    else:
        assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert kills
    assert tree(tmp_path / "made") == tree(straight)


def test_a_full_disk_is_named():
    writer = ShardWriter(Path("/dev/full"), np.dtype("uint16"))
    with pytest.raises(ConfigError, match=r"can't write /dev/full: .*No space left on device"):
        writer.add(np.zeros(10**7, np.uint16))


def test_another_unfinished_job_is_not_mixed_in(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "document {i}"}}' for i in range(300)) + "\n{\n")
    monkeypatch.setattr(sources, "_BATCH", 1000)
    options = dataclasses.replace(EVERYTHING, shard_tokens=500)
    with pytest.raises(ConfigError, match="line 301: not JSON"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "made", options)
    with pytest.raises(ConfigError, match="holds another unfinished preparation"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "made", dataclasses.replace(options, seed=1))
    made = prepare([str(tmp_path / "a.jsonl")], tmp_path / "made", dataclasses.replace(options, max_bad_fraction=1.0))
    assert texts(made) == [f"document {i}" for i in range(300)]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [(" ", {}, "holds no text"), ("a", {"fim_rate": 0.5}, "has no tokens for it"), (b"\xff", {}, "not UTF-8")],
    ids=["blank", "fim", "bytes"],
)
def test_where_nothing_is_prepared_nothing_is_left(tmp_path, text, options, message):
    (tmp_path / "a.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        prepare([str(tmp_path / "a.txt")], tmp_path / "made", dataclasses.replace(EVERYTHING, **options))
    assert os.listdir(tmp_path) == ["a.txt"]


# FIM and the random split ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fim_tokenizer(tmp_path_factory):
    """The golden tokenizer with DeepSeek's tokens for FIM, and tokens that join punctuation and line ends."""
    folder = tmp_path_factory.mktemp("fim")
    content = json.loads((DEEPSEEK / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first = 1 + max([*vocabulary.values(), *(t["id"] for t in content["added_tokens"])])
    for i, name in enumerate(("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")):
        token = {"id": first + i, "content": name, "special": True, "normalized": False}
        content["added_tokens"].append(token | {"single_word": False, "lstrip": False, "rstrip": False})
    vocabulary |= {token["content"]: token["id"] for token in content["added_tokens"]}
    pattern = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"  # V3's, shortened
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    newline = "\u010a"
    for i, pair in enumerate(((".", newline), (",", newline), (")", newline))):
        vocabulary["".join(pair)] = first + 3 + i
        content["model"]["merges"].insert(0, list(pair))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text((DEEPSEEK / "tokenizer_config.json").read_text())
    return folder


def test_fim_at_its_rate_and_the_text_comes_back(fim_tokenizer, tmp_path):
    tokenizer = load_tokenizer(fim_tokenizer)
    begin, hole, end = (tokenizer.token_id(f"<｜fim▁{name}｜>") for name in ("begin", "hole", "end"))
    originals = [f"Text {i}: é, ü, \N{GRINNING FACE} and so on.\n" * (i % 5 + 1) for i in range(4000)]
    found = Tokenize(str(fim_tokenizer), fim_rate=0.1, seed=3).whole(originals, [False] * 4000)
    rearranged = 0
    for text, tokens in zip(originals, np.split(found.tokens, np.cumsum(found.lengths)[:-1]), strict=True):
        tokens = tokens.tolist()
        if tokens[1] == begin:
            rearranged += 1
            a, b = tokens.index(hole), tokens.index(end)
            parts = [tokenizer.decode(part) for part in (tokens[2:a], tokens[b + 1 : -1], tokens[a + 1 : b])]
            assert "".join(parts).encode() == text.encode()
        else:
            assert tokenizer.decode(tokens[1:-1]) == text
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert abs(rearranged - 400) < 3 * np.sqrt(4000 * 0.1 * 0.9)
    with pytest.raises(ConfigError, match=r"fim_rate is 0\.1, but the tokenizer has no tokens for it"):
        prepare(["stdlib"], tmp_path / "never", PrepareOptions(fim_rate=0.1))


def test_joined_punctuation_and_line_ends_are_split_at_the_rate(fim_tokenizer):
    tokenizer = load_tokenizer(fim_tokenizer)
    originals = [f"End {i}.\nA comma,\nf(x)\n" for i in range(3000)]
    plain, split = (
        Tokenize(str(fim_tokenizer), split_rate=rate, seed=1).whole(originals, [False] * 3000) for rate in (0, 0.2)
    )
    joined = [i for i, data in enumerate(tokenizer.token_bytes()) if data in (b".\n", b",\n", b")\n")]
    before = np.isin(plain.tokens, joined).sum()
    assert before > 3000, "the tokenizer joins them"
    changed = len(split.tokens) - len(plain.tokens)
    assert abs(changed - 0.2 * before) < 3 * np.sqrt(before * 0.2 * 0.8)
    assert changed == before - np.isin(split.tokens, joined).sum()
    for text, tokens in zip(originals, np.split(split.tokens, np.cumsum(split.lengths)[:-1]), strict=True):
        assert tokenizer.decode(tokens) == text
    left = {int(np.isin(tokens, joined).sum()) for tokens in np.split(split.tokens, np.cumsum(split.lengths)[:-1])}
    assert left == {0, 1, 2, 3}, "each token is split or not by itself"


# Chats -------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'system' %}{{ m.content }}{% else %}<｜Assistant｜>{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


def test_of_chats_only_what_the_assistant_writes_is_predicted(tmp_path):
    import functools

    from dsv3_jax.serving.chat import chat_template_beside

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((DEEPSEEK / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    talk = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello!"),
        ("user", "Bye"),
        ("assistant", "So long."),
    ]
    messages = [{"role": role, "content": content} for role, content in talk]
    lines = [{"messages": messages}, {"messages": messages[:2]}, {"text": "no chat"}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = dataclasses.replace(EVERYTHING, tokenizer=str(tmp_path), max_bad_fraction=0.9)
    template = functools.partial(chat_template_beside, tmp_path)
    made = prepare([str(tmp_path / "chats.jsonl")], tmp_path / "made", options, chat=template, workers=1)
    tokenizer = load_tokenizer(tmp_path)
    (found,) = documents(made)
    rendered = template().render(messages, add_generation_prompt=False).text
    np.testing.assert_array_equal(np.where(found < 0, ~found, found), tokenizer.encode_prompt(rendered))
    answers = np.split(found, np.flatnonzero(np.diff(found < 0)) + 1)[1::2]
    eos = tokenizer.eos_id
    assert [tokenizer.decode(a[:-1]) for a in answers] == ["Hello!", "So long."]
    assert all(a[-1] == eos for a in answers)
    assert [m.split(": ", 1)[1][:30] for m in made.index["rejected"]] == [
        "no message of the assistant: t",
        "no field 'messages', a list of",
    ]


def test_a_conversation_of_no_tokens_is_left_out(tmp_path):
    empty = {"messages": [{"role": "assistant", "content": ""}]}
    lines = [empty, {"messages": [{"role": "assistant", "content": "a"}]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    bare = lambda: ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {}, "")
    options = dataclasses.replace(EVERYTHING, max_bad_fraction=0.5)
    made = prepare([str(tmp_path / "a.jsonl")], tmp_path / "made", options, chat=bare)
    assert "line 1: no message of the assistant" in made.index["rejected"][0]
    assert len(documents(made)) == 1


def test_content_that_is_no_text_is_left_out_rather_than_learnt_as_python(tmp_path):
    contents = [[{"type": "text", "text": "parts"}], 5, {"text": "a"}, "text", None]
    lines = [
        {"messages": [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": c}]} for c in contents
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    template = lambda: ChatTemplate("{% for m in messages %}<{{ m.content }}>{% endfor %}", {}, "")
    options = dataclasses.replace(EVERYTHING, max_bad_fraction=0.7)
    made = prepare([str(tmp_path / "a.jsonl")], tmp_path / "made", options, chat=template)
    assert [load_tokenizer().decode(d) for d in documents(made)] == ["<x><text>", "<x><>"]
    assert len(made.index["rejected"]) == 3
    assert "line 2: message 1: content is 5, not text" in made.index["rejected"][1]


def test_ids_outside_the_vocabulary_stop_and_failures_are_named():
    class Strange(ByteTokenizer):
        def encode(self, text):
            if "!" in text:
                raise Exception("no token for '!'")
            return np.array([7 if "fine" in text else 65_541], np.int32)

    tokenize = Tokenize(None)
    tokenize.__dict__["tokenizer"] = Strange()
    with pytest.raises(ConfigError, match="token id 65541, outside its vocab_size of 259"):
        tokenize.whole(["a"], [False])
    found = tokenize.whole(["fine", "b! and", "fine too"], [False] * 3)
    assert found.tokens.tolist() == [256, 7, 257] * 2
    assert found.records.tolist() == [0, 2]
    assert found.errors == [(1, "the tokenizer fails on it ('b! and' ...): no token for '!'")]
    tokenize.tokenizer.eos_id = 256  # bos and eos in one: once a document
    del tokenize.__dict__["_ends"]
    assert tokenize.whole(["fine", "fine"], [False] * 2).tokens.tolist() == [256, 7, 256, 7]
