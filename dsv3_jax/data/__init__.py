"""Documents -> tokens -> packed sequences -> batches whose position can be saved and restored."""

from dsv3_jax.data.packing import Corpus, PackedSequences, tokenize
from dsv3_jax.data.pipeline import DataConfig, TrainIterator, train_iterator, validation_batches
from dsv3_jax.data.sources import load_documents, split_documents
from dsv3_jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "HuggingFaceTokenizer",
    "PackedSequences",
    "Tokenizer",
    "TrainIterator",
    "load_documents",
    "load_tokenizer",
    "split_documents",
    "tokenize",
    "train_iterator",
    "validation_batches",
]
