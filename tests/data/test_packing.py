"""Packing against grain's own concat-then-split, and against its definition."""

import itertools

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError
from dsv3_jax.data import ByteTokenizer, Corpus, PackedSequences, tokenize

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def corpus(lengths):
    """Documents whose tokens are all different, so that a token tells where it was."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return Corpus(np.arange(offsets[-1], dtype=np.uint16), offsets)


def epoch_stream(corpus, order):
    return np.concatenate([corpus.tokens[corpus.offsets[d] : corpus.offsets[d + 1]] for d in order])


def packed_or_none(corpus, length, seed=0, **how):
    if len(corpus.tokens) <= length:
        with pytest.raises(ValueError, match="too few"):
            PackedSequences(corpus, length, seed, **how)
        return None
    return PackedSequences(corpus, length, seed, **how)


@given(lengths, st.integers(1, 16), st.integers(0, 2**32 - 1), st.integers(0, 3))
@settings(deadline=None)
def test_every_token_in_order_once(lengths, length, seed, epoch):
    data = corpus(lengths)
    packed = packed_or_none(data, length, seed, mask_documents=False)
    if packed is None:
        return
    rows = [packed[epoch * len(packed) + i] for i in range(len(packed))]
    assert all(v.shape == (length,) and v.dtype == np.int32 for row in rows for v in row.values())
    tokens = np.concatenate([row["tokens"] for row in rows])
    targets = np.concatenate([row["targets"] for row in rows])
    # Recover the documents' order from where each begins, and rebuild the epoch from it.
    document = np.searchsorted(data.offsets, np.append(tokens, targets[-1]), side="right") - 1
    order = list(dict.fromkeys(document.tolist()))
    stream = epoch_stream(data, order)[: len(tokens) + 1]
    np.testing.assert_array_equal(tokens, stream[:-1])
    np.testing.assert_array_equal(targets, stream[1:])
    assert data.offsets[-1] - 1 - len(tokens) < length  # what is dropped is less than a sequence
    # With documents masked, a last target of another document isn't one.
    masked = PackedSequences(data, length, seed)
    for i, row in enumerate(rows):
        expected = row["targets"].copy()
        if document[(i + 1) * length] != document[(i + 1) * length - 1]:
            expected[-1] = -100
        np.testing.assert_array_equal(masked[epoch * len(packed) + i]["targets"], expected)


@given(lengths, st.integers(1, 16), st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_equals_grain_concat_then_split(lengths, length, epoch):
    data = corpus(lengths)
    packed = packed_or_none(data, length)
    if packed is None:
        return
    order, _ = packed._epoch_order(epoch)
    documents = [{"x": data.tokens[data.offsets[d] : data.offsets[d + 1]].astype(np.int32)} for d in order]
    theirs = grain.experimental.ConcatThenSplitIterDataset(
        grain.MapDataset.source(documents).to_iter_dataset(grain.ReadOptions(num_threads=0)),
        length_struct={"x": length},
        split_full_length_features=True,
    )
    for i, row in zip(range(len(packed)), itertools.islice(theirs, len(packed)), strict=True):
        mine = packed[epoch * len(packed) + i]
        np.testing.assert_array_equal(mine["tokens"], row["x"])
        np.testing.assert_array_equal(mine["segments"], row["x_segment_ids"])
        np.testing.assert_array_equal(mine["positions"], row["x_positions"])


def test_epochs_differ_and_repeat():
    packed = PackedSequences(corpus([5] * 40), 7, seed=3)
    again = PackedSequences(corpus([5] * 40), 7, seed=3)
    n = len(packed)
    first, second = packed[0]["tokens"], packed[n]["tokens"]
    assert (first != second).any()
    np.testing.assert_array_equal(again[n]["tokens"], second)  # from scratch, without epoch 0 before it
    np.testing.assert_array_equal(packed[0]["tokens"], first)
    assert (PackedSequences(corpus([5] * 40), 7, seed=4)[0]["tokens"] != first).any()


def test_tokenize_puts_bos_and_eos_around_documents():
    result = tokenize(["ab", "é"], ByteTokenizer())
    assert result.tokens.tolist() == [256, 97, 98, 257, 256, 0xC3, 0xA9, 257]
    assert result.offsets.tolist() == [0, 4, 8]
    assert result.tokens.dtype == np.uint16


class Strange(ByteTokenizer):
    def __init__(self, ids, vocab_size=259, eos_id=257):
        self.ids, self.vocab_size, self.eos_id = np.array(ids, np.int32), vocab_size, eos_id

    def encode(self, text):
        return self.ids


def test_one_separator_when_bos_is_eos():
    assert tokenize(["a", "b"], Strange([7], eos_id=256)).tokens.tolist() == [256, 7, 256, 7]


def test_large_vocabulary_keeps_ids():
    assert tokenize(["a"], Strange([128_000], vocab_size=129_280)).tokens.tolist() == [256, 128_000, 257]


@pytest.mark.parametrize("bad", [-1, 259, 65_536 + 5])
def test_id_outside_vocabulary_is_named(bad):
    with pytest.raises(ValueError, match=rf"token id {bad}, outside its vocab_size of 259"):
        tokenize(["a"], Strange([1, bad]))


def test_a_document_that_a_tokenizer_fails_on_is_named():
    class Picky(ByteTokenizer):
        def encode(self, text):
            if "!" in text:
                raise Exception("no token for '!'")
            return super().encode(text)

    with pytest.raises(ConfigError, match=r"the document that begins 'b! and': no token for '!'"):
        tokenize(["a", "b! and", "c"], Picky())


def test_fingerprint_tells_tokens_and_boundaries():
    base = tokenize(["ab", "cd"], ByteTokenizer()).fingerprint()
    assert base == tokenize(["ab", "cd"], ByteTokenizer()).fingerprint()
    assert base != tokenize(["ab", "ce"], ByteTokenizer()).fingerprint()
    assert corpus([2, 3]).fingerprint() != corpus([3, 2]).fingerprint()
