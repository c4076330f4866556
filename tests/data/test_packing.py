"""Packing against grain's own concat-then-split, and against its definition."""

import itertools
import tempfile
from pathlib import Path

import grain
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3_jax.data import BestFitSequences, PackedSequences
from dsv3_jax.data import shards as shards_module
from dsv3_jax.training.losses import predictable
from tests.data.corpora import counted, documents

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Records of 16 tokens and blocks of 4 documents: everything is cut somewhere."""
    monkeypatch.setattr(shards_module, "CHUNK", 16)
    monkeypatch.setattr(shards_module, "BLOCK", 4)


def packed_or_none(data, length, seed=0, **how):
    if data.tokens <= length:
        with pytest.raises(ValueError, match="too few"):
            PackedSequences(data, length, seed, **how)
        return None
    return PackedSequences(data, length, seed, **how)


@given(lengths, st.integers(1, 16), st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(1, 3))
def test_every_token_in_order_once(lengths, length, seed, epoch, shards):
    with tempfile.TemporaryDirectory() as folder:
        data, offsets = counted(Path(folder), lengths, shards=shards)
        check_every_token_once(data, offsets, length, seed, epoch)


any_length = st.floats(0, 6).map(lambda power: round(10**power)) | st.sampled_from([1, 4095, 4096, 4097, 10**6])


@given(st.lists(any_length, min_size=1, max_size=9), st.integers(1000, 9000), st.integers(0, 3), st.integers(1, 3))
@example([1, 10**6, 2, 7, 4096, 4097, 100_000, 1, 1, 33_333], 4096, 2, 3)
@settings(max_examples=8)
def test_every_token_once_of_lengths_from_1_to_a_million(lengths, length, epoch, shards):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(shards_module, "CHUNK", 8192)
        data, offsets = counted(Path(folder), lengths, shards=shards)
        check_every_token_once(data, offsets, length, 5, epoch)


def check_every_token_once(data, offsets, length, seed, epoch):
    packed = packed_or_none(data, length, seed, mask_documents=False)
    if packed is None:
        return
    rows = [packed[epoch * len(packed) + i] for i in range(len(packed))]
    assert all(v.shape == (length,) and v.dtype == np.int32 for row in rows for v in row.values())
    tokens = np.concatenate([row["tokens"] for row in rows])
    targets = np.concatenate([row["targets"] for row in rows])
    # Recover the documents' order from where each begins, and rebuild the epoch from it.
    document = np.searchsorted(offsets, np.append(tokens, targets[-1]), side="right") - 1
    order = document[np.insert(np.diff(document) != 0, 0, True)]
    assert len(np.unique(order)) == len(order)
    stream = np.concatenate([np.arange(offsets[d], offsets[d + 1]) for d in order])[: len(tokens) + 1]
    np.testing.assert_array_equal(tokens, stream[:-1])
    np.testing.assert_array_equal(targets, stream[1:])
    assert offsets[-1] - 1 - len(tokens) < length  # what is dropped is less than a sequence
    # With documents masked, a last target of another document isn't one.
    masked = PackedSequences(data, length, seed)
    for i, row in enumerate(rows):
        expected = row["targets"].copy()
        if document[(i + 1) * length] != document[(i + 1) * length - 1]:
            expected[-1] = -100
        np.testing.assert_array_equal(masked[epoch * len(packed) + i]["targets"], expected)


@given(lengths, st.integers(1, 16), st.integers(0, 3))
@settings(max_examples=20)
def test_equals_grain_concat_then_split(lengths, length, epoch):
    with tempfile.TemporaryDirectory() as folder:
        data, _ = counted(Path(folder), lengths)
        packed = packed_or_none(data, length)
        if packed is None:
            return
        blocks, _ = packed._blocks(epoch)
        texts = []
        for block in blocks:
            _, sizes, places = packed._block(epoch, int(block))
            texts += [{"x": np.arange(p, p + n, dtype=np.int32)} for p, n in zip(places, sizes, strict=True)]
        theirs = grain.experimental.ConcatThenSplitIterDataset(
            grain.MapDataset.source(texts).to_iter_dataset(grain.ReadOptions(num_threads=0)),
            length_struct={"x": length},
            split_full_length_features=True,
        )
        for i, row in zip(range(len(packed)), itertools.islice(theirs, len(packed)), strict=True):
            mine = packed[epoch * len(packed) + i]
            np.testing.assert_array_equal(mine["tokens"], row["x"])
            np.testing.assert_array_equal(mine["segments"], row["x_segment_ids"])
            np.testing.assert_array_equal(mine["positions"], row["x_positions"])


def test_documents_of_a_block_are_shuffled_in_each_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "BLOCK", 64)
    data, _ = counted(tmp_path, [5] * 64)
    packed = PackedSequences(data, 319, 0)
    orders = [tuple(packed[epoch]["tokens"][::5] // 5) for epoch in range(4)]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len({*orders, tuple(range(64))}) == 5


def test_epochs_differ_and_repeat(tmp_path):
    data, _ = counted(tmp_path, [5] * 40)
    packed, again = PackedSequences(data, 7, seed=3), PackedSequences(data, 7, seed=3)
    n = len(packed)
    first, second = packed[0]["tokens"], packed[n]["tokens"]
    assert (first != second).any()
    np.testing.assert_array_equal(again[n]["tokens"], second)  # from scratch, without epoch 0 before it
    np.testing.assert_array_equal(packed[0]["tokens"], first)
    assert (PackedSequences(data, 7, seed=4)[0]["tokens"] != first).any()


@given(lengths.filter(lambda many: max(many) > 1), st.integers(1, 16))
def test_best_fit_cuts_no_document_that_fits(lengths, length):
    with tempfile.TemporaryDirectory() as folder:
        data, offsets = counted(Path(folder), lengths, shards=2)
        packed = BestFitSequences(data, length, 0)
        seen = []
        for i in range(len(packed)):
            row = packed[i]
            real = row["segments"] > 0
            np.testing.assert_array_equal(row["targets"][~real], -100)
            aim = row["targets"] != -100
            np.testing.assert_array_equal(row["targets"][aim], row["tokens"][aim] + 1)  # of the same document
            trained = predictable({name: jnp.asarray(values)[None] for name, values in row.items()}, 1)[0]
            np.testing.assert_array_equal(trained, aim)  # and the loss takes every one, the documents' last tokens too
            for segment in np.unique(row["segments"][real]):
                at = row["segments"] == segment
                np.testing.assert_array_equal(row["positions"][at], np.arange(at.sum()))
                document = np.searchsorted(offsets, row["tokens"][at][0], side="right") - 1
                if lengths[document] - 1 <= length:
                    assert (at & aim).sum() == lengths[document] - 1
            seen += row["targets"][aim].tolist()
        every = np.setdiff1d(np.arange(offsets[-1]), offsets)  # all but the documents' first tokens
        np.testing.assert_array_equal(np.sort(seen), every)


def test_complements_are_tokens_that_are_no_targets(tmp_path):
    data = documents(tmp_path, [[~1, ~2, 3, 4, ~5, 6]])
    row = PackedSequences(data, 5, 0)[0]
    assert row["tokens"].tolist() == [1, 2, 3, 4, 5]
    assert row["targets"].tolist() == [-100, 3, 4, -100, 6]
    assert BestFitSequences(data, 5, 0)[0]["targets"].tolist() == [-100, 3, 4, -100, 6]
