"""Prepared data on disk: shards of tokens in ArrayRecord files, and an index.

A directory holds `index.json`, the tokenizer's files, and shards of two splits, as `training-00000.array_record`.
A shard contains the concatenated tokens of documents in records of `CHUNK` tokens, then the positions where documents
end in records of `BLOCK` documents. Records have checksums, so that corruption is detected on reading.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from array_record.python import array_record_module

from dsv3_jax.config import ConfigError
from dsv3_jax.integrity import hash_file, sync, unseal
from dsv3_jax.json_input import check_type, field, read_json

INDEX = "index.json"
FORMAT = 2
CHUNK = 8192
"""Tokens per record."""
BLOCK = 1024
"""Documents per block, the unit whose lengths are read together."""
SPLITS = ("training", "validation")

_OPEN_FILES = 512


class ShardWriter:
    """Writes one shard.

    dtype: uint16, or int32 for larger vocabularies and for chats, in which masked tokens are stored as their
    complements, negative numbers. Raises ConfigError if writing fails.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.tokens = path, 0
        self._dtype = dtype.newbyteorder("<")
        self._writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        self._pending: list[np.ndarray] = []
        self._ends: list[int] = []

    def add(self, tokens: np.ndarray, *, last: bool = True) -> None:
        """Appends the tokens of a document, or of a piece of a long one, of which one is the `last`."""
        self._pending.append(tokens)
        self.tokens += len(tokens)
        if self.tokens // CHUNK > (self.tokens - sum(map(len, self._pending))) // CHUNK:
            self._write_chunks()
        if last:
            self._ends.append(self.tokens)

    def _write_chunks(self, *, all_of_them: bool = False) -> None:
        tokens = np.concatenate(self._pending).astype(self._dtype)
        whole = len(tokens) if all_of_them else len(tokens) // CHUNK * CHUNK
        for start in range(0, whole, CHUNK):
            self._write(tokens[start : min(start + CHUNK, whole)])
        self._pending = [tokens[whole:]]

    def _write(self, record: np.ndarray) -> None:
        with self._writing():
            self._writer.write(record.tobytes())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # no room, for one
            raise ConfigError(f"can't write {self.path}: {' '.join(str(error).split())[:200]}") from None

    def close(self) -> dict[str, Any]:
        """Flushes the shard to disk. Returns its entry for the index."""
        if self._pending:
            self._write_chunks(all_of_them=True)
        ends = np.array(self._ends, "<i8")
        for start in range(0, len(ends), BLOCK):
            self._write(ends[start : start + BLOCK])
        with self._writing():
            self._writer.close()
        sync(self.path)
        return {
            "file": self.path.name,
            "bytes": self.path.stat().st_size,
            "xxh3_128": hash_file(self.path)[1],
            "documents": len(ends),
            "tokens": self.tokens,
            "block_ends": [int(ends[min(stop, len(ends)) - 1]) for stop in range(BLOCK, len(ends) + BLOCK, BLOCK)],
        }


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A directory of prepared data, with its index read and validated. Raises ConfigError if it isn't one."""

    directory: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> Prepared:
        """Reads the index. Only the sizes of files are checked, since records have checksums."""
        path = directory / INDEX
        index = check_type(read_json(path, ConfigError), dict, str(path), ConfigError)
        version = field(index, "format", int, str(path), ConfigError)
        if version != FORMAT:
            raise ConfigError(f"{path} is of format {version}, this version reads {FORMAT}: prepare the data again")
        damaged = f"{path} is not what was written: its seal differs; copy or prepare the data again"
        index = unseal(index, path, lambda _: ConfigError(damaged))
        for split in SPLITS:
            for shard in field(index, split, list, str(path), ConfigError):
                check_type(shard, dict[str, Any], f"{path}: {split}", ConfigError)
                where = f"{path}: a shard of {split}"
                for name, kind in (("file", str), ("bytes", int), ("documents", int), ("tokens", int)):
                    field(shard, name, kind, where, ConfigError)
                field(shard, "block_ends", list[int], where, ConfigError)
                if Path(shard["file"]).name != shard["file"] or "\0" in shard["file"]:
                    raise ConfigError(f"{where} is in {shard['file']!r}: it must be the name of a file beside it")
                file = directory / shard["file"]
                size = file.stat().st_size if file.is_file() else None
                if size != shard["bytes"]:
                    has = "is missing" if size is None else f"has {size} bytes"
                    raise ConfigError(f"{file} {has}, {INDEX} says {shard['bytes']}: copy or prepare the data again")
        field(index, "dtype", str, str(path), ConfigError)
        if index["dtype"] not in ("uint16", "int32"):
            raise ConfigError(f"{path}: dtype is {index['dtype']!r}, not uint16 or int32")
        field(index, "tokenizer", dict[str, Any], str(path), ConfigError)
        return cls(directory, index)

    def split(self, name: str) -> Documents:
        """Returns the documents of "training" or "validation"."""
        return Documents(self.directory, self.index[name], self.index["dtype"])

    def check_tokenizer(self, identity: str) -> None:
        """Raises ConfigError if the tokens are those of another tokenizer."""
        mine = self.index["tokenizer"].get("identity")
        if mine != identity:
            raise ConfigError(
                f"{self.directory} was prepared with another tokenizer (identity {mine}, this one's is {identity}): "
                "leave data.tokenizer out to use the one it holds, or prepare the data again"
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A fingerprint of the tokens of all documents, in order."""
        kept = {split: [[s["xxh3_128"], s["tokens"]] for s in self.index[split]] for split in SPLITS}
        return xxhash.xxh3_128_hexdigest(json.dumps([kept, self.index["dtype"]]).encode())

    def check_hashes(self) -> None:
        """Reads every shard. Raises ConfigError, naming the first one that is corrupt."""
        for split in SPLITS:
            for shard in self.index[split]:
                if hash_file(self.directory / shard["file"])[1] != shard["xxh3_128"]:
                    raise ConfigError(f"{self.directory / shard['file']} is not what was written: its hash differs")


class Documents:
    """The tokens of documents by block and position, read from disk. Can be pickled, and shared between threads.

    `block_tokens` (blocks,) int64: tokens of each block of at most `BLOCK` documents.
    """

    def __init__(self, directory: Path, shards: Sequence[dict[str, Any]], dtype: str) -> None:
        self._paths = [directory / shard["file"] for shard in shards]
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._chunks = [-(-shard["tokens"] // CHUNK) for shard in shards]
        ends = [np.array([0, *shard["block_ends"]], np.int64) for shard in shards]
        self.block_tokens = np.concatenate([np.diff(e) for e in ends]) if ends else np.zeros(0, np.int64)
        self._block_starts = np.concatenate([e[:-1] for e in ends]) if ends else np.zeros(0, np.int64)
        self._first_blocks = np.cumsum([0, *(len(e) - 1 for e in ends)])
        self.tokens = int(self.block_tokens.sum())
        self.documents = sum(shard["documents"] for shard in shards)
        self._readers: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": OrderedDict()}

    def block(self, block: int) -> tuple[int, np.ndarray]:
        """Returns (shard, bounds): document i of the block is tokens bounds[i] to bounds[i + 1] of the shard, int64."""
        shard = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
        (record,) = self._read(shard, [self._chunks[shard] + block - int(self._first_blocks[shard])])
        return shard, np.concatenate([self._block_starts[block : block + 1], np.frombuffer(record, "<i8")])

    def read(self, shard: int, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Reads tokens start to stop of a shard, for each (start, stop) in `spans`, in one access."""
        chunks = [range(start // CHUNK, (stop - 1) // CHUNK + 1) for start, stop in spans]
        wanted = sorted(set().union(*chunks))
        records = dict(zip(wanted, self._read(shard, wanted), strict=True)) if wanted else {}
        found = []
        for (start, stop), own in zip(spans, chunks, strict=True):
            pieces = [np.frombuffer(records[c], self._dtype)[max(start - c * CHUNK, 0) : stop - c * CHUNK] for c in own]
            found.append(np.concatenate(pieces) if pieces else np.empty(0, self._dtype))
        return found

    def _read(self, shard: int, records: list[int]) -> list[bytes]:
        path = self._paths[shard]
        try:
            return list(self._reader(shard).read(records))
        except (RuntimeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"{path} is damaged near record {records[0]}: {' '.join(str(error).split())[:200]}; copy or prepare "
                "the data again"
            ) from None

    def _reader(self, shard: int) -> Any:
        reader = self._readers.get(shard)
        if reader is None:
            reader = array_record_module.ArrayRecordReader(str(self._paths[shard]), "readahead_buffer_size:0")
            self._readers[shard] = reader
            if len(self._readers) > _OPEN_FILES:
                self._readers.popitem(last=False)  # a thread that still reads from it keeps it open
        return reader
