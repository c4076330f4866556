"""Automatic choice of implementations: the fastest that is right for the device, dtype and shapes at hand.

A runtime that names an implementation gets it, or an error that says what it needs. "auto" never falls back to anything
whose memory is quadratic in the sequence: where no kernel fits, long sequences are attended to block by block.
"""

from __future__ import annotations

import functools
import importlib.util

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.quantization.recipe import Recipe, fp8_implementation
from dsv3_jax.runtime import Runtime
from pallas_kernels.devices import has_tpu_kernels, is_hopper, platform

PAGE = 64
"""Tokens of a page of a cache, for the kernels that decode: its length must be a multiple."""
TPU_TILE = 128
"""The prefill kernel for TPUs takes multiples of this many tokens."""
SMALL = 1024 * 1024
"""Scores of a head, T x S, up to which they are kept whole: faster on a CPU, and memory is no matter."""


def kernels(runtime: Runtime) -> str | None:
    """The device whose kernels the runtime can use, "gpu" (Hopper) or "tpu"; None for others and other dtypes."""
    if runtime.dtype != "bfloat16":
        return None
    return "gpu" if is_hopper() else "tpu" if has_tpu_kernels() else None


def attention_impl(
    runtime: Runtime, config: ModelConfig, *, tokens: int, keys: int, cached: bool, in_order: bool = True
) -> str:
    """The runtime's implementation of attention, "auto" resolved.

    Args:
      tokens, keys: T and S of the call. cached: whether the keys are a cache's. in_order: whether tokens are stored in
        the order of their sequence.
    """
    if runtime.attention_impl != "auto":
        return runtime.attention_impl
    device, absorbed = kernels(runtime), runtime.attention_form == "absorbed"
    if absorbed and cached and keys % PAGE == 0 and config.qk_rope_head_dim == 64:
        if device == "gpu" and config.kv_lora_rank == 512:
            return "gpu"
        if device == "tpu" and config.kv_lora_rank % 128 == 0:
            return "tpu"
    if not absorbed and in_order:
        if device == "gpu":
            return "gpu"
        if device == "tpu" and config.qk_rope_head_dim <= 64 and tokens % TPU_TILE == keys % TPU_TILE == 0:
            return "tpu"
    return "reference" if tokens * keys <= SMALL else "blockwise"


def experts_impl(runtime: Runtime) -> str:
    """The runtime's implementation of experts, "auto" resolved."""
    if runtime.experts_impl != "auto":
        return runtime.experts_impl
    if platform() == "cpu":
        return "blocked"
    device = kernels(runtime)
    if device == "gpu":
        return "gpu"
    return "tokamax" if device == "tpu" and _has_tokamax() else "ragged"


def fp8_recipe(runtime: Runtime) -> Recipe:
    """How the runtime multiplies in FP8. Raises ConfigError where this device can't, or `dtype` doesn't suit it."""
    implementation = fp8_implementation()
    if implementation == "gpu" and runtime.dtype != "bfloat16":
        raise ConfigError(f"runtime.precision {runtime.precision!r} on a GPU takes dtype bfloat16, not {runtime.dtype}")
    return Recipe(implementation, runtime.fp8_scales, runtime.fp8_power_of_two)


@functools.cache
def _has_tokamax() -> bool:
    return importlib.util.find_spec("tokamax") is not None


def choices(runtime: Runtime, config: ModelConfig, tokens: int) -> str:
    """One line: the implementations that a forward pass over sequences of `tokens` gets on this device."""
    attention = attention_impl(runtime, config, tokens=tokens, keys=tokens, cached=False)
    experts = f"; experts: {experts_impl(runtime)}" if config.num_moe_layers else ""
    precision = runtime.dtype
    if runtime.precision != "dtype":
        recipe = fp8_recipe(runtime)
        experts = f"; linear layers and experts: FP8 {recipe}"
    return f"attention: {attention}{experts} ({precision} on {platform()})"
