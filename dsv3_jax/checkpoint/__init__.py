"""Checkpoints in Hugging Face's layout and in orbax's: loading, lossless conversion both ways, and verification.

`names` is the one table between the two layouts and `hf_config` reads config.json. `hf` and `store` each open
one of the layouts; `load_pretrained` reads either, or a training run, onto a mesh.
"""

from dsv3_jax.checkpoint.load import load_pretrained

__all__ = ["load_pretrained"]
