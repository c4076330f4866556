"""Batches: exact resumption, parts of a batch, changing batch sizes, validation apart from training."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models

from dsv3_jax.config import ConfigError
from dsv3_jax.data import (
    ByteTokenizer,
    DataConfig,
    PrepareOptions,
    TrainIterator,
    load_tokenizer,
    open_sources,
    preparation,
    prepare,
    train_iterator,
    validation_batches,
)
from dsv3_jax.data.shards import FORMAT, Prepared
from dsv3_jax.data.workers import Workers
from dsv3_jax.integrity import seal

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text("".join(f"<{i:02d}.{j:03d}>" for j in range(1 + i)))
    return DataConfig(source=str(folder), sequence_length=16, validation_fraction=0.2, seed=1)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def concatenate(batches):
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def test_batches_are_int32_of_the_asked_shape(config):
    batch = next(train_iterator(config, TOKENIZER, 4))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == dict.fromkeys(
        ("tokens", "targets", "segments", "positions"), ((4, 16), np.dtype(np.int32))
    )


@given(st.data())
@settings(deadline=None, max_examples=25)
def test_resume_anywhere_equals_straight_run(config, data):
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=10))  # epochs end inside batches
    stop = data.draw(st.integers(0, len(sizes) - 1))
    straight = train_iterator(config, TOKENIZER, 1)
    for size in sizes[:stop]:
        straight.next_batch(size)
    state = json.loads(json.dumps(straight.get_state()))
    resumed = train_iterator(config, TOKENIZER, 7)
    resumed.next_batch(data.draw(st.sampled_from([3, sizes[stop]])))  # what it did before doesn't matter
    resumed.set_state(state)
    for size in sizes[stop:]:
        assert_same(resumed.next_batch(size), straight.next_batch(size))
    assert resumed.get_state() == straight.get_state()


@pytest.fixture(scope="module")
def mixed(config, tmp_path_factory):
    """Three sources, one of them prepared before, whose weights change twice."""
    root = tmp_path_factory.mktemp("mixture")
    for i in range(12):
        (root / f"{i}.md").write_text(f"[{i}]" * 40)
    prepared = root / "prepared"
    prepare([config.source], prepared, PrepareOptions(validation_fraction=0.2, shard_tokens=500))
    sources = (f"a={config.source}:0.7", f"b={root / '3.md'}:0.1", f"c={prepared}:0.2")
    reweight = ("320:a=1,b=0,c=1", "960:a=0.1,b=0.2,c=0.7")
    return DataConfig(
        sources=sources, reweight=reweight, sequence_length=16, validation_fraction=0, max_document_characters=40
    )


@given(st.data())
@settings(max_examples=20)
def test_a_mixture_goes_on_with_any_batch_size_and_process_count(mixed, data):
    straight = train_iterator(mixed, TOKENIZER, 1)
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    stop, processes = data.draw(st.integers(0, 100)), data.draw(st.sampled_from([1, 2, 4]))
    for _ in range(stop):
        next(straight)
    state = json.loads(json.dumps(straight.get_state()))
    parts = [train_iterator(mixed, TOKENIZER, 1) for _ in range(processes)]
    for part in parts:
        part.set_state(state)
    for size in (n * processes for n in sizes):
        rows = np.split(np.arange(size), processes)
        together = concatenate([p.next_batch(size, mine) for p, mine in zip(parts, rows, strict=True)])
        assert_same(together, concatenate([next(straight) for _ in range(size)]))
    assert all(part.get_state() == straight.get_state() for part in parts)
    assert sum(straight.get_state()["taken"]) == stop + sum(sizes) * processes


def test_a_mixture_takes_each_source_in_its_own_order(mixed):
    it = train_iterator(mixed, TOKENIZER, 1)
    alone = [iter_alone(source) for source in it._rows.sources]
    taken = [0, 0, 0]
    for n in range(120):
        row = next(it)
        (chosen,) = np.flatnonzero(np.array(it.get_state()["taken"]) - taken)
        taken = it.get_state()["taken"]
        assert_same({k: v[0] for k, v in row.items()}, alone[chosen](taken[chosen] - 1))
        assert all(abs(t - it._mixture.due(i, n + 1)) < 1 for i, t in enumerate(taken))
    assert it.metrics()["epochs/b"] == taken[1] / len(it._rows.sources[1])


def iter_alone(source):
    return lambda index: source[index]


def test_a_worker_that_ends_before_it_has_read_what_it_needs_is_named(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with Workers(1, bytes(2**22)) as workers, pytest.raises(ConfigError, match=r"ended early \(exit status 1\)"):
        workers.submit("hex").result()


def test_worker_processes_read_the_same(config):
    here, there = (train_iterator(dataclasses.replace(config, workers=n), TOKENIZER, 5) for n in (0, 1))
    try:
        for size in (5, 5, 3):
            assert_same(here.next_batch(size), there.next_batch(size))
    finally:
        there.stop()


def test_a_flipped_bit_and_another_tokenizer_are_named(config, tmp_path):
    prepared = prepare([config.source], tmp_path / "p", PrepareOptions(validation_fraction=0))
    (shard,) = prepared.index["training"]
    path = tmp_path / "p" / shard["file"]
    data = bytearray(path.read_bytes())
    where = data.index(b"<\0" + b"2\0" + b"9\0")  # in the middle of some text
    data[where] ^= 1
    path.write_bytes(data)
    it = train_iterator(DataConfig(source=str(tmp_path / "p"), sequence_length=16), TOKENIZER, 1)
    with pytest.raises(ValueError, match=r"training-00000\.array_record is damaged near record"):
        it.next_batch(epoch_length(it))
    with pytest.raises(ValueError, match=r"training-00000\.array_record is not what was written"):
        prepared.check_hashes()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"has \d+ bytes, index.json says"):
        train_iterator(DataConfig(source=str(tmp_path / "p"), sequence_length=16), TOKENIZER, 1)
    index = tmp_path / "p" / "index.json"
    index.write_text(index.read_text().replace("uint16", "uint32"))
    with pytest.raises(ValueError, match=r"index\.json is not what was written"):
        train_iterator(DataConfig(source=str(tmp_path / "p"), sequence_length=16), TOKENIZER, 1)
    other = load_tokenizer(Path(__file__).parents[1] / "golden/tokenizers/deepseek")
    prepare([config.source], tmp_path / "q", PrepareOptions())
    with pytest.raises(ValueError, match="was prepared with another tokenizer"):
        train_iterator(DataConfig(source=str(tmp_path / "q"), sequence_length=16), other, 1)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_rows_of_all_processes_are_the_batch(config, sizes, processes):
    whole = train_iterator(config, TOKENIZER, 1)
    parts = [train_iterator(config, TOKENIZER, 1) for _ in range(processes)]
    for size in (n * processes for n in sizes):
        rows = np.split(np.arange(size), processes)
        batches = [part.next_batch(size, mine) for part, mine in zip(parts, rows, strict=True)]
        assert_same(concatenate(batches), whole.next_batch(size))
    assert all(part.get_state() == whole.get_state() for part in parts)


def test_batch_size_does_not_change_the_order(config):
    one, many = train_iterator(config, TOKENIZER, 1), train_iterator(config, TOKENIZER, 60)
    assert_same(concatenate([next(one) for _ in range(60)]), next(many))


def epoch_length(it):
    return len(it._rows.sources[0])


def test_every_sequence_once_an_epoch(config):
    it = train_iterator(config, TOKENIZER, 1)
    packed = it._rows.sources[0].parents[0]
    n = epoch_length(it)
    epochs = [[next(it)["tokens"].tobytes() for _ in range(n)] for _ in range(2)]
    for e, epoch in enumerate(epochs):
        assert sorted(epoch) == sorted(packed[e * n + i]["tokens"].tobytes() for i in range(n))
    assert epochs[0] != epochs[1]


def test_the_same_in_another_process(config):
    code = (
        "import sys, hashlib; from dsv3_jax.data import *;"
        f"it = train_iterator({config!r}, load_tokenizer(), 8);"
        "it.set_state({'taken': [100], 'fingerprint': it.get_state()['fingerprint']});"
        "print(hashlib.sha256(next(it)['tokens'].tobytes()).hexdigest(), it.get_state()['fingerprint'])"
    )
    seen = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    it = train_iterator(config, TOKENIZER, 8)
    fingerprint = it.get_state()["fingerprint"]
    it.set_state({"taken": [100], "fingerprint": fingerprint})
    digest = hashlib.sha256(next(it)["tokens"].tobytes()).hexdigest()
    assert seen.split() == [digest, fingerprint]


def test_is_a_grain_iterator(config):
    it = train_iterator(config, TOKENIZER, 4)
    assert isinstance(it, grain.DatasetIterator)
    grain.experimental.assert_equal_output_after_checkpoint(_Few(config))


class _Few(grain.IterDataset):
    """grain's own check of checkpoints iterates to the end: five batches."""

    def __init__(self, config):
        super().__init__()
        self._config = config

    def __iter__(self):
        class Ending(TrainIterator):
            def __next__(self):
                if self._taken[0] >= 20:
                    raise StopIteration
                return super().__next__()

        it = train_iterator(self._config, TOKENIZER, 4)
        return Ending({"data": it._rows.sources[0]}, it._mixture, 4, fingerprint=it._fingerprint)


def test_state_of_other_data_is_refused(config):
    state = train_iterator(config, TOKENIZER, 4).get_state()
    for changed in (
        {"seed": 2},
        {"sequence_length": 15},
        {"validation_fraction": 0.5},
        {"max_document_characters": 50},
    ):
        with pytest.raises(ValueError, match="data is not what it was"):
            train_iterator(DataConfig(**{**vars(config), **changed}), TOKENIZER, 4).set_state(state)


def test_training_and_validation_share_no_document(config):
    def documents(batches):
        text = "|".join(TOKENIZER.decode(row) for b in batches for row in b["tokens"])
        return set(re.findall(r"<(\d\d)\.\d{3}>", text))

    it = train_iterator(config, TOKENIZER, 1)
    trained = documents(next(it) for _ in range(3 * epoch_length(it)))
    validated = documents(validation_batches(config, TOKENIZER, 1, 1000))
    assert not trained & validated
    assert len(trained) > len(validated) > 0
    assert len(trained | validated) >= 28  # of 30: the end of an epoch may be lost


def test_validation_is_the_same_every_time(config):
    first, second = (validation_batches(config, TOKENIZER, 3, 2) for _ in range(2))
    assert [b["tokens"].shape for b in first] == [(3, 16)] * 2
    assert_same(first, second)
    rows = np.concatenate([b["tokens"] for b in first])
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_small_validation_gives_what_there_is(config):
    everything = validation_batches(config, TOKENIZER, 1, 10**6)
    (only,) = validation_batches(config, TOKENIZER, 10**6, 5)
    assert_same(only, concatenate(everything))


def test_without_documents_held_out_there_is_no_validation(config):
    nothing = dataclasses.replace(config, validation_fraction=0)
    with pytest.raises(ConfigError, match="holds out no documents for validation"):
        validation_batches(nothing, TOKENIZER, 1, 1)


def test_the_default_corpus_trains_and_validates():
    config = DataConfig(sequence_length=256)
    assert next(train_iterator(config, TOKENIZER, 16))["tokens"].max() < TOKENIZER.vocab_size
    assert len(validation_batches(config, TOKENIZER, 16, 8)) == 8


def test_errors_name_what_would_be_right(tmp_path):
    (tmp_path / "only.txt").write_text("one document\n" * 50)
    config = DataConfig(source=str(tmp_path), sequence_length=8)
    with pytest.raises(ValueError, match=r"no document .* is for validation.*max_document_characters"):
        validation_batches(config, TOKENIZER, 1, 1)
    cut = DataConfig(source=str(tmp_path), sequence_length=8, max_document_characters=40)
    assert validation_batches(cut, TOKENIZER, 1, 1)
    with pytest.raises(ValueError, match=r"training part .* too few for one sequence of 9000 tokens"):
        train_iterator(DataConfig(source=str(tmp_path), sequence_length=9000), TOKENIZER, 1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        train_iterator(config, TOKENIZER, 1).next_batch(0)


def test_texts_are_never_prepared_with_another_tokenizer_than_the_one_given(tmp_path, monkeypatch):
    """The cache would take bytes for the tokens of the tokenizer that was given, also later."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = RustTokenizer(models.WordLevel({"<eos>": 0, "hello": 1}, unk_token="<eos>"))
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("hello")
    config = DataConfig(source=str(tmp_path / "a.txt"), validation_fraction=0)
    path = str(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"data\.tokenizer is bytes, not the tokenizer that was given"):
        open_sources(config, load_tokenizer(path))
    for opened in (
        open_sources(config, load_tokenizer(path), path),
        open_sources(dataclasses.replace(config, tokenizer=path), load_tokenizer(path)),
    ):
        (document,) = opened["data"].split("training").read(0, [(0, opened["data"].split("training").tokens)])
        assert document.tolist() == [0, 1]
    with pytest.raises(ConfigError, match="not the tokenizer that was given"):
        open_sources(dataclasses.replace(config, tokenizer=path), TOKENIZER)


@pytest.mark.parametrize(
    ("field", "value"),
    [("sequence_length", 0), ("validation_fraction", 1.0), ("seed", -1), ("max_document_characters", 0)],
)
def test_config_is_validated(field, value):
    with pytest.raises(ValueError, match=rf"data\.{field} is {value}"):
        DataConfig(**{field: value})


def test_unfinished_work_in_the_cache_doesnt_hinder_the_same_texts_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def interrupted(*_):
        raise KeyboardInterrupt

    configs = []
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("hello")
        configs.append(DataConfig(source=str(tmp_path / name), validation_fraction=0))
    with monkeypatch.context() as patched:
        patched.setattr(preparation._Job, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_sources(configs[0], TOKENIZER)
    assert open_sources(configs[1], TOKENIZER)["data"].index["sources"][0]["documents"] == 1


def test_load_tokenizer_default_is_bytes():
    assert isinstance(load_tokenizer(), ByteTokenizer)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b"])
def test_an_index_names_no_file_outside_of_its_directory(tmp_path, name):
    shard = {"file": name, "bytes": 1, "documents": 1, "tokens": 1, "block_ends": [1], "xxh3_128": ""}
    index = {"format": FORMAT, "training": [shard], "validation": [], "dtype": "uint16", "tokenizer": {}}
    (tmp_path / "index.json").write_text(json.dumps(seal(index)))
    with pytest.raises(ConfigError, match="it must be the name of a file beside it"):
        Prepared.open(tmp_path)
