"""Batches from a `DataConfig`: endless for training, with a position to save; a fixed set for validation."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np
import xxhash
from rich.console import Console

from dsv3_jax.config import ConfigError
from dsv3_jax.data.mixture import Mixture
from dsv3_jax.data.packing import BestFitSequences, PackedSequences
from dsv3_jax.data.preparation import PrepareOptions, prepare
from dsv3_jax.data.shards import FORMAT, INDEX, Prepared
from dsv3_jax.data.sources import content_hash, find_files
from dsv3_jax.data.tokenizer import Tokenizer, identity
from dsv3_jax.data.tokenizer_files import BYTES, load_tokenizer
from dsv3_jax.data.workers import Workers
from dsv3_jax.json_input import check_type, field

_PREFETCH = 2
_INLINE = 1 << 26
"""Bytes of text up to which worker processes take longer to start than they save."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a run."""

    source: str = "stdlib"
    """A directory made by `prepare`; or "stdlib", the text and code of Python's standard library; or a file or folder
    (.txt, .md, .rst, .py, .jsonl, .parquet), which is prepared first.
    """
    sources: tuple[str, ...] = ()
    """A mixture instead of `source`: NAME=SOURCE:WEIGHT for each source."""
    reweight: tuple[str, ...] = ()
    """Weights of the mixture after a number of trained tokens: TOKENS:NAME=WEIGHT,NAME=WEIGHT."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json; by default that of the prepared data, else bytes."""
    sequence_length: int = 4096
    """Tokens per sequence."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """`concatenate` cuts documents where a sequence ends (report section 4.1); `best_fit` keeps them whole, with
    padding.
    """
    mask_documents: bool = False
    """Whether tokens attend only within their own document. The report doesn't use such a mask (section 4.1)."""
    validation_fraction: float = 0.05
    """Fraction of documents held out for validation, chosen by a hash of their text. Prepared data has its own."""
    seed: int = 0
    """Seed for the order of documents and sequences."""
    text_field: str = "text"
    """Field of JSONL objects, or column of parquet files, that contains the text."""
    max_document_characters: int | None = None
    """Split documents into pieces of at most this length, for a corpus of few long files."""
    workers: int = 0
    """Number of processes that read batches ahead. With 0 a thread does, at millions of tokens per second."""

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
        if self.workers < 0:
            raise ConfigError(f"data.workers is {self.workers}: it must not be negative")
        self.mixture()

    def parts(self) -> dict[str, str]:
        """Names and paths of the sources; a single source is named "data"."""
        return {name: place for name, place, _ in map(_part, self.sources)} or {"data": self.source}

    def mixture(self) -> Mixture:
        """Returns the shares of the sources over the run. Raises ConfigError."""
        names = list(self.parts())
        if len(names) < len(self.sources):
            raise ConfigError(f"data.sources is {' '.join(self.sources)}: two have one name")
        weights = {name: weight for name, _, weight in map(_part, self.sources)} or {"data": Fraction(1)}
        if not any(weights.values()):
            raise ConfigError("data.sources: all weights are 0")
        stages = [(0, [weights[name] for name in names])]
        for text in self.reweight:
            tokens, weights = _stage(text, names)
            start = int(tokens) // self.sequence_length
            if start <= stages[-1][0]:
                raise ConfigError(
                    f"data.reweight {text!r}: it must begin after what is before it, by a sequence or more"
                )
            stages.append((start, [weights[name] for name in names]))
        return Mixture(stages)


def _part(text: str) -> tuple[str, str, Fraction]:
    name, equals, rest = text.partition("=")
    place, colon, weight = rest.rpartition(":")
    if not (name and equals and place and colon):
        raise ConfigError(f"data.sources: {text!r} is not NAME=SOURCE:WEIGHT, as web=data/web:0.7")
    return name, place, _weight(weight, f"data.sources: {text!r}")


def _stage(text: str, names: Sequence[str]) -> tuple[Fraction, dict[str, Fraction]]:
    what = f"data.reweight: {text!r}"
    tokens, _, rest = text.partition(":")
    pairs = [pair.partition("=")[::2] for pair in rest.split(",")]
    if sorted(name for name, _ in pairs) != sorted(names):
        raise ConfigError(
            f"{what} is not TOKENS:NAME=WEIGHT,... of each source ({', '.join(names)}), as 5e9:web=0.3,code=0.7"
        )
    weights = {name: _weight(weight, what) for name, weight in pairs}
    if not any(weights.values()):
        raise ConfigError(f"{what}: all weights are 0")
    return _weight(tokens, what), weights


def _weight(text: str, what: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if value < 0:
        raise ConfigError(f"{what}: {text!r} is not a number of 0 or more")
    return value


# Sources ---------------------------------------------------------------------------------------------------


def prepared_tokenizer(config: DataConfig) -> str | None:
    """Returns the path of a run's tokenizer: from the config, else that of the prepared data; None for bytes."""
    if config.tokenizer is not None:
        return config.tokenizer
    for place in config.parts().values():
        if (Path(place) / INDEX).is_file():
            return None if Prepared.open(Path(place)).index["tokenizer"].get("bytes") else place
    return None


def open_sources(
    config: DataConfig,
    tokenizer: Tokenizer,
    tokenizer_path: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Prepared]:
    """Opens each source by name. Texts are first prepared into a cache, keyed by their content.

    Args:
      tokenizer_path: the path of `tokenizer`, if it differs from the config's.

    Raises:
      ConfigError: the data can't be read, or was prepared with another tokenizer.
    """
    mine, opened, checked = identity(tokenizer), {}, False
    for name, place in config.parts().items():
        path = Path(place)
        if path.is_dir() and (path / INDEX).is_file():
            opened[name] = Prepared.open(path)
            opened[name].check_tokenizer(mine)
        else:
            found = tokenizer_path or prepared_tokenizer(config)
            if not checked and identity(load_tokenizer(found)) != mine:
                raise ConfigError(
                    f"data.tokenizer is {found or BYTES}, not the tokenizer that was given: set it to that one's path"
                )
            checked = True  # once, since a large one takes a while to load
            opened[name] = _prepare_texts(place, config, mine, found, console)
    return opened


def cache_directory() -> Path:
    """Returns the directory of prepared texts: `dsv3_jax/data` in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_jax" / "data"


def holds_out(opened: dict[str, Prepared]) -> list[str]:
    """Returns the names of the sources that hold out documents for validation."""
    return [name for name, prepared in opened.items() if prepared.index["options"]["validation_fraction"]]


def _prepare_texts(
    place: str, config: DataConfig, tokenizer: str, tokenizer_path: str | Path | None, console: Console | None
) -> Prepared:
    options = PrepareOptions(
        tokenizer=None if tokenizer_path is None else str(tokenizer_path),
        text_field=config.text_field,
        validation_fraction=config.validation_fraction,
        max_document_characters=config.max_document_characters,
        max_bad_fraction=0.0,
    )
    files = find_files([place], config.text_field)
    settings = [FORMAT, tokenizer, options.text_field, options.validation_fraction, options.max_document_characters]
    key = xxhash.xxh3_128_hexdigest(json.dumps([content_hash(files), settings]).encode())
    workers = (os.cpu_count() or 1) if sum(file.size for file in files) > _INLINE else 0
    # Of the same texts in other places, which count as a different job, the tokens are the same.
    made = prepare([place], cache_directory() / key, options, workers=workers, console=console, files=files, anew=True)
    made.check_tokenizer(tokenizer)
    return made


def _pack(prepared: Prepared, split: str, config: DataConfig) -> grain.MapDataset:
    """Returns the sequences of one split by index, in a new order each epoch."""
    documents = prepared.split(split)
    if not documents.documents:
        raise ConfigError(
            f"no document of {prepared.directory} is for {split}: give more documents, or cut long ones with "
            "max_document_characters"
        )
    packed: grain.MapDataset
    try:
        if config.packing == "best_fit":
            packed = BestFitSequences(documents, config.sequence_length, config.seed)
        else:
            packed = PackedSequences(
                documents, config.sequence_length, config.seed, mask_documents=config.mask_documents
            )
    except ConfigError as error:
        raise ConfigError(f"the {split} part of {prepared.directory}: {error}") from None
    # Neighbours are mostly of one long document: without a second shuffle a batch would hold little else.
    return packed.shuffle(config.seed)


# Batches ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Rows:
    """Reads rows of batches. Pickled to worker processes."""

    sources: list[grain.MapDataset]

    def read(self, rows: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        return _stack([self.sources[source][index] for source, index in rows])


_Read = tuple[list[int], Future[dict[str, np.ndarray]]]
"""The number of sequences taken from each source before and after a batch, and the batch."""


class TrainIterator(grain.DatasetIterator):  # type: ignore[misc]  # grain has no types
    """An endless iterator of batches, from the sequences of one or more sources in one global order.

    A batch takes the next sequences in that order. The state is only the number taken from each source: a restored
    iterator continues immediately, with any batch size and number of processes.

    Batches are dicts of (B, T) int32; see `PackedSequences`. The next batches of the same size are read ahead.

    Args:
      sources: by name; element `epoch * len + i` is sequence i of that epoch.
      workers: number of reading processes; with 0 a thread reads.
      ahead: number of batches to read ahead.
    """

    def __init__(
        self,
        sources: dict[str, grain.MapDataset],
        mixture: Mixture,
        batch_size: int,
        *,
        fingerprint: str,
        workers: int = 0,
        ahead: int = _PREFETCH,
    ) -> None:
        super().__init__()
        self._names, self._rows = list(sources), _Rows(list(sources.values()))
        self._mixture, self._batch_size, self._fingerprint = mixture, batch_size, fingerprint
        self._taken = [0] * len(sources)
        self._ahead = max(ahead, workers)
        self._coming: collections.deque[tuple[Any, Future[_Read]]] = collections.deque()
        self._thread, self._workers = ThreadPoolExecutor(1), Workers(workers, self._rows)
        self._waited, self._since = 0.0, time.perf_counter()

    def next_batch(self, batch_size: int, rows: Iterable[int] | None = None) -> dict[str, np.ndarray]:
        """Returns the next `batch_size` sequences, or only `rows` of them, those that this process's devices hold."""
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}: it must be at least 1")
        wanted = (batch_size, tuple(range(batch_size) if rows is None else map(int, rows)))
        began = time.perf_counter()
        if self._coming and self._coming[0][0] != wanted:
            self._forget()
        while len(self._coming) <= self._ahead:
            before = self._coming[-1][1] if self._coming else None
            self._coming.append((wanted, self._thread.submit(self._read, wanted, before, list(self._taken))))
        self._taken, batch = self._coming.popleft()[1].result()
        found = batch.result()
        self._waited += time.perf_counter() - began
        return found

    def _read(self, wanted: tuple[int, tuple[int, ...]], before: Future[_Read] | None, taken: list[int]) -> _Read:
        """Plans a batch and starts to read it in the thread: after the batch `before`, else from `taken`."""
        taken = list(before.result()[0]) if before else taken
        first, sequences = sum(taken), []
        for i in range(wanted[0]):
            source = self._mixture.next(first + i, taken)
            sequences.append((source, taken[source]))
            taken[source] += 1
        return taken, self._workers.submit("read", [sequences[row] for row in wanted[1]])

    def _forget(self) -> None:
        for _, batch in self._coming:
            batch.cancel()
        self._coming.clear()

    def __next__(self) -> dict[str, np.ndarray]:
        return self.next_batch(self._batch_size)

    def metrics(self) -> dict[str, float]:
        """`data_wait`, the fraction of time since the last call spent waiting for batches, and `epochs/NAME`."""
        now = time.perf_counter()
        wait = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        lengths = map(len, self._rows.sources)
        return {"data_wait": wait} | {
            f"epochs/{name}": taken / length
            for name, taken, length in zip(self._names, self._taken, lengths, strict=True)
        }

    def stop(self) -> None:
        """Stops reading ahead."""
        self._forget()
        self._workers.close()
        self._thread.shutdown()

    def get_state(self) -> dict[str, Any]:
        """Returns the position, JSON-serialisable and the same in every process."""
        return {"taken": list(self._taken), "fingerprint": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores the position of `get_state`. Raises ConfigError if the data has changed."""
        what = "the data's position"
        fingerprint = field(check_type(state, dict, what, ConfigError), "fingerprint", str, what, ConfigError)
        taken = field(state, "taken", list[int], what, ConfigError)
        if fingerprint != self._fingerprint:
            raise ConfigError(
                f"the data is not what it was when the state was saved (fingerprint {self._fingerprint}, then "
                f"{fingerprint}): go on with the same files, tokenizer, Python version and data settings"
            )
        if len(taken) != len(self._taken) or min(taken) < 0:
            raise ConfigError(f"{what}: taken is {taken}: it must be {len(self._taken)} numbers, none negative")
        self._taken = list(taken)
        self._forget()


def train_iterator(
    config: DataConfig, tokenizer: Tokenizer, batch_size: int, *, opened: dict[str, Prepared] | None = None
) -> TrainIterator:
    """Returns an endless iterator over batches of training documents, in a new order each epoch.

    Args:
      batch_size: sequences per batch; `next_batch` takes any other.
      opened: the result of `open_sources`, if it has been called.

    Raises:
      ConfigError: the data can't be read, or is too little for one sequence.
    """
    opened = opened or open_sources(config, tokenizer)
    sources = {name: _pack(prepared, "training", config) for name, prepared in opened.items()}
    order = [config.sequence_length, config.seed, config.packing, config.reweight]
    weights = [str(_part(text)[2]) for text in config.sources]
    what = [[prepared.fingerprint for prepared in opened.values()], weights, order]
    fingerprint = xxhash.xxh3_128_hexdigest(json.dumps(what).encode())
    return TrainIterator(sources, config.mixture(), batch_size, fingerprint=fingerprint, workers=config.workers)


def validation_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    batch_size: int,
    count: int,
    *,
    multiple_of: int = 1,
    opened: dict[str, Prepared] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Returns the same batches of held-out documents at every call, for a mixture in its initial shares.

    Args:
      multiple_of: the number of parts that devices take, of which every batch size must be a multiple.

    Returns:
      `count` batches of (batch_size, T), or as many full ones as there are; a single smaller one if there is no full
      batch.

    Raises:
      ConfigError: no documents are held out, or too few for one sequence, or for `multiple_of`.
    """
    opened = opened or open_sources(config, tokenizer)
    names = holds_out(opened)
    if not names:
        raise ConfigError(
            f"{', '.join(config.parts().values())} holds out no documents for validation: raise validation_fraction"
        )
    sources = [_pack(opened[name], "validation", config) for name in names]
    shares = {name: weight for name, _, weight in map(_part, config.sources)}
    if not any(shares.get(name) for name in names):
        shares = dict.fromkeys(names, Fraction(1))
    mixture, taken, rows = Mixture([(0, [shares[name] for name in names])]), [0] * len(names), list[tuple[int, int]]()
    while len(rows) < batch_size * count:
        source = mixture.next(len(rows), taken)
        if taken[source] == len(sources[source]):
            break
        rows.append((source, taken[source]))
        taken[source] += 1
    batch_size = min(batch_size, len(rows) // multiple_of * multiple_of)
    if not batch_size:
        raise ConfigError(
            f"the validation part of {', '.join(config.parts().values())} has {len(rows)} sequences, too few for the "
            f"{multiple_of} parts that devices take of a batch: raise validation_fraction, or set it to 0 for no "
            "validation"
        )
    batches = range(min(count, len(rows) // batch_size))
    return [_Rows(sources).read(rows[b * batch_size : (b + 1) * batch_size]) for b in batches]


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
