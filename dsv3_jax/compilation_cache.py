"""A cache of compiled programs in the user's cache directory, so that a repeated command starts in seconds."""

from __future__ import annotations

import os
from pathlib import Path

import jax

_LARGEST = 8 << 30
"""Size of the cache in bytes, above which the least recently used programs are deleted."""
_LEAST_SECONDS = 0.1
"""Programs that compile faster aren't kept. JAX's default, 1, leaves out some that every run compiles."""


def keep_compiled_programs() -> str:
    """Enables JAX's compilation cache, unless the user has configured it. Returns a line that says where it is."""
    if not jax.config.jax_enable_compilation_cache:
        return "compiled programs aren't kept (JAX_ENABLE_COMPILATION_CACHE)"
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "dsv3_jax" / "compiled"))
        jax.config.update("jax_compilation_cache_max_size", _LARGEST)
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    where = jax.config.jax_compilation_cache_dir
    return f"compiled programs are kept in {where} (JAX_ENABLE_COMPILATION_CACHE=false keeps none)"
