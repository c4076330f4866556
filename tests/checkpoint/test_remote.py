"""Directories at URLs, read through a copy in the user's cache."""

from pathlib import Path

import pytest
from fsspec.registry import known_implementations

from dsv3_jax.checkpoint import remote
from dsv3_jax.checkpoint.remote import Remote, as_url, fetched
from dsv3_jax.config import ConfigError
from tests.checkpoint import unsteady


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    unsteady.allow()
    return tmp_path / "cache"


@pytest.fixture
def bucket(tmp_path):
    """A run with two checkpoints at a URL, the newer of which hasn't arrived entirely."""
    run = tmp_path / "bucket/run"
    whole = ("checkpoints/5/state/d/x", "checkpoints/5/hashes.json", "checkpoints_set_aside/6-1/hashes.json")
    for name in ("config.json", "owner.json", *whole):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    (run / "checkpoints/7/state").mkdir(parents=True)
    (run / "checkpoints/7/state/x").write_text("the first of two")
    return run


def url_of(path):
    return f"unsteady:/{path}"


def files(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def test_urls_are_told_from_paths(tmp_path):
    for url in ("gs://bucket/run", "s3://bucket/a/run", "file:///data/run", "unsteady://a"):
        assert as_url(url) == as_url(Path(url)) == as_url(url + "/") == url
    for path in ("runs/mine", "/runs/mine", "C:/runs", ".", "a:b", str(tmp_path)):
        assert as_url(path) is None
        assert fetched(path) == Path(path)


def test_the_newest_whole_checkpoint_is_copied(bucket):
    here = fetched(url_of(bucket))
    assert here.name == "run"
    assert files(here) == ["checkpoints/5/hashes.json", "checkpoints/5/state/d/x", "config.json"]
    (bucket / "checkpoints/7/hashes.json").write_text("now it's whole")
    assert fetched(url_of(bucket)) == here
    assert files(here) == ["checkpoints/7/hashes.json", "checkpoints/7/state/x", "config.json"]


def test_a_report_needs_no_weights(bucket):
    here = fetched(url_of(bucket), weights=False)
    assert files(here) == ["config.json"]
    assert (here / "checkpoints").is_dir()  # it is a run nevertheless


def test_only_what_changed_is_copied_again(bucket, monkeypatch):
    copied = []
    get = Remote.get
    monkeypatch.setattr(Remote, "get", lambda self, name, file: (copied.append(name), get(self, name, file)))
    fetched(url_of(bucket))
    assert len(copied) == 3
    copied.clear()
    fetched(url_of(bucket))
    assert copied == []
    (bucket / "config.json").write_text("config.jsno")  # as many bytes
    (bucket / "tokenizer.json").write_text("new")
    here = fetched(url_of(bucket))
    assert sorted(copied) == ["config.json", "tokenizer.json"]
    assert (here / "config.json").read_text() == "config.jsno"
    (bucket / "tokenizer.json").unlink()
    assert not (fetched(url_of(bucket)) / "tokenizer.json").exists()


def test_a_checkpoint_that_is_deleted_meanwhile_is_looked_for_again(bucket, monkeypatch):
    get = Remote.get

    def replaced(self, name, file):
        if name == "checkpoints/5/state/d/x":
            (bucket / name).unlink(missing_ok=True)
            (bucket / "checkpoints/5/hashes.json").unlink(missing_ok=True)
            (bucket / "checkpoints/7/hashes.json").write_text("whole")
        get(self, name, file)

    monkeypatch.setattr(Remote, "get", replaced)
    assert "checkpoints/7/hashes.json" in files(fetched(url_of(bucket)))


def test_what_is_wrong_is_said(bucket, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"unsteady://.*/none holds no files: give the URL of"):
        fetched(url_of(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"^nosuch://b/run is of no known kind: it must begin with gs://, s3://"):
        fetched("nosuch://b/run")
    absent = {"class": "no_such_package.FileSystem", "err": "Install no_such_package to access it"}
    monkeypatch.setitem(known_implementations, "absent", absent)
    with pytest.raises(ConfigError, match=r"^absent://b/run can't be used, a package is missing: Install no_such_pack"):
        fetched("absent://b/run")
    monkeypatch.setattr(unsteady.Unsteady, "find", lambda *_, **__: 1 / 0)
    with pytest.raises(OSError, match=r"^unsteady://.*/run can't be listed: division by zero$"):
        fetched(url_of(bucket))


def test_files_go_there_and_back(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_SMALL", 10)  # both ways to write
    there = Remote(url_of(tmp_path / "bucket"))
    assert there.list() == {}
    assert there.read("a") is None
    for content in (b"short", b"longer than that"):
        (tmp_path / "from").write_bytes(content)
        there.put(tmp_path / "from", "of/it")
        there.get("of/it", tmp_path / "to")
        assert (tmp_path / "to").read_bytes() == there.read("of/it") == content
    assert list(there.list()) == ["of/it"]
    for name in ("of", "of/it", "nothing"):
        there.remove(name)
    assert there.list() == {}
    with pytest.raises(FileNotFoundError, match="of/it"):
        there.get("of/it", tmp_path / "to")
