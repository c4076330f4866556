"""Bytes as tokens: no file and no training is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from dsv3_jax.data.hf_tokenizer import HuggingFaceTokenizer
from dsv3_jax.data.token_bytes import byte_level_alphabet
from dsv3_jax.data.tokenizer import valid_unicode


class ByteTokenizer(HuggingFaceTokenizer):
    """Ids 0 to 255 are UTF-8 bytes, followed by bos, eos and pad.

    `save` writes it as a byte-level BPE without merges.
    """

    vocab_size, bos_id, eos_id, pad_id = 259, 256, 257, 258

    def __init__(self) -> None:
        tokenizer = RustTokenizer(models.BPE({char: byte for byte, char in enumerate(byte_level_alphabet())}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in ("<bos>", "<eos>", "<pad>")]
        )
        config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": True}
        super().__init__(tokenizer, config, "the byte tokenizer")

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(valid_unicode(text).encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]
