"""Documents one after another, cut into sequences of one length (report section 4.1: document packing)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence

import grain
import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised documents in memory."""

    tokens: np.ndarray
    """(N,) uint16 or int32: the documents one after another."""
    offsets: np.ndarray
    """(documents + 1,) int64: document i is tokens[offsets[i]:offsets[i + 1]], and no document is empty."""

    def fingerprint(self) -> str:
        """Equal for equal documents and tokens in equal order, and else not."""
        digest = hashlib.blake2b(self.offsets.tobytes(), digest_size=16)
        digest.update(np.ascontiguousarray(self.tokens).data)
        return digest.hexdigest()


def tokenize(documents: Sequence[str], tokenizer: Tokenizer) -> Corpus:
    """Tokenises documents, each as bos, text, eos; only eos and text where the two are one token.

    Raises:
      ConfigError: the tokenizer fails on a document, or gives an id outside its vocabulary.
    """
    size, bos, eos = tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id
    dtype = np.uint16 if size <= 2**16 else np.int32
    end = [] if bos == eos else [eos]

    pieces = []
    for texts in itertools.batched(documents, 256):  # a library's encodings are far larger than their ids
        for encoded in _encode(texts, tokenizer):
            ids = np.concatenate([[bos], encoded, end]).astype(np.int64)
            if ids.min() < 0 or ids.max() >= size:
                bad = ids[(ids < 0) | (ids >= size)][0]
                raise ConfigError(f"the tokenizer gave token id {bad}, outside its vocab_size of {size}")
            pieces.append(ids.astype(dtype))
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return Corpus(np.concatenate(pieces) if pieces else np.empty(0, dtype), offsets)


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    try:
        return tokenizer.encode_batch(texts)
    except Exception:  # libraries raise nothing narrower
        for text in texts:
            try:
                tokenizer.encode(text)
            except Exception as error:
                raise ConfigError(f"the tokenizer fails on the document that begins {text[:60]!r}: {error}") from None
        raise


class PackedSequences(grain.MapDataset):
    """Sequences of T tokens by index; index `epoch * len(self) + i` is sequence i of that epoch.

    An epoch puts the documents into a new order and cuts them into sequences that overlap by one token: the last
    target of one is the first token of the next. So every token but the first is a target once, except for the
    fewer than T tokens at the epoch's end.

    Elements are dicts of (T,) int32: `tokens`; `targets`, one token ahead; `segments`, the number of the token's
    document within the sequence, from 1; `positions`, the token's index within its segment. With `mask_documents`, a
    last target that is of another document is -100: the sequence's segments can't tell.

    Raises:
      ConfigError: the corpus is shorter than one sequence and its last target.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int, *, mask_documents: bool = True) -> None:
        super().__init__()
        self._corpus, self._length, self._seed, self._mask_documents = corpus, sequence_length, seed, mask_documents
        self._lengths = np.diff(corpus.offsets)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        if len(self) < 1:
            raise ConfigError(
                f"{len(self._lengths)} documents of {len(corpus.tokens)} tokens in all are too few for one sequence of "
                f"{sequence_length} tokens and its last target: give more text or lower data.sequence_length"
            )

    def __len__(self) -> int:
        return max(len(self._corpus.tokens) - 1, 0) // self._length

    def __getitem__(self, index):  # untyped, as in the base class: an int, or a slice for a dataset
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(int(index), len(self))
        order, starts = self._epoch_order(epoch)
        where = row * self._length + np.arange(self._length)
        begin, end = where[0], where[-1] + 2  # with the last target
        first, last = np.searchsorted(starts, [begin, end - 1], side="right") - 1
        pieces = []
        for k in range(first, last + 1):
            at = self._corpus.offsets[order[k]] - starts[k]  # from place in the epoch to place in the corpus
            stop = min(end, starts[k] + self._lengths[order[k]])
            pieces.append(self._corpus.tokens[at + max(begin, starts[k]) : at + stop])
        tokens = np.concatenate(pieces).astype(np.int32)
        segments = np.searchsorted(starts[first : last + 1], where, side="right")
        positions = where - np.maximum(starts[first + segments - 1], begin)
        targets = tokens[1:].copy()
        if self._mask_documents and starts[last] == end - 1:
            targets[-1] = -100
        return {
            "tokens": tokens[:-1],
            "targets": targets,
            "segments": segments.astype(np.int32),
            "positions": positions.astype(np.int32),
        }

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents' order, and where in the epoch each begins."""
        cached = self._epoch  # read once: another thread may replace it
        if cached is None or cached[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._lengths))
            lengths = self._lengths[order]
            cached = self._epoch = (epoch, order, np.cumsum(lengths) - lengths)
        return cached[1], cached[2]
