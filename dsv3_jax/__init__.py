"""DeepSeek-V3 for JAX: train it, convert its weights, run it."""

from dsv3_jax.checkpoint import load_pretrained
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.runtime import Runtime

__all__ = ["DeepSeekV3", "ModelConfig", "Runtime", "load_pretrained"]
