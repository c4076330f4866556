"""From a `DataConfig` to batches: endless for training, with a position to save; the same few for validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import grain
import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data.packing import PackedSequences, tokenize
from dsv3_jax.data.sources import load_documents, split_documents
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.json_input import check_type, field


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data that a run reads."""

    source: str = "stdlib"
    """"stdlib" for the text and code of Python's standard library, or a file or folder: .txt, .md, .rst, .py,
    .jsonl, .parquet."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json; bytes without one."""
    sequence_length: int = 4096
    """Tokens of a sequence."""
    validation_fraction: float = 0.05
    """The share of documents held out for validation, chosen by a hash of their text."""
    seed: int = 0
    """Seed of the order of documents and sequences."""
    text_field: str = "text"
    """The field of JSONL objects, or column of parquet files, that holds the text."""
    max_document_characters: int | None = None
    """Cut longer documents into pieces of at most this length; for a corpus of few long files."""
    mask_documents: bool = False
    """Whether tokens attend within their own document only. The report packs without such a mask (section 4.1)."""

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ConfigError(f"data.sequence_length is {self.sequence_length}: it must be at least 1")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction is {self.validation_fraction}: it must be in [0, 1)")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"data.seed is {self.seed}: it must be in [0, 2**32)")
        if self.max_document_characters is not None and self.max_document_characters < 1:
            value = self.max_document_characters
            raise ConfigError(f"data.max_document_characters is {value}: it must be at least 1, or None")


class TrainIterator(grain.DatasetIterator):
    """Batches without end, from sequences in one global order.

    A batch takes the next sequences of that order. What is saved is only how many were taken: a restored iterator
    goes on at once, with any batch size and in any number of processes.

    Batches are dicts of (B, T) int32, as `PackedSequences` describes them.
    """

    def __init__(self, sequences: grain.MapDataset, batch_size: int, *, fingerprint: str) -> None:
        super().__init__()
        self._sequences, self._batch_size, self._fingerprint = sequences, batch_size, fingerprint
        self._next_sequence = 0

    def next_batch(self, batch_size: int, rows: Iterable[int] | None = None) -> dict[str, np.ndarray]:
        """The next `batch_size` sequences; of them only `rows`, by default all: what this process's devices hold."""
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}: it must be at least 1")
        rows = range(batch_size) if rows is None else rows
        batch = _stack([self._sequences[self._next_sequence + int(i)] for i in rows])
        self._next_sequence += batch_size
        return batch

    def __next__(self) -> dict[str, np.ndarray]:
        return self.next_batch(self._batch_size)

    def get_state(self) -> dict[str, Any]:
        """JSON-serialisable, and the same in every process."""
        return {"next_sequence": self._next_sequence, "fingerprint": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called. Raises ConfigError if the data isn't what it was then."""
        what = "the data's position"
        fingerprint = field(check_type(state, dict, what, ConfigError), "fingerprint", str, what, ConfigError)
        position = field(state, "next_sequence", int, what, ConfigError)
        if position < 0:
            raise ConfigError(f"{what}: next_sequence is {position}: it must not be negative")
        if fingerprint != self._fingerprint:
            raise ConfigError(
                f"the data is not what it was when the state was saved (fingerprint {self._fingerprint}, then "
                f"{fingerprint}): go on with the same files, tokenizer, Python version and data settings"
            )
        self._next_sequence = position


def train_iterator(config: DataConfig, tokenizer: Tokenizer, batch_size: int) -> TrainIterator:
    """Batches of the training documents, without end; each epoch is in a new order.

    Args:
      batch_size: sequences of a batch; `next_batch` takes another.

    Raises:
      ConfigError: unreadable data, or too little of it for one sequence.
    """
    packed, fingerprint = _sequences(config, tokenizer, validation=False)
    # Neighbours are mostly of one long document: without a second shuffle a batch would hold little else.
    sequences = packed.shuffle(config.seed).repeat()
    return TrainIterator(sequences, batch_size, fingerprint=fingerprint)


def validation_batches(
    config: DataConfig, tokenizer: Tokenizer, batch_size: int, count: int, *, multiple_of: int = 1
) -> list[dict[str, np.ndarray]]:
    """The same batches of held-out documents at every call.

    Args:
      multiple_of: what a batch's size must be a multiple of, as `batch_size` is: parts that devices take.

    Returns:
      `count` batches of (batch_size, T), or as many full ones as there are; a single smaller one if there is not
      even one full batch.

    Raises:
      ConfigError: no documents are held out, or too few for one sequence, or for `multiple_of`.
    """
    packed, _ = _sequences(config, tokenizer, validation=True)
    sequences = packed.shuffle(config.seed)
    batch_size = min(batch_size, len(sequences) // multiple_of * multiple_of)
    if not batch_size:
        raise ConfigError(
            f"the validation part of {config.source!r} has {len(sequences)} sequences, too few for the {multiple_of} "
            "parts that devices take of a batch: raise data.validation_fraction, or set it to 0 for no validation"
        )
    batches = range(min(count, len(sequences) // batch_size))
    return [_stack([sequences[b * batch_size + i] for i in range(batch_size)]) for b in batches]


def _sequences(config: DataConfig, tokenizer: Tokenizer, *, validation: bool) -> tuple[PackedSequences, str]:
    """One side of the split, packed, and what identifies its sequences and their order."""
    documents = load_documents(
        config.source, text_field=config.text_field, max_characters=config.max_document_characters
    )
    side = split_documents(documents, config.validation_fraction)[validation]
    name = "validation" if validation else "training"
    if not side:
        raise ConfigError(
            f"no document of {config.source!r} ({len(documents)} in all) is for {name} at data.validation_fraction = "
            f"{config.validation_fraction}: give more documents, or cut long ones with data.max_document_characters"
        )
    corpus = tokenize(side, tokenizer)
    try:
        packed = PackedSequences(corpus, config.sequence_length, config.seed, mask_documents=config.mask_documents)
    except ConfigError as error:
        raise ConfigError(f"the {name} part of {config.source!r}: {error}") from None
    return packed, f"{corpus.fingerprint()}-{config.sequence_length}-{config.seed}"


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
