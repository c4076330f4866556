"""Checkpoints in Hugging Face's layout and in orbax's: read, checked, converted."""

from dsv3_jax.checkpoint.load import load_pretrained

__all__ = ["load_pretrained"]
