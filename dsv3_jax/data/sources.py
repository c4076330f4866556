"""Where documents come from: Python's own library, or a file or folder of text; and which are for validation."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import valid_unicode
from dsv3_jax.json_input import show

STDLIB = "stdlib"

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_READABLE = (*_TEXT_SUFFIXES, ".jsonl", ".parquet")

# Some distributions leave these out, so that the corpus would differ between machines (ensurepip to lib2to3);
# the others are tables, or data that `_stdlib` reads in another way.
_SKIPPED_PACKAGES = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo"}
_SKIPPED_PACKAGES |= {"encodings", "pydoc_data"}


def load_documents(
    source: str | Path = STDLIB, *, text_field: str = "text", max_characters: int | None = None
) -> list[str]:
    """Reads every document of a source, in an order that depends on nothing but the source.

    Args:
      source: "stdlib" for the reference texts and modules of Python's standard library; or a file or folder:
        each `.txt`, `.md`, `.rst` or `.py` file is a document, each line of a `.jsonl` file, each row of a
        `.parquet` file. Folders are searched in depth, in sorted order, without hidden entries.
      text_field: the field of JSONL objects, the column of parquet files.
      max_characters: cut longer documents, at line ends where possible.

    Returns:
      Documents that aren't blank; at least one. Lone surrogates, which JSON can hold and UTF-8 can't, are U+FFFD.

    Raises:
      ConfigError: no such source, a file that can't be read (named, with its line), or no documents.
    """
    texts = _stdlib() if source == STDLIB else _files(Path(source), text_field)
    documents = [piece for text in texts for piece in _cut(valid_unicode(text), max_characters) if piece.strip()]
    if not documents:
        known = "" if source == STDLIB else f" (files read: {', '.join(_READABLE)})"
        raise ConfigError(f"data source {str(source)!r} holds no text{known}")
    return documents


def split_documents(documents: Sequence[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """(training, validation) documents, in the given order.

    A hash of a document's text decides, so that neither order nor company moves it, and equal texts stay
    together. If all would fall on one side, the document of the extreme hash goes to the other.
    """
    if not validation_fraction:
        return list(documents), []
    hashes = np.array([_hash(text) for text in documents], np.uint64)
    held_out = (hashes < np.uint64(validation_fraction * 2**64)) | (hashes == hashes.min())
    held_out &= hashes != hashes.max()
    sides: tuple[list[str], list[str]] = ([], [])
    for text, side in zip(documents, held_out, strict=True):
        sides[int(side)].append(text)
    return sides


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def _cut(text: str, limit: int | None) -> Iterator[str]:
    start = 0
    while limit is not None and len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def _stdlib() -> Iterator[str]:
    """The language reference by topic, as `help()` shows it, then the modules' source."""
    with contextlib.suppress(ImportError):  # a Python without its documentation still has modules
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    root = Path(sysconfig.get_path("stdlib"))
    wanted = sys.stdlib_module_names - _SKIPPED_PACKAGES  # this leaves out site-packages and what vendors add
    for top in sorted(wanted):
        for path in [root / f"{top}.py", *_find(root / top, (".py",))]:
            if path.is_file() and not {"test", "tests"} & set(path.relative_to(root).parts):
                yield _read(path)


def _files(source: Path, text_field: str) -> Iterator[str]:
    if not source.exists():
        raise ConfigError(f"data source {str(source)!r} doesn't exist: give a file, a folder, or {STDLIB!r}")
    if source.is_file() and source.suffix.lower() not in _READABLE:
        raise ConfigError(f"can't read {source}: its name must end in one of {', '.join(_READABLE)}")
    for path in [source] if source.is_file() else _find(source, _READABLE):
        if path.suffix.lower() == ".jsonl":
            yield from _jsonl(path, text_field)
        elif path.suffix.lower() == ".parquet":
            yield from _parquet(path, text_field)
        else:
            yield _read(path)


def _find(root: Path, suffixes: Sequence[str]) -> list[Path]:
    found = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*"))
    hidden = lambda name: any(part.startswith(".") for part in name.split("/"))
    kept = [(name, p) for name, p in found if p.suffix.lower() in suffixes and not hidden(name) and p.is_file()]
    return [path for _, path in sorted(kept)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}): convert it or take it away") from None
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from None


def _jsonl(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except RecursionError:
            raise ConfigError(f"{path}, line {number} is not JSON of text: it is nested too deeply") from None
        except ValueError as error:  # also of integers of thousands of digits
            raise ConfigError(f"{path}, line {number} is not JSON: {error}") from None
        try:
            text = document[text_field]
        except (KeyError, TypeError, IndexError):
            raise ConfigError(f"{path}, line {number} has no field {text_field!r}: set data.text_field") from None
        if not isinstance(text, str):
            raise ConfigError(f"{path}, line {number}: field {text_field!r} is {show(text)}, not text")
        yield text


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow
            if text_field not in columns.names:
                has = ", ".join(columns.names)
                raise ConfigError(f"{path} has no column {text_field!r}: set data.text_field to one of {has}")
            kind = columns.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ConfigError(f"{path}: column {text_field!r} holds {kind}, not text")
            for batch in file.iter_batches(columns=[text_field]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: column {text_field!r} holds text that is not UTF-8: {error}") from None
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"can't read {path} as parquet: {error}") from None
