"""Packing of documents into sequences of one length: concatenated (report section 4.1), or whole by best fit."""

from __future__ import annotations

import bisect
import functools
from typing import Any

import grain
import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data.shards import Documents

IGNORE = -100
"""The target at masked positions."""


class PackedSequences(grain.MapDataset):  # type: ignore[misc]  # grain has no types
    """Sequences of T tokens by index; index `epoch * len(self) + i` is sequence i of that epoch.

    Each epoch permutes blocks of documents, and the documents within each block, and cuts the stream into sequences
    that overlap by one token: the last target of one is the first token of the next. So every token but the first is a
    target once, except for fewer than T tokens at the end of the epoch.

    Elements are dicts of (T,) int32: `tokens`; `targets`, one token ahead; `segments`, the number of the token's
    document within the sequence, from 1; `positions`, the token's index within its segment. With `mask_documents`, a
    last target in another document is -100, since the segments of the sequence don't show it. In chats, targets that
    the assistant didn't write are -100.

    Memory grows with the number of blocks: 24 bytes for `BLOCK` documents.

    Raises:
      ConfigError: the documents are shorter than one sequence and its last target.
    """

    def __init__(self, documents: Documents, sequence_length: int, seed: int, *, mask_documents: bool = True) -> None:
        super().__init__()
        self._documents, self._length, self._seed = documents, sequence_length, seed
        self._mask_documents = mask_documents
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        _check_enough(self, documents, sequence_length)

    def __len__(self) -> int:
        return max(self._documents.tokens - 1, 0) // self._length

    def __getitem__(self, index: Any) -> Any:  # as in the base class: an int, or a slice for a dataset
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(int(index), len(self))
        begin = row * self._length
        end = begin + self._length + 1  # with the last target
        blocks, block_starts = self._blocks(epoch)
        pieces, starts = [], []  # of each document: its tokens, and where it begins in the epoch
        for k in range(int(np.searchsorted(block_starts, begin, side="right")) - 1, len(blocks)):
            if block_starts[k] >= end:
                break
            shard, lengths, places = self._block(epoch, int(blocks[k]))
            ends = block_starts[k] + np.cumsum(lengths)
            first = int(np.searchsorted(ends, begin, side="right"))
            last = min(int(np.searchsorted(ends, end, side="left")) + 1, len(ends))
            spans = []
            for d in range(first, last):
                start = int(ends[d] - lengths[d])
                at = int(places[d]) - start  # from place in the epoch to place in the shard
                spans.append((at + max(begin, start), at + min(end, int(ends[d]))))
                starts.append(start)
            pieces += self._documents.read(shard, spans)
        tokens = np.concatenate(pieces).astype(np.int32)
        where = np.arange(begin, end - 1)
        of = np.searchsorted(starts, where, side="right")
        positions = where - np.maximum(np.array(starts)[of - 1], begin)
        element = _element(tokens[:-1], tokens[1:], of, positions)
        if self._mask_documents and starts[-1] == end - 1:
            element["targets"][-1] = IGNORE
        return element

    def _blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the order of blocks, and where in the epoch each begins."""
        cached = self._epoch  # read once: another thread may replace it
        if cached is None or cached[0] != epoch:
            tokens = self._documents.block_tokens
            order = np.random.default_rng([self._seed, epoch]).permutation(len(tokens))
            cached = self._epoch = (epoch, order, np.cumsum(tokens[order]) - tokens[order])
        return cached[1], cached[2]

    def _block(self, epoch: int, block: int) -> tuple[int, np.ndarray, np.ndarray]:
        return _shuffled_block(self._documents, self._seed, epoch, block)


@functools.lru_cache(maxsize=128)
def _shuffled_block(documents: Documents, seed: int, epoch: int, block: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Returns the shard of a block, and the lengths and places of its documents, in the epoch's order."""
    shard, bounds = documents.block(block)
    order = np.random.default_rng([seed, epoch, block]).permutation(len(bounds) - 1)
    return shard, np.diff(bounds)[order], bounds[order]


class BestFitSequences(grain.MapDataset):  # type: ignore[misc]  # grain has no types
    """Sequences of whole documents by index, as in `PackedSequences`; a longer document is cut at T targets.

    The documents of a block are packed by best fit, longest first (Ding et al., "Fewer Truncations Improve Language
    Modeling", 2024): each into the sequence with the least room that fits it. The rest of a sequence is padding: tokens
    0, targets -100, segment 0. A document's first token isn't a target. Its last token is also an input, with target
    -100, since a target is masked if the next position belongs to another segment.
    """

    def __init__(self, documents: Documents, sequence_length: int, seed: int) -> None:
        super().__init__()
        self._documents, self._length, self._seed = documents, sequence_length, seed
        blocks = range(len(documents.block_tokens))
        counts = [len(_best_fit(documents, block, sequence_length)[2]) - 1 for block in blocks]
        self._starts = np.cumsum([0, *counts])
        _check_enough(self, documents, sequence_length)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        row = int(index) % len(self)
        block = int(np.searchsorted(self._starts, row, side="right")) - 1
        shard, spans, firsts = _best_fit(self._documents, block, self._length)
        nth = row - int(self._starts[block])
        pieces = self._documents.read(shard, spans[firsts[nth] : firsts[nth + 1]].tolist())
        arrays = {name: np.zeros(self._length, np.int32) for name in ("tokens", "targets", "segments", "positions")}
        arrays["targets"][:] = IGNORE
        start = 0
        for number, piece in enumerate(pieces, 1):
            tokens, size = piece.astype(np.int32), min(len(piece), self._length)
            targets = np.append(tokens[1:], IGNORE)
            element = _element(tokens[:size], targets[:size], np.full(size, number), np.arange(size))
            for name, values in element.items():
                arrays[name][start : start + size] = values
            start += size
        return arrays


@functools.lru_cache(maxsize=128)
def _best_fit(documents: Documents, block: int, length: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Packs a block: its shard; (n, 2) spans of tokens, each with one more than its targets; and the first span of each
    sequence, (sequences + 1,).
    """
    shard, bounds = documents.block(block)
    targets = np.diff(bounds) - 1
    pieces = -(-targets // length)
    nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of its document
    starts = np.repeat(bounds[:-1], pieces) + nth * length
    sizes = np.minimum(np.repeat(targets, pieces) - nth * length, length)
    longest_first = np.lexsort((starts, -sizes))
    rooms: list[int] = []  # of sequences that aren't full, sorted: tokens that fit << 40 | number of the sequence
    numbers, count = [], 0
    for size in np.minimum(sizes + 1, length)[longest_first].tolist():
        place = bisect.bisect_left(rooms, size << 40)
        room = rooms.pop(place) if place < len(rooms) else length << 40 | count
        number = room & (1 << 40) - 1
        numbers.append(number)
        count += number == count
        if (room := room - (size << 40)) >> 40:
            bisect.insort(rooms, room)
    together = longest_first[np.argsort(numbers, kind="stable")]
    spans = np.stack([starts[together], starts[together] + sizes[together] + 1], axis=1)
    return shard, spans, np.concatenate([[0], np.cumsum(np.bincount(np.array(numbers, np.int64), minlength=count))])


def _element(tokens: Any, targets: Any, segments: Any, positions: Any) -> dict[str, np.ndarray]:
    """Builds a row. Negative tokens are the complements of masked ones."""
    return {
        "tokens": np.where(tokens < 0, ~tokens, tokens).astype(np.int32),
        "targets": np.where(targets < 0, IGNORE, targets).astype(np.int32),
        "segments": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
    }


def _check_enough(sequences: Any, documents: Documents, length: int) -> None:
    if len(sequences) < 1:
        raise ConfigError(
            f"{documents.documents} documents of {documents.tokens} tokens in all are too few for one sequence of "
            f"{length} tokens and its last target: give more text or lower data.sequence_length"
        )
