"""Data preparation: sources -> tokens in shards on disk, streamed, in several processes, reproducible to the byte.

Work happens in `DST.partial`, which is renamed to `DST` when everything is done. When a shard is full, the files of
both splits are closed and the position in the sources is recorded, from which interrupted work continues.
"""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dsv3_jax.config import ConfigError
from dsv3_jax.data.shards import FORMAT, INDEX, SPLITS, Prepared, ShardWriter
from dsv3_jax.data.sources import Batch, File, LongDocument, Position, cut, find_files, read_batches
from dsv3_jax.data.tokenize import Conversation, Tokenize, Tokenized
from dsv3_jax.data.tokenizer import Tokenizer, identity, valid_unicode
from dsv3_jax.data.tokenizer_files import load_tokenizer, tokenizer_sources
from dsv3_jax.data.workers import Workers
from dsv3_jax.integrity import seal, sync
from dsv3_jax.json_input import read_json

_PROGRESS, _HASHES, _LOCK = "progress.json", "hashes", "lock"
_PIECE = 1 << 20
_NAMED = 100
"""Number of unusable documents that the index names."""
_ENOUGH = 1000
"""Number of documents after which the fraction of bad ones is checked."""


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Options that determine the tokens of a document."""

    tokenizer: str | None = None
    """A Hugging Face tokenizer.json, a tiktoken.model, or a folder that contains one; by default bytes."""
    text_field: str = "text"
    """Field of JSONL objects, or column of parquet files, that contains the text."""
    validation_fraction: float = 0.005
    """Fraction of documents held out for validation, chosen by a hash of their text."""
    max_document_characters: int | None = None
    """Split documents into pieces of at most this length, for a corpus of few long files."""
    deduplicate: bool = False
    """Keep only the first of documents with equal text. Takes about 100 bytes of memory per document."""
    max_bad_fraction: float = 0.001
    """Stop if more than this fraction of documents can't be used: invalid JSON, no text, not UTF-8."""
    fim_rate: float = 0.0
    """Fraction of documents rearranged for fill-in-the-middle; 0.1 in the report (section 4.1)."""
    split_rate: float = 0.0
    """Fraction of tokens combining punctuation and line ends that are split (section 4.1 gives no number)."""
    seed: int = 0
    """Seed for fim_rate and split_rate."""
    shard_tokens: int = 2**27
    """Tokens per shard, up to the end of a document."""

    def __post_init__(self) -> None:
        for name in ("validation_fraction", "max_bad_fraction", "fim_rate", "split_rate"):
            upper = "1)" if name == "validation_fraction" else "1]"
            if not 0 <= (value := getattr(self, name)) <= 1 or (upper == "1)" and value == 1):
                raise ConfigError(f"{name} is {value}: it must be in [0, {upper}")
        for name in ("max_document_characters", "shard_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}: it must be in [0, 2**32)")


def prepare(
    sources: Sequence[str],
    destination: Path,
    options: PrepareOptions,
    *,
    workers: int = 0,
    chat: Callable[[], Conversation] | None = None,
    console: Console | None = None,
    files: Sequence[File] | None = None,
    anew: bool = False,
) -> Prepared:
    """Tokenises sources into a directory, or continues what was interrupted there, with the same result.

    Args:
      sources: as for `find_files`.
      destination: the new directory. Unfinished work is in the same name with `.partial` appended.
      workers: number of worker processes; with 0 this process does the work, on all cores if the tokenizer supports it.
      chat: makes a chat template, in each process; the sources are then JSONL files of conversations (`messages`).
      console: where progress and warnings go.
      files: of the sources, if they have been found already.
      anew: whether to begin anew if a different job is unfinished there.

    Raises:
      ConfigError: the directory exists, a different job is unfinished there, a source can't be read, or too many
        documents can't be used.
    """
    if (destination / INDEX).exists():
        return Prepared.open(destination)
    if destination.exists():
        raise ConfigError(f"{destination} exists and holds no prepared data: choose another place")
    files = find_files(sources, options.text_field) if files is None else files
    tokenizer = load_tokenizer(options.tokenizer)
    partial = destination.with_name(destination.name + ".partial")
    job = _Job(list(sources), files, partial, options, tokenizer, chat, console or Console(quiet=True))
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if console is not None:
                console.print(f"waiting for another process that prepares {destination}", soft_wrap=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (destination / INDEX).exists():  # another process has finished it while this one waited
            return Prepared.open(destination)
        partial.mkdir(exist_ok=True)
        job.load(anew)
        try:
            job.run(workers)
        except ConfigError:
            if not any(job.state["shards"].values()):  # there is nothing to go on with
                shutil.rmtree(partial)
            raise
        job.finish(destination)
    return Prepared.open(destination)


class _Piece(NamedTuple):
    """A part of a long document. bytes: of the whole text. after: None except for the last part."""

    place: tuple[int, int]
    digest: bytes
    bytes: int
    first: bool
    after: Position | None
    done: int


class _Job:
    """One preparation. `state` is all that is needed to continue it."""

    def __init__(
        self,
        sources: list[str],
        files: Sequence[File],
        partial: Path,
        options: PrepareOptions,
        tokenizer: Tokenizer,
        chat: Callable[[], Conversation] | None,
        console: Console,
    ) -> None:
        self.sources, self.files, self.partial, self.options = sources, files, partial, options
        self.tokenizer, self.console = tokenizer, console
        self.tokenize = Tokenize(
            options.tokenizer,
            options.text_field,
            options.max_document_characters,
            options.fim_rate,
            options.split_rate,
            options.seed,
            chat,
        )
        if options.fim_rate and not chat:
            _ = self.tokenize._fim_ids  # what the tokenizer lacks is said before anything is read
        wide = chat is not None or tokenizer.vocab_size > 2**16
        self.dtype = np.dtype("int32" if wide else "uint16")
        self.job = {
            "format": FORMAT,
            "sources": [[file.name, file.state] for file in files],
            "tokenizer": identity(tokenizer),
            "options": {
                k: v for k, v in dataclasses.asdict(options).items() if k not in ("tokenizer", "max_bad_fraction")
            },
            "chat": chat is not None,
        }
        self.state = self._fresh(int(options.validation_fraction * 2**64))
        self.seen: set[bytes] = set()
        self.new_hashes = bytearray()
        self.writers: dict[str, ShardWriter] = {}
        self.dropping = False

    def _fresh(self, threshold: int) -> dict[str, Any]:
        counts = {"documents": 0, "tokens": 0, "bytes": 0, "rejected": 0, "duplicates": 0}
        return {
            "job": self.job,
            "position": list(Position()),
            "threshold": threshold,
            "lowest": 2**64,
            "highest": -1,
            "parts": 0,
            "shards": {split: [] for split in SPLITS},
            "sources": [{"source": source, **counts} for source in self.sources],
            "rejected": [],
            "hashes": 0,
        }

    def run(self, workers: int) -> None:
        """Does the remaining work."""
        while True:
            self._stream(workers)
            self._check_share(at_end=True)
            sizes = {split: sum(s["documents"] for s in self.state["shards"][split]) for split in SPLITS}
            lowest, highest = self.state["lowest"], self.state["highest"]
            if not any(sizes.values()):
                raise ConfigError(f"data source {', '.join(map(repr, self.sources))} holds no text")
            if not sizes["training"]:  # few documents: the one of the extreme hash goes to the other side
                threshold = highest
            elif self.options.validation_fraction and not sizes["validation"] and lowest < highest:
                threshold = lowest + 1
            else:
                return
            self._clear()
            self.state, self.seen = self._fresh(threshold), set()
            self._save()

    # Streaming ---------------------------------------------------------------------------------------------

    def _stream(self, workers: int) -> None:
        total = sum(file.size for file in self.files)
        self.began = time.perf_counter()
        with _progress(self.console, total) as show, Workers(workers, self.tokenize) as pool:
            pending: collections.deque[tuple[Batch | _Piece, Future[Any]]] = collections.deque()
            for piece in self._submit(pool):
                pending.append(piece)
                if len(pending) > 2 * workers + 2:
                    self._consume(*pending.popleft())
                    show(piece[0].done, self._tokens())
            while pending:
                self._consume(*pending.popleft())
            show(total, self._tokens())
        self._close_part(Position(len(self.files), 0, 0))

    def _tokens(self) -> int:
        return sum(s["tokens"] for s in self.state["sources"])

    def _submit(self, pool: Workers) -> Iterator[tuple[Batch | _Piece, Future[Any]]]:
        for batch in read_batches(self.files, Position(*self.state["position"])):
            if batch.long is None:
                yield batch, pool.submit("whole", batch.records, batch.is_json)
            else:
                yield from self._submit_long(pool, batch)

    def _submit_long(self, pool: Workers, batch: Batch) -> Iterator[tuple[Batch | _Piece, Future[Any]]]:
        long, limit = batch.long, self.options.max_document_characters
        assert long is not None
        if self.tokenize.chat is not None:
            yield batch, _failed("a conversation of 2 MiB or more, which is too long")
            return
        try:
            digest, size, blank = _hash_long(long)
        except UnicodeDecodeError:  # it counts bytes from the beginning of a piece
            yield batch, _failed("not UTF-8")
            return
        except ValueError as error:
            yield batch, _failed(str(error))
            return
        if blank:
            return
        texts = map(valid_unicode, long.pieces())
        if limit is not None:
            groups = itertools.batched(cut(texts, limit), max(_PIECE // limit, 1))
            for group, following in _with_next(groups):
                after = batch.after if following is None else None
                part = batch._replace(places=batch.places * len(group), after=after)
                yield part, pool.submit("whole", list(group), [False] * len(group))
            return
        first = True
        for text, rest in _with_next(cut(texts, _PIECE, between_words=True)):
            after = batch.after if rest is None else None
            note = _Piece(batch.places[0], digest, size, first, after, batch.done)
            yield note, pool.submit("piece", text, first, rest is None)
            first = False

    def _consume(self, what: Batch | _Piece, future: Future[Any]) -> None:
        found = future.result()
        if isinstance(what, _Piece):
            if what.first:
                self.dropping = self._is_duplicate(what.digest)
                self._count(what.place, what.bytes, dropped=self.dropping)
            if not self.dropping:
                self._write(what.place, what.digest, found, last=what.after is not None)
        else:
            self._consume_batch(what, found)
        self._check_share()
        writer = self.writers.get("training")
        if what.after is not None and writer is not None and writer.tokens >= self.options.shard_tokens:
            self._close_part(what.after)

    def _consume_batch(self, batch: Batch, found: Tokenized) -> None:
        for record, why in found.errors:
            file, number = batch.places[record]
            self._reject(file, f"{self.files[file].where(number)}: {why}")
        ends = np.cumsum(found.lengths)
        hashes = found.hashes.tobytes()
        for i, (end, length, size) in enumerate(
            zip(ends.tolist(), found.lengths.tolist(), found.sizes.tolist(), strict=True)
        ):
            place, digest = batch.places[found.records[i]], hashes[16 * i : 16 * i + 16]
            dropped = self._is_duplicate(digest)
            self._count(place, size, dropped=dropped)
            if not dropped:
                self._write(place, digest, found.tokens[end - length : end], last=True)

    def _is_duplicate(self, digest: bytes) -> bool:
        if not self.options.deduplicate:
            return False
        if digest in self.seen:
            return True
        self.seen.add(digest)
        self.new_hashes += digest
        return False

    def _count(self, place: tuple[int, int], size: int, *, dropped: bool) -> None:
        counts = self.state["sources"][self.files[place[0]].source]
        if dropped:
            counts["duplicates"] += 1
        else:
            counts["documents"] += 1
            counts["bytes"] += size

    def _write(self, place: tuple[int, int], digest: bytes, tokens: np.ndarray, *, last: bool) -> None:
        value = int.from_bytes(digest[:8], "big")
        state = self.state
        state["lowest"], state["highest"] = min(state["lowest"], value), max(state["highest"], value)
        split = SPLITS[value < state["threshold"]]
        writer = self.writers.get(split)
        if writer is None:
            path = self.partial / f"{split}-{state['parts']:05d}.array_record"
            writer = self.writers[split] = ShardWriter(path, self.dtype)
        writer.add(tokens, last=last)
        state["sources"][self.files[place[0]].source]["tokens"] += len(tokens)

    def _reject(self, file: int, message: str) -> None:
        message = " ".join(message.split())[:500]
        self.state["sources"][self.files[file].source]["rejected"] += 1
        if len(self.state["rejected"]) < _NAMED:
            self.state["rejected"].append(message)
            self.console.print(f"left out: {message}", soft_wrap=True, markup=False)

    def _check_share(self, *, at_end: bool = False) -> None:
        bad = sum(s["rejected"] for s in self.state["sources"])
        if not bad:
            return
        all_of_them = bad + sum(s["documents"] + s["duplicates"] for s in self.state["sources"])
        limit = self.options.max_bad_fraction
        if bad > limit * all_of_them and (at_end or not limit or all_of_them >= _ENOUGH):
            raise ConfigError(
                f"{self.state['rejected'][0]} ({bad} of {all_of_them} documents can't be used, more than "
                f"max_bad_fraction, {limit:g})"
            )

    # What is on disk ---------------------------------------------------------------------------------------

    def _close_part(self, position: Position) -> None:
        """Closes the shards, and records where the next ones begin."""
        for split, writer in self.writers.items():
            self.state["shards"][split].append(writer.close())
        self.writers = {}
        if self.new_hashes:
            with (self.partial / _HASHES).open("ab") as file:
                file.write(self.new_hashes)
                file.flush()
                os.fsync(file.fileno())
            self.state["hashes"] += len(self.new_hashes)
            self.new_hashes = bytearray()
        self.state["parts"] += 1
        self.state["position"] = list(position)
        self._save()

    def _save(self) -> None:
        beside = self.partial / f".{_PROGRESS}"
        beside.write_text(json.dumps(self.state))
        sync(beside)
        beside.replace(self.partial / _PROGRESS)
        sync(self.partial)

    def load(self, anew: bool) -> None:
        """Reads what is done already. Raises ConfigError for a different job, unless that is to begin `anew`."""
        path = self.partial / _PROGRESS
        state = read_json(path, ConfigError) if path.exists() else None
        differs = state is not None and state["job"] != json.loads(json.dumps(self.job))
        if state is None or (differs and anew):
            self._clear()
            return
        if differs:
            raise ConfigError(
                f"{self.partial} holds another unfinished preparation, of other files, options or tokenizer: remove it "
                "or choose another place"
            )
        self.state = state
        self._clear(keep={s["file"] for shards in state["shards"].values() for s in shards})
        if state["hashes"]:
            hashes = (self.partial / _HASHES).read_bytes()[: state["hashes"]]
            (self.partial / _HASHES).write_bytes(hashes)
            self.seen = {hashes[i : i + 16] for i in range(0, len(hashes), 16)}
        if state["parts"]:
            self.console.print(f"going on with {self.partial}: {self._tokens():,} tokens are there")

    def _clear(self, keep: set[str] | None = None) -> None:
        kept = {_LOCK} if keep is None else keep | {_LOCK, _PROGRESS, _HASHES}
        for path in self.partial.iterdir():
            if path.name not in kept:
                path.unlink()

    def finish(self, destination: Path) -> None:
        """Writes the index and renames the directory."""
        for name, file in tokenizer_sources(self.options.tokenizer).items():
            shutil.copyfile(file, self.partial / name)
        tokenizer = self.tokenizer
        index = {
            "format": FORMAT,
            "dtype": self.dtype.name,
            "chat": self.job["chat"],
            "tokenizer": {
                "identity": self.job["tokenizer"],
                "bytes": not tokenizer_sources(self.options.tokenizer),
                "vocab_size": tokenizer.vocab_size,
                "bos_id": int(tokenizer.bos_id),
                "eos_id": int(tokenizer.eos_id),
            },
            "options": self.job["options"],
            "sources": self.state["sources"],
            "rejected": self.state["rejected"],
            **self.state["shards"],
        }
        (self.partial / INDEX).write_text(json.dumps(seal(index), indent=1) + "\n")
        for name in (_PROGRESS, _HASHES, _LOCK):
            (self.partial / name).unlink(missing_ok=True)
        for path in self.partial.iterdir():
            sync(path)
        self.partial.rename(destination)
        sync(destination.parent)
        documents, tokens = (sum(s[name] for s in self.state["sources"]) for name in ("documents", "tokens"))
        self.console.print(
            f"prepared {documents:,} documents, {tokens:,} tokens in {time.perf_counter() - self.began:.1f} s: "
            f"{destination}",
            soft_wrap=True,
        )


def _hash_long(long: LongDocument) -> tuple[bytes, int, bool]:
    digest, size, blank = hashlib.blake2b(digest_size=16), 0, True
    for piece in long.pieces():
        data = valid_unicode(piece).encode()
        digest.update(data)
        size, blank = size + len(data), blank and not piece.strip()
    return digest.digest(), size, blank


def _with_next[T](values: Iterable[T]) -> Iterator[tuple[T, T | None]]:
    """Yields each value with the next one, None after the last."""
    iterator = iter(values)
    value = next(iterator, None)
    while value is not None:
        following = next(iterator, None)
        yield value, following
        value = following


def _failed(why: str) -> Future[Any]:
    nothing = np.empty(0, np.int64)
    future: Future[Any] = Future()
    future.set_result(Tokenized(nothing, nothing, np.empty((0, 16), np.uint8), nothing, nothing, [(0, why)]))
    return future


class _progress:
    """Returns a progress bar with rates; nothing on a console that isn't a terminal."""

    def __init__(self, console: Console, total: int) -> None:
        columns = (TextColumn("preparing"), BarColumn(), TextColumn("{task.fields[rates]}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total or None, rates="")
        self._first: tuple[float, int, int] | None = None

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return self._show

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _show(self, done: int, tokens: int) -> None:
        now = time.perf_counter()
        self._first = self._first or (now, done, tokens)
        seconds = max(now - self._first[0], 1e-9)
        rates = f"{(done - self._first[1]) / seconds / 1e6:.1f} MB/s, {tokens:,} tokens"
        self._bar.update(self._task, completed=done, rates=rates)
