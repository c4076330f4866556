"""Documents -> tokens -> packed sequences -> batches whose position can be saved and restored."""

from dsv3_jax.data.byte_tokenizer import ByteTokenizer
from dsv3_jax.data.hf_tokenizer import HuggingFaceTokenizer
from dsv3_jax.data.packing import Corpus, PackedSequences, tokenize
from dsv3_jax.data.pipeline import DataConfig, TrainIterator, train_iterator, validation_batches
from dsv3_jax.data.sources import load_documents, split_documents
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.data.tokenizer_files import has_tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "HuggingFaceTokenizer",
    "PackedSequences",
    "Tokenizer",
    "TrainIterator",
    "has_tokenizer",
    "load_documents",
    "load_tokenizer",
    "split_documents",
    "tokenize",
    "train_iterator",
    "validation_batches",
]
