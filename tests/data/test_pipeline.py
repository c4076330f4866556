"""Batches: exact resumption, parts of a batch, changing batch sizes, validation apart from training."""

import hashlib
import json
import re
import subprocess
import sys

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import (
    ByteTokenizer,
    DataConfig,
    TrainIterator,
    load_tokenizer,
    train_iterator,
    validation_batches,
)

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
    resumed.next_batch(3)  # what it did before doesn't matter
    resumed.set_state(state)
    for size in sizes[stop:]:
        assert_same(resumed.next_batch(size), straight.next_batch(size))
    assert resumed.get_state() == straight.get_state()


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
    return len(it._sequences.parents[0])


def test_every_sequence_once_an_epoch(config):
    it = train_iterator(config, TOKENIZER, 1)
    packed = it._sequences.parents[0].parents[0]
    n = epoch_length(it)
    epochs = [[next(it)["tokens"].tobytes() for _ in range(n)] for _ in range(2)]
    for e, epoch in enumerate(epochs):
        assert sorted(epoch) == sorted(packed[e * n + i]["tokens"].tobytes() for i in range(n))
    assert epochs[0] != epochs[1]


def test_the_same_in_another_process(config):
    code = (
        "import sys, hashlib; from dsv3_jax.data import *;"
        f"it = train_iterator({config!r}, load_tokenizer(), 8);"
        "it.set_state({'next_sequence': 100, 'fingerprint': it.get_state()['fingerprint']});"
        "print(hashlib.sha256(next(it)['tokens'].tobytes()).hexdigest(), it.get_state()['fingerprint'])"
    )
    seen = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    it = train_iterator(config, TOKENIZER, 8)
    fingerprint = it.get_state()["fingerprint"]
    it.set_state({"next_sequence": 100, "fingerprint": fingerprint})
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
                if self._next_sequence >= 20:
                    raise StopIteration
                return super().__next__()

        it = train_iterator(self._config, TOKENIZER, 4)
        return Ending(it._sequences, 4, fingerprint=it._fingerprint)


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


@pytest.mark.parametrize(
    ("field", "value"),
    [("sequence_length", 0), ("validation_fraction", 1.0), ("seed", -1), ("max_document_characters", 0)],
)
def test_config_is_validated(field, value):
    with pytest.raises(ValueError, match=rf"data\.{field} is {value}"):
        DataConfig(**{field: value})


def test_load_tokenizer_default_is_bytes():
    assert isinstance(load_tokenizer(), ByteTokenizer)
