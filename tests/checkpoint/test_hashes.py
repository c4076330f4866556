"""Hashes of files: each checked once, however many threads ask."""

import concurrent.futures
import logging

import pytest

from dsv3_jax.checkpoint import hashes
from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.checkpoint.hashes import FileHashes, Unchecked, hash_files
from dsv3_jax.integrity import hash_file, seal, unseal


@pytest.fixture
def files(tmp_path):
    """Ten files, one larger than the buffer that they are read through."""
    for i in range(10):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * (1_000_000 if i == 3 else i))
    return tmp_path


def test_hash_of_bytes(files):
    import xxhash

    for i in (0, 3, 9):
        data = (files / f"{i}").read_bytes()
        assert hash_file(files / f"{i}") == (len(data), xxhash.xxh3_128_hexdigest(data))


def test_each_file_is_read_once(files, monkeypatch):
    names = [f"{i}" for i in range(10)]
    read, original = [], hashes.hash_file
    checked = FileHashes(files, hash_files(files, names), "list")
    monkeypatch.setattr(hashes, "hash_file", lambda f: (read.append(f.name), original(f))[1])
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: checked.check(names[k % 3 :]), range(40)))
    with checked.checking():
        pass
    assert sorted(read) == names


@pytest.mark.parametrize("name", ["3", "5"])
def test_all_who_ask_hear_of_damage(files, name):
    names = [f"{i}" for i in range(10)]
    checked = FileHashes(files, hash_files(files, names), "list")
    data = bytearray((files / name).read_bytes())
    data[-1] ^= 1
    (files / name).write_bytes(data)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"{name} isn't what list says: it has other bytes"):
            checked.check(names)
    with pytest.raises(CheckpointError, match=r"isn't what list says"), checked.checking():
        raise ValueError("what reading made of it")


def test_missing_longer_and_unlisted_files(files):
    checked = FileHashes(files, hash_files(files, ["1", "2", "4"]), "list")
    (files / "1").unlink()
    with pytest.raises(FileNotFoundError, match="1 is missing, which list lists"):
        checked.check(["1"])
    (files / "2").write_bytes(b"\2\2\2")
    with pytest.raises(CheckpointError, match="it has 3 bytes of 2"):
        checked.check(["2"])
    with pytest.raises(CheckpointError, match="5 isn't listed in list"):
        checked.check(["5"])
    checked.check(["4", "a part that is zero"])


def test_skipping_is_said(files, caplog):
    with caplog.at_level(logging.WARNING):
        unchecked = Unchecked(files, "asked for")
    assert f"{files} is read unchecked: asked for" in caplog.text
    unchecked.check(["gone"])


def test_seal(tmp_path):
    fields = {"a": [1, (2.5, None)], "b": {"c": "\N{GREEK SMALL LETTER PI}"}}
    sealed = seal(fields)
    assert unseal(sealed, tmp_path / "f", CheckpointError) == fields
    for changed in ({**sealed, "a": 1}, {**sealed, "new": 1}, fields, {**sealed, "seal": "0"}):
        with pytest.raises(CheckpointError, match="f isn't what was written"):
            unseal(changed, tmp_path / "f", CheckpointError)
