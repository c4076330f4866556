"""Headers of safetensors files are held to the format: whatever the safetensors library refuses is refused here."""

import json
import struct

import hypothesis
import hypothesis.strategies as st
import pytest
import safetensors

from dsv3_jax.checkpoint.files import CheckpointError, read_header

GOOD = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "none": {"dtype": "F16", "shape": [0, 5], "data_offsets": [32, 32]},
    "one": {"dtype": "F8_E4M3", "shape": [], "data_offsets": [32, 33]},
}
DATA = 33


def write(file, header, data=DATA):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def refusal(file):
    """Our message, or None; fails on any other error, a long message or one of several lines."""
    try:
        read_header(file)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 1100  # noqa: PT017
        return str(error)
    return None


def library_refuses(file):
    try:
        with safetensors.safe_open(file, "np"):
            return False
    except safetensors.SafetensorError:
        return True


def compare(file):
    ours, theirs = refusal(file), library_refuses(file)
    if theirs:
        assert ours is not None, "the library refuses it"
    elif ours is not None:  # what the library lets pass, for reasons of ours
        assert "twice" in ours or "has dtype" in ours, ours
    return ours


def changed(name, **fields):
    return {**GOOD, name: {**GOOD[name], **fields}}


BAD = {
    "overlap": changed("b", data_offsets=[16, 24]),
    "gap": changed("b", data_offsets=[28, 36]),
    "same bytes": {**GOOD, "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}},
    "doesn't begin at 0": changed("a", data_offsets=[8, 32]),
    "backwards": changed("b", data_offsets=[32, 24]),
    "too many bytes": changed("b", shape=[3]),
    "shape of floats": changed("b", shape=[4.0]),
    "shape of text": changed("b", shape=["4"]),
    "shape of booleans": changed("one", shape=[True]),
    "negative axes": changed("b", shape=[-2, -2]),
    "shape is a number": changed("b", shape=4),
    "product beyond 64 bits that is 0 in them": changed("none", shape=[2**32, 2**32], data_offsets=[32, 32]),
    "offset of thousands of digits": json.dumps(changed("a", data_offsets=["X", 24]))
    .replace('"X"', "9" * 5000)
    .encode(),
    "infinite offset": json.dumps(changed("a", data_offsets=["X", 24])).replace('"X"', "1e999").encode(),
    "NaN": json.dumps(changed("b", shape=[float("nan")])).encode(),
    "three offsets": changed("a", data_offsets=[0, 24, 24]),
    "dtype is a list": changed("a", dtype=["F32"]),
    "no dtype": {**GOOD, "a": {"shape": [2, 3], "data_offsets": [0, 24]}},
    "entry is null": {**GOOD, "a": None},
    "metadata of numbers": {**GOOD, "__metadata__": {"step": 3}},
    "metadata is text": {**GOOD, "__metadata__": "pt"},
    "deep": b"[" * 100_000,
    "deep in an object": b'{"a":' * 100_000,
    "not UTF-8": json.dumps(GOOD).encode().replace(b'"one"', b'"\xff\xfe"'),
    "half a surrogate pair": json.dumps(GOOD).replace('"one"', r'"\ud800"').encode(),
    "null": b"null",
    "a list": b"[]",
    "nothing": b"",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_header(case, tmp_path):
    write(tmp_path / "f", BAD[case])
    assert library_refuses(tmp_path / "f")
    assert refusal(tmp_path / "f").startswith((str(tmp_path / "f"), "a in", "b in"))


@pytest.mark.parametrize("extra", [-33, -1, 1, 8, 4096])
def test_file_must_end_with_its_tensors(extra, tmp_path):
    write(tmp_path / "f", GOOD, DATA + extra)
    assert library_refuses(tmp_path / "f")
    assert refusal(tmp_path / "f") is not None
    write(tmp_path / "f", GOOD)
    assert refusal(tmp_path / "f") is None


def test_length_of_the_header(tmp_path):
    text = json.dumps(GOOD).encode()
    for length in (0, 1, len(text) - 1, len(text) + 1, 100_000_001, 2**63, 2**64 - 1):
        (tmp_path / "f").write_bytes(struct.pack("<Q", length) + text + bytes(DATA))
        assert library_refuses(tmp_path / "f")
        assert refusal(tmp_path / "f") is not None


values = st.one_of(
    st.integers(-5, 40),
    st.builds(dict),
    st.builds(list),
    st.sampled_from(
        [2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, -1, 0.0, 4.0, 1e999, True, None, "4", "F32"]
    ),
    st.lists(st.integers(-2, 40), max_size=4),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4),
)


@st.composite
def headers(draw):
    """A good header with up to three things in it changed, and as many bytes of data as it asks for, or others."""
    header = json.loads(json.dumps(GOOD))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(["a", "b", "none", "one", "__metadata__", "new"]))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "0", "1", "all", "drop", "extra"]))
        entry = header.get(name)
        if key == "drop":
            header.pop(name, None)
        elif key == "all" or not isinstance(entry, dict):
            header[name] = draw(values)
        elif key in "01" and isinstance(entry.get("data_offsets"), list) and len(entry["data_offsets"]) == 2:
            entry["data_offsets"][int(key)] = draw(values)
        elif key == "dtype":
            entry[key] = draw(st.sampled_from(["F64", "I8", "U8", "BF16", "F4", ""]) | values)
        else:
            entry[key] = draw(values)
    return header, draw(st.sampled_from([DATA, DATA, DATA, 24, 32, 34, 0]))


def check_header(folder, made):
    write(file := folder / "f", *made)
    hypothesis.target(0.0 if compare(file) else 1.0)


def check_bytes(folder, changes):
    text = bytearray(json.dumps(GOOD).encode())
    for place, byte in changes:
        text[place % len(text)] = byte
    write(folder / "f", bytes(text))
    compare(folder / "f")


bytes_changed = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from(b'0123456789-+.eE"[]{}:, \\uNat\xff\x00')), max_size=4
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("headers")


@hypothesis.settings(max_examples=300)
@hypothesis.given(made=headers())
def test_as_the_library_refuses(folder, made):
    check_header(folder, made)


@hypothesis.settings(max_examples=300)
@hypothesis.given(changes=bytes_changed)
def test_as_the_library_refuses_bytes(folder, changes):
    check_bytes(folder, changes)
