"""Prepared data of known tokens, for tests."""

import itertools

import numpy as np

from dsv3_jax.data.shards import Documents, ShardWriter


def documents(path, texts, dtype="int32", shards=1):
    """Documents of the given arrays of tokens, written to disk in so many shards."""
    entries = []
    for number, part in enumerate(np.array_split(np.arange(len(texts)), shards)):
        writer = ShardWriter(path / f"{number}.array_record", np.dtype(dtype))
        for i in part:
            writer.add(np.asarray(texts[i]))
        entries.append(writer.close())
    return Documents(path, entries, dtype)


def counted(path, lengths, **how):
    """Documents whose tokens are all different, so that a token tells where it was."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return documents(path, [np.arange(a, b) for a, b in itertools.pairwise(offsets)], **how), offsets
