"""Compiled programs, kept in the user's cache directory: a command that was run before starts in seconds."""

from __future__ import annotations

import os
from pathlib import Path

import jax

_LARGEST = 8 << 30
"""Bytes, above which programs that weren't used for longest are deleted."""


def keep_compiled_programs() -> str:
    """Has JAX keep the programs that it compiles, where the user hasn't chosen otherwise. Says in one line where."""
    if not jax.config.jax_enable_compilation_cache:
        return "compiled programs aren't kept (JAX_ENABLE_COMPILATION_CACHE)"
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "dsv3_jax" / "compiled"))
        jax.config.update("jax_compilation_cache_max_size", _LARGEST)
    where = jax.config.jax_compilation_cache_dir
    return f"compiled programs are kept in {where} (JAX_ENABLE_COMPILATION_CACHE=false keeps none)"
