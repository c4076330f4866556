"""Sources of documents: files, folders, Python's standard library, the Hub. Read as a stream, from any position.

Parsing and decoding is left to the worker processes where possible: lines and texts are passed on as bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import importlib
import io
import json
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from dsv3_jax.config import ConfigError
from dsv3_jax.json_input import one_line

STDLIB = "stdlib"

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_READABLE = (*_TEXT_SUFFIXES, *_JSONL_SUFFIXES, ".parquet")

# Some distributions leave these out, so that the corpus would differ between machines (ensurepip to lib2to3);
# the others are tables, or data that `_stdlib` reads in another way.
_SKIPPED_PACKAGES = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo"}
_SKIPPED_PACKAGES |= {"encodings", "pydoc_data"}

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")

_BATCH = 1 << 20
"""Bytes or characters of documents that are sent to a process together."""
_LONG = 1 << 21
"""Bytes or characters above which a document is tokenised in pieces, in bounded memory."""
_PIECE = 1 << 20


class Position(NamedTuple):
    """A position between two documents. offset: in bytes after decompression, or rows. number: of lines or rows."""

    file: int = 0
    offset: int = 0
    number: int = 0


class LongDocument(NamedTuple):
    """Yields a document's text in pieces, from the start at each call. Raises ValueError if there is none."""

    pieces: Callable[[], Iterator[str]]


class Record(NamedTuple):
    """One document as read. data: the bytes of a text file, a line of JSON (`is_json`), or text."""

    data: bytes | str | LongDocument
    is_json: bool
    number: int
    offset: int
    done: int
    """Bytes of the file on disk that have been read."""


class Batch(NamedTuple):
    """Adjacent documents. places: (file, line or row; 0 for a whole file). after: None if the last one continues."""

    records: list[bytes | str]
    is_json: list[bool]
    places: list[tuple[int, int]]
    long: LongDocument | None
    after: Position | None
    done: int


@dataclasses.dataclass(frozen=True)
class File:
    """A file of documents, or its equivalent. size: bytes on disk, 0 if unknown. source: index of the source."""

    name: str
    size: int
    source: int
    records: Callable[[int, int], Iterator[Record]]
    """Yields documents from (offset, number) on."""
    state: str
    """A fingerprint that changes with the file."""

    def where(self, number: int) -> str:
        """Returns the name of a document for messages."""
        if not number:
            return self.name
        return f"{self.name}, {'line' if '.jsonl' in self.name.lower() else 'row'} {number}"


def find_files(sources: Sequence[str], text_field: str) -> list[File]:
    """Lists the files of sources, in a deterministic order.

    Args:
      sources: each "stdlib" for the reference texts and modules of Python's standard library; or a file or folder, in
        which each `.txt`, `.md`, `.rst` or `.py` file is a document, each line of a `.jsonl` file (`.gz` and `.zst`
        too), each row of a `.parquet` file; or OWNER/NAME, with :CONFIG and @SPLIT if need be, a data set of the
        Hugging Face Hub. Folders are searched recursively, in sorted order, without hidden entries and links to
        folders.
      text_field: the column of parquet files and of the Hub.

    Raises:
      ConfigError: a source doesn't exist, or has no readable file.
    """
    files = []
    for number, source in enumerate(sources):
        path = Path(source)
        if source == STDLIB:
            files.append(_stdlib_file(number))
        elif source and path.exists():
            files += [_file(p, number, text_field) for p in _paths(path)]
        elif _HUB_NAME.fullmatch(source) and not path.parent.exists() and not source.endswith(_READABLE):
            files.append(_hub_file(source, number, text_field))
        else:
            raise ConfigError(f"data source {source!r} doesn't exist: give a file, a folder, or {STDLIB!r}")
    return files


def content_hash(files: Sequence[File]) -> str:
    """A fingerprint of the files of sources in order, independent of their location."""
    digest = xxhash.xxh3_128()
    for file in files:
        path = Path(file.name)
        if path.is_file():
            digest.update(f"{path.name} {file.size}\n".encode("utf-8", "surrogateescape"))
            with _reading(path), path.open("rb") as opened:
                while piece := opened.read(1 << 22):
                    digest.update(piece)
        else:
            digest.update(file.state.encode())
    return digest.hexdigest()


def read_batches(files: Sequence[File], start: Position) -> Iterator[Batch]:
    """Yields the documents from `start` on, in batches that depend only on that position."""
    records: list[bytes | str] = []
    is_json: list[bool] = []
    places: list[tuple[int, int]] = []
    before = sum(file.size for file in files[: start.file])
    size, done, after = 0, before, start
    for index in range(start.file, len(files)):
        file = files[index]
        offset, number = (start.offset, start.number) if index == start.file else (0, 0)
        for record in file.records(offset, number):
            data = record.data
            if size and (isinstance(data, LongDocument) or size >= _BATCH):
                yield Batch(records, is_json, places, None, after, done)
                records, is_json, places, size = [], [], [], 0
            after, done = Position(index, record.offset, record.number), before + record.done
            if isinstance(data, LongDocument):
                yield Batch([], [], [(index, record.number)], data, after, done)
                continue
            records.append(data)
            is_json.append(record.is_json)
            places.append((index, record.number))
            size += len(data) + 1
        before += file.size
    if size:
        yield Batch(records, is_json, places, None, after, done)


def cut(pieces: Iterable[str], limit: int, *, between_words: bool = False) -> Iterator[str]:
    """Splits text into pieces of at most `limit` characters, at line ends if there are any.

    between_words: split only before a line that doesn't begin with a space, since tokenizers merge spaces with their
      neighbours; if there is none, before a space.
    """
    rest = ""
    for piece in pieces:
        rest, start = rest + piece, 0
        while len(rest) - start > limit:
            end = _line_end(rest, start, start + limit, between_words)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    yield rest


def _line_end(text: str, start: int, stop: int, between_words: bool) -> int:
    end = text.rfind("\n", start, stop) + 1
    while between_words and end and text[end : end + 1].isspace():
        end = text.rfind("\n", start, end - 1) + 1
    if between_words and not end:
        end = max(text.rfind(" ", start + 1, stop), 0)
    return end or stop


# Files -----------------------------------------------------------------------------------------------------


def _paths(source: Path) -> list[Path]:
    if source.is_file():
        if not source.name.lower().endswith(_READABLE):
            raise ConfigError(f"can't read {source}: its name must end in one of {', '.join(_READABLE)}")
        return [source]
    found = _find(source, _READABLE)
    if not found:
        raise ConfigError(f"data source {str(source)!r} holds no text (files read: {', '.join(_READABLE)})")
    return found


def _find(root: Path, suffixes: Sequence[str]) -> list[Path]:
    found = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*"))
    visible = ((name, path) for name, path in found if not any(part.startswith(".") for part in name.split("/")))
    kept = [(name, path) for name, path in visible if name.lower().endswith(tuple(suffixes))]
    return [path for _, path in sorted(kept) if path.is_file()]


def _file(path: Path, source: int, text_field: str) -> File:
    name = path.name.lower()
    with _reading(path):
        stat = path.stat()
    if name.endswith(_JSONL_SUFFIXES):
        records = lambda offset, number: _jsonl(path, text_field, offset, number)
    elif name.endswith(".parquet"):
        records = lambda offset, number: _parquet(path, text_field, offset)
    else:
        records = lambda offset, number: _text(path, offset)
    return File(str(path), stat.st_size, source, records, f"{stat.st_size} {stat.st_mtime_ns}")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror or error}") from None


def _text(path: Path, offset: int) -> Iterator[Record]:
    if offset:  # it is one document, and has been read
        return
    with _reading(path):
        size = path.stat().st_size
        data = path.read_bytes() if size < _LONG else LongDocument(lambda: _text_pieces(path))
    yield Record(data, False, 0, max(size, 1), size)


def _text_pieces(path: Path) -> Iterator[str]:
    with _reading(path), path.open(encoding="utf-8-sig") as file:
        while piece := file.read(_PIECE):
            yield piece


def _jsonl(path: Path, text_field: str, offset: int, number: int) -> Iterator[Record]:
    with _reading(path), path.open("rb") as raw, _decompressed(path, raw) as file:
        plain = file is raw
        try:
            _skip(file, offset, plain)
            for line, after in _lines(file, offset):
                number += 1
                done = after if plain else raw.tell()
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if len(line) >= _LONG:
                    long = LongDocument(lambda line=line: json_text(line, text_field))  # type: ignore[misc]
                    yield Record(long, True, number, after, done)
                elif line and not line.isspace():
                    yield Record(line, True, number, after, done)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ConfigError(f"{path} is damaged or cut off after line {number}: {one_line(str(error))}") from None
        except OSError as error:
            if plain:
                raise
            raise ConfigError(f"{path} is damaged or cut off after line {number}: {one_line(str(error))}") from None


def _decompressed(path: Path, raw: Any) -> Any:
    suffix = path.suffix.lower()
    if suffix in (".gz", ".zst") and not path.stat().st_size:  # even nothing takes some bytes when it is compressed
        raise ConfigError(f"{path} is cut off: it has no bytes")
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(raw, "zstd")
    return raw


def _skip(file: Any, offset: int, plain: bool) -> None:
    if plain:
        file.seek(offset)
        return
    while offset:
        piece = file.read(min(offset, 1 << 20))
        if not piece:
            raise EOFError("it is shorter than it was")
        offset -= len(piece)


def _lines(file: Any, offset: int) -> Iterator[tuple[bytes, int]]:
    """Yields lines without their ends, each with the position after it."""
    rest = bytearray()
    while block := file.read1(1 << 20):  # what there is: an error then comes after the last line that is whole
        first, *others = block.split(b"\n")
        rest += first
        for line in others:
            offset += len(rest) + 1
            yield bytes(rest), offset
            rest = bytearray(line)
    if rest:
        yield bytes(rest), offset + len(rest)


_JSON_TOKEN = re.compile(rb'\s*+("(?:[^"\\]++|\\.)*+"|[{}\[\],:]|[^\s"{}\[\],:]++)', re.DOTALL)
_UNITS = re.compile(rb"(?:[^\\\x80-\xff]|[\xc0-\xff][\x80-\xbf]*+|\\u[0-9a-fA-F]{4}|\\[^u]){1,100000}+", re.DOTALL)
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB]..\Z", re.DOTALL)


def json_text(line: bytes, name: str) -> Iterator[str]:
    """Yields the text of a field of a JSON object in pieces, without copying the whole. Raises ValueError."""
    start, stop = _json_string(line, name)
    while start < stop:
        end = min(start + _PIECE, stop)
        if end < stop:  # a space is never within an escape or a character
            end = line.rfind(b" ", start + 1, end)
        if end <= start:
            units = _UNITS.match(line, start, stop)
            if units is None:
                raise ValueError(f"not JSON: byte {start} of the line")
            end = units.end()
            if end < stop and (high := _HIGH_SURROGATE.search(line, end - 6, end)) and high.start() > start:
                end = high.start()
        yield json.loads('"' + line[start:end].decode() + '"')
        start = end


def _json_string(line: bytes, name: str) -> tuple[int, int]:
    """Returns the position of the text of a top-level field, without its quotes."""
    depth, key, found, place, expects_key = 0, None, None, 0, False
    while token := _JSON_TOKEN.match(line, place):
        place, first = token.end(), line[token.start(1)]
        if depth == 1 and first == ord('"') and expects_key:
            key, expects_key = json.loads(token[1].decode()), False
            continue
        if depth == 1 and key == name and first != ord(":"):
            if first != ord('"'):
                raise ValueError(f"field {name!r} is not text")
            found = (token.start(1) + 1, token.end(1) - 1)
        if first != ord(":"):
            key = None
        depth += (first in b"{[") - (first in b"}]")
        expects_key = depth == 1 and first in b"{,"
    if depth or line[place:].strip():
        raise ValueError("not JSON: it ends too early")
    if found is None:
        raise ValueError(f"no field {name!r}: set text_field")
    return found


def _parquet(path: Path, text_field: str, skip: int) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            _check_column(file.schema_arrow, text_field, path)
            size = path.stat().st_size
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= skip:
                    row += rows
                    continue
                done = size * (row + rows) // max(file.metadata.num_rows, 1)
                for batch in file.iter_batches(64, row_groups=[group], columns=[text_field], use_threads=False):
                    for value in batch.column(0):
                        row += 1
                        if row <= skip or not value.is_valid:
                            continue
                        try:
                            text: str | LongDocument | bytes = _piecewise(value.as_py())
                        except UnicodeDecodeError:  # as bytes it is refused alone, like a line of JSON
                            text = value.cast(pa.large_binary()).as_py()
                        yield Record(text, False, row, row, done)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"can't read {path} as parquet (after row {row}): {one_line(str(error).strip())}") from None


def _piecewise(text: str) -> str | LongDocument:
    return text if len(text) < _LONG else LongDocument(lambda: iter([text]))


def _check_column(schema: Any, text_field: str, where: Path | str) -> None:
    import pyarrow as pa

    if text_field not in schema.names:
        raise ConfigError(f"{where} has no column {text_field!r}: set text_field to one of {', '.join(schema.names)}")
    kind = schema.field(text_field).type
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(text) or pa.types.is_large_string(text) or pa.types.is_string_view(text)):
        raise ConfigError(f"{where}: column {text_field!r} holds {kind}, not text")


# The standard library, and the Hub --------------------------------------------------------------------------


def _stdlib_file(source: int) -> File:
    texts = list(_stdlib())
    size = sum(map(len, texts))

    def records(offset: int, number: int) -> Iterator[Record]:
        for i in range(offset, len(texts)):
            yield Record(texts[i], False, i + 1, i + 1, size * (i + 1) // len(texts))

    return File(STDLIB, size, source, records, xxhash.xxh3_128_hexdigest(json.dumps(texts).encode()))


def _stdlib() -> Iterator[str]:
    """Yields the language reference by topic, as shown by `help()`, then the source of modules."""
    with contextlib.suppress(ImportError):  # a Python without its documentation still has modules
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    root = Path(sysconfig.get_path("stdlib"))
    wanted = sys.stdlib_module_names - _SKIPPED_PACKAGES  # this leaves out site-packages and what vendors add
    for top in sorted(wanted):
        for path in [root / f"{top}.py", *_find(root / top, (".py",))]:
            if path.is_file() and not {"test", "tests"} & set(path.relative_to(root).parts):
                yield decode(path.read_bytes())


def decode(data: bytes) -> str:
    """Decodes the text of a file: UTF-8, any line ends. Raises UnicodeDecodeError."""
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()


def _hub_file(source: str, number: int, text_field: str) -> File:
    match = _HUB_NAME.fullmatch(source)
    assert match is not None
    name, config, split = match["name"], match["config"], match["split"] or "train"
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise ConfigError(
            f"data source {source!r} doesn't exist here; to read a data set of that name from the Hugging Face Hub: "
            "pip install datasets"
        ) from None
    from huggingface_hub import HfApi

    with _from_hub(source):
        revision = HfApi().dataset_info(name).sha  # one for all of the work, which may be interrupted

    def records(offset: int, number: int) -> Iterator[Record]:
        with _from_hub(source):
            rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True).skip(offset)
            for row, values in enumerate(rows, offset + 1):
                if text_field not in values:
                    raise ConfigError(
                        f"{source} has no field {text_field!r}: set text_field to one of {', '.join(sorted(values))}"
                    )
                text = values[text_field]
                if text is None:
                    continue
                if not isinstance(text, str):
                    raise ConfigError(f"{source}, row {row}: field {text_field!r} is not text")
                yield Record(_piecewise(text), False, row, row, 0)

    return File(source, 0, number, records, f"{source} {revision}")


@contextlib.contextmanager
def _from_hub(source: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of the network and of formats: the libraries raise many kinds
        raise ConfigError(f"can't read {source} from the Hub: {' '.join(str(error).split())[:300]}") from None
