"""Documents as read -> tokens: parsed, validated, rearranged for FIM. Runs in the worker processes of `prepare`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data.sources import cut, decode
from dsv3_jax.data.tokenizer import EncodingError, Tokenizer, valid_unicode
from dsv3_jax.data.tokenizer_files import load_tokenizer
from dsv3_jax.json_input import one_line, show

FIM_TOKENS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
"""Names of the tokens before the prefix, the suffix and the middle, in known tokenizers."""

_PUNCTUATION_AND_LINES = re.compile(rb"([ -/:-@\[-`{-~]*[!-/:-@\[-`{-~])([\r\n]+)")


class Tokenized(NamedTuple):
    """Concatenated tokens of documents, and (n, 16) uint8 hashes of their texts. sizes: in bytes of UTF-8.

    errors: (record, message). records: the record of each document.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    sizes: np.ndarray
    records: np.ndarray
    errors: list[tuple[int, str]]


class Conversation(Protocol):
    """Renders chats; a chat template from `serving.chat`."""

    def render(self, messages: Any, tools: Any = None, *, add_generation_prompt: bool = True) -> Any: ...


@dataclasses.dataclass
class Tokenize:
    """Tokenises batches of documents. Pickled once per process; loads the tokenizer there.

    A document is bos, text, eos, without the last if both are one token. With `fim_rate`, that fraction of documents is
    bos, begin, prefix, hole, suffix, end, middle, eos, of a text split at two random positions (report section 4.1:
    PSM). With `split_rate`, that fraction of the tokens that combine punctuation and line ends is split in two.
    Randomness is determined by `seed` and the text. With `chat`, a factory of a template, records are conversations;
    see `_chat`.
    """

    tokenizer_path: str | None
    text_field: str = "text"
    max_characters: int | None = None
    fim_rate: float = 0.0
    split_rate: float = 0.0
    seed: int = 0
    chat: Callable[[], Conversation] | None = None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_path)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def whole(self, records: Sequence[bytes | str], is_json: Sequence[bool]) -> Tokenized:
        """Tokenises whole documents."""
        texts, found, errors, conversations = [], [], [], []
        for i, (record, as_json) in enumerate(zip(records, is_json, strict=True)):
            try:
                if self.chat is not None:
                    conversations.append(self._chat(record))
                    texts.append(record if isinstance(record, str) else record.decode())
                    found.append(i)
                    continue
                for text in self._texts(record, as_json):
                    texts.append(text)
                    found.append(i)
            except _BadDocument as error:
                errors.append((i, str(error)))
        data = [text.encode() for text in texts]
        hashes = [hashlib.blake2b(d, digest_size=16).digest() for d in data]
        if self.chat is not None:
            return self._pack(conversations, hashes, data, found, errors)
        try:
            encoded = self._encode(texts, hashes)
        except Exception as error:  # tokenizers of others raise nothing narrower: find whose fault it is
            if isinstance(error, ConfigError) and not isinstance(error, EncodingError):
                raise
            encoded, good = [], []
            for k, text in enumerate(texts):
                try:
                    encoded += self._encode([text], [hashes[k]])
                    good.append(k)
                except Exception as error:
                    errors.append((found[k], f"the tokenizer fails on it ({text[:40]!r} ...): {one_line(str(error))}"))
            hashes, data, found = ([values[k] for k in good] for values in (hashes, data, found))  # type: ignore[assignment]
        return self._pack(encoded, hashes, data, found, errors)

    def piece(self, text: str, first: bool, last: bool) -> np.ndarray:
        """Tokenises a piece of a long document."""
        bos, eos = self._ends
        ids = self._ids([valid_unicode(text)])[0]
        return np.concatenate([bos if first else [], ids, eos if last else []]).astype(np.int32)

    def _texts(self, record: bytes | str, as_json: bool) -> Iterator[str]:
        if as_json:
            value = _parse(record)
            if not isinstance(value, dict) or self.text_field not in value:
                raise _BadDocument(f"no field {self.text_field!r}: set text_field")
            text = value[self.text_field]
            if not isinstance(text, str):
                raise _BadDocument(f"field {self.text_field!r} is {show(text)}, not text")
        elif isinstance(record, str):
            text = record
        else:
            try:
                text = decode(record)
            except UnicodeDecodeError as error:
                raise _BadDocument(f"not UTF-8 (byte {error.start})") from None
        text = valid_unicode(text)
        pieces = [text] if self.max_characters is None else cut([text], self.max_characters)
        yield from (piece for piece in pieces if piece and not piece.isspace())

    @functools.cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        return [bos], [] if bos == eos else [eos]

    def _encode(self, texts: Sequence[str], hashes: Sequence[bytes]) -> list[np.ndarray]:
        bos, eos = self._ends
        parts: list[str] = []
        rearranged: list[bool] = []
        for text, digest in zip(texts, hashes, strict=True):
            rng = self._rng(digest, 0) if self.fim_rate else None
            rearranged.append(rng is not None and rng.random() < self.fim_rate)
            if rng is not None and rearranged[-1]:
                i, j = np.sort(rng.integers(0, len(text) + 1, 2))
                parts += [text[:i], text[j:], text[i:j]]
            else:
                parts.append(text)
        ids = iter(self._ids(parts))
        documents = []
        for digest, fim in zip(hashes, rearranged, strict=True):
            if fim:
                begin, hole, end = self._fim_ids
                pieces: list[Any] = [bos, [begin], next(ids), [hole], next(ids), [end], next(ids), eos]
            else:
                pieces = [bos, next(ids), eos]
            tokens = np.concatenate(pieces).astype(np.int32)
            documents.append(self._split(tokens, digest) if self.split_rate else tokens)
        return documents

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        size, found = self.tokenizer.vocab_size, self.tokenizer.encode_batch(texts)
        for ids in found:
            if len(ids) and not (ids.min() >= 0 and ids.max() < size):
                bad = ids[(ids < 0) | (ids >= size)][0]
                raise ConfigError(f"the tokenizer gave token id {bad}, outside its vocab_size of {size}")
        return found

    def _rng(self, digest: bytes, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, int.from_bytes(digest, "big")])

    # Rearranging -------------------------------------------------------------------------------------------

    @functools.cached_property
    def _fim_ids(self) -> tuple[int, ...]:
        for names in FIM_TOKENS:
            ids = [self.tokenizer.token_id(name) for name in names]
            if None not in ids:
                return tuple(i for i in ids if i is not None)
        raise ConfigError(
            f"fim_rate is {self.fim_rate}, but the tokenizer has no tokens for it, as {', '.join(FIM_TOKENS[0])}: set "
            "it to 0"
        )

    @functools.cached_property
    def _halves(self) -> dict[int, list[int]]:
        """Maps tokens that combine punctuation and line ends to the tokens of the two."""
        found = {}
        special = self.tokenizer.special_ids()
        for i, data in enumerate(self.tokenizer.token_bytes()):
            if i not in special and (match := _PUNCTUATION_AND_LINES.fullmatch(data)):
                found[i] = [int(t) for half in match.groups() for t in self.tokenizer.encode(half.decode())]
        return found

    def _split(self, tokens: np.ndarray, digest: bytes) -> np.ndarray:
        joined = np.flatnonzero(np.isin(tokens, list(self._halves)))
        chosen = joined[self._rng(digest, 1).random(len(joined)) < self.split_rate]
        if not len(chosen):
            return tokens
        pieces, start = [], 0
        for place in chosen:
            pieces += [tokens[start:place], self._halves[int(tokens[place])]]
            start = place + 1
        return np.concatenate([*pieces, tokens[start:]]).astype(np.int32)

    # Chats -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _conversation(self) -> Conversation:
        assert self.chat is not None
        return self.chat()

    def _chat(self, record: bytes | str) -> np.ndarray:
        """Tokenises a conversation; tokens that the assistant didn't write are complements (~token).

        The assistant writes what the template adds for its message after the generation prompt, including the token
        that ends the message.
        """
        value = _parse(record)
        messages = value.get("messages") if isinstance(value, dict) else None
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise _BadDocument("no field 'messages', a list of objects with role and content")
        for i, message in enumerate(messages):
            if not isinstance(content := message.get("content"), str | None):
                raise _BadDocument(f"message {i}: content is {show(content)}, not text")
        render = functools.partial(self._conversation.render, tools=value.get("tools"))
        pieces: list[np.ndarray] = []
        done = ""
        try:
            for i, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                before = render(messages[:i], add_generation_prompt=True).text
                after = render(messages[: i + 1], add_generation_prompt=False).text
                if not before.startswith(done) or not after.startswith(before):
                    raise _BadDocument(
                        f"message {i}: the template changes earlier text, so that its tokens can't be told"
                    )
                pieces.append(~self._prompt_ids(before[len(done) :]))
                pieces.append(self._prompt_ids(after[len(before) :]))
                done = after
        except _BadDocument:
            raise
        except ValueError as error:
            raise _BadDocument(f"the chat template refuses it: {error}") from None
        if not any(map(len, pieces)):
            raise _BadDocument("no message of the assistant: there is nothing to learn")
        tokens = np.concatenate(pieces)
        bos = self.tokenizer.bos_id
        return tokens if tokens[0] in (bos, ~bos) else np.concatenate([[~bos], tokens]).astype(np.int32)

    def _prompt_ids(self, text: str) -> np.ndarray:
        return self.tokenizer.encode_prompt(text, add_special_tokens=False)

    @staticmethod
    def _pack(
        documents: Sequence[np.ndarray],
        hashes: Sequence[bytes],
        data: Sequence[bytes],
        found: Sequence[int],
        errors: list[tuple[int, str]],
    ) -> Tokenized:
        return Tokenized(
            np.concatenate(documents) if documents else np.empty(0, np.int32),
            np.array([len(d) for d in documents], np.int64),
            np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16),
            np.array([len(d) for d in data], np.int64),
            np.array(found, np.int64),
            errors,
        )


class _BadDocument(Exception):
    pass


def _parse(record: bytes | str) -> Any:
    try:
        return json.loads(record if isinstance(record, str) else record.decode())  # json would take UTF-16, too
    except RecursionError:
        raise _BadDocument("not JSON of text: it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise _BadDocument(f"not UTF-8 (byte {error.start})") from None
    except ValueError as error:  # also of integers of thousands of digits
        raise _BadDocument(f"not JSON: {error}") from None
