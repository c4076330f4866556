"""Text generation: an engine with continuous batching over a paged latent cache, and a plain `generate`.

`engine` schedules requests, `steps` are its two device programs, `pages` and `paged_cache` its memory, `sampling` draws
tokens. `generate` and `text` continue one batch over a contiguous cache.
"""

from dsv3_jax.inference.engine import Engine, EngineConfig
from dsv3_jax.inference.request import Request, Step
from dsv3_jax.inference.sampling import Sampling

__all__ = ["Engine", "EngineConfig", "Request", "Sampling", "Step"]
