"""Text out: the engine that generates many texts at once over a paged latent cache, and its parts."""

from dsv3_jax.inference.engine import Engine, EngineConfig
from dsv3_jax.inference.request import Request, Step
from dsv3_jax.inference.sampling import Sampling

__all__ = ["Engine", "EngineConfig", "Request", "Sampling", "Step"]
