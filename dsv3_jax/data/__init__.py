"""Data: documents -> tokens prepared on disk -> packed sequences -> batches with a position that can be saved.

`preparation` writes the shards that `pipeline` reads; `sources`, `tokenize`, `packing` and `mixture` are their stages.
Names are imported on first use, since worker processes need neither grain nor JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3_jax.data.byte_tokenizer import ByteTokenizer
    from dsv3_jax.data.hf_tokenizer import HuggingFaceTokenizer
    from dsv3_jax.data.mixture import Mixture
    from dsv3_jax.data.packing import BestFitSequences, PackedSequences
    from dsv3_jax.data.pipeline import DataConfig, TrainIterator, open_sources, train_iterator, validation_batches
    from dsv3_jax.data.preparation import PrepareOptions, prepare
    from dsv3_jax.data.shards import Prepared
    from dsv3_jax.data.tokenizer import Tokenizer
    from dsv3_jax.data.tokenizer_files import has_tokenizer, load_tokenizer

__all__ = [
    "BestFitSequences",
    "ByteTokenizer",
    "DataConfig",
    "HuggingFaceTokenizer",
    "Mixture",
    "PackedSequences",
    "PrepareOptions",
    "Prepared",
    "Tokenizer",
    "TrainIterator",
    "has_tokenizer",
    "load_tokenizer",
    "open_sources",
    "prepare",
    "train_iterator",
    "validation_batches",
]

_MODULES = {
    "byte_tokenizer": ["ByteTokenizer"],
    "hf_tokenizer": ["HuggingFaceTokenizer"],
    "mixture": ["Mixture"],
    "packing": ["BestFitSequences", "PackedSequences"],
    "pipeline": ["DataConfig", "TrainIterator", "open_sources", "train_iterator", "validation_batches"],
    "preparation": ["PrepareOptions", "prepare"],
    "shards": ["Prepared"],
    "tokenizer": ["Tokenizer"],
    "tokenizer_files": ["has_tokenizer", "load_tokenizer"],
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"dsv3_jax.data.{module}"), name)
    raise AttributeError(f"module 'dsv3_jax.data' has no attribute {name!r}")
