"""The bytes of each token in a tokenizer.json, from its decoder."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from dsv3_jax.config import ConfigError
from dsv3_jax.json_input import show

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> list[str]:
    """The character of each byte in a byte-level BPE: its own if that is printable, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


def bytes_reader(decoder: Any) -> Callable[[str], bytes]:
    """Returns a function from a token to the bytes that it adds within a text.

    What a decoder does only at the ends of a text, such as stripping a leading space, is ignored.

    Args:
      decoder: the field `decoder` of a tokenizer.json, parsed.

    Raises:
      ConfigError: the decoder doesn't simply concatenate tokens.
    """
    decoder = decoder or {"type": None}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    replaced = []
    for step in steps:
        if step["type"] == "Replace" and isinstance(old := step["pattern"].get("String"), str):
            replaced.append((old, step["content"]))
        elif step["type"] == "Metaspace":
            replaced.append((step["replacement"], " "))
        elif step["type"] not in ("ByteFallback", "Fuse", "Strip"):
            raise ConfigError(
                f"the tokenizer's decoder is {show(kinds)}: text can be streamed of ByteLevel, Metaspace, Replace, "
                "ByteFallback, Fuse and Strip"
            )

    def read(token: str) -> bytes:
        if "ByteFallback" in kinds and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return read


_BYTE_OF = {char: byte for byte, char in enumerate(byte_level_alphabet())}


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # an added token, which stands for itself
        return token.encode()
