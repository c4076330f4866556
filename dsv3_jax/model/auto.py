"""Automatic choice of implementations: the fastest that is correct for the device, dtype and shapes.

A runtime that names an implementation gets it, or an error that says what it requires. "auto" never falls back to an
implementation whose memory is quadratic in the sequence: without a suitable kernel, long sequences use `blockwise`.
"""

from __future__ import annotations

import functools
import importlib.util

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.quantization.recipe import Recipe, fp8_implementation
from dsv3_jax.runtime import Runtime
from pallas_kernels.devices import has_tpu_kernels, is_hopper, platform

PAGE = 64
"""Tokens per page of a cache for the decoding kernels, of which the cache's length must be a multiple."""
TPU_TILE = 128
"""The prefill kernel for TPUs requires multiples of this many tokens."""
UNROLLED = 8
"""Largest number of layers that are unrolled on a GPU."""
STEP_TOKENS = 8
"""Largest number of tokens per sequence of a step of decoding, with drafts."""
SMALL = 1024 * 1024
"""Largest number of scores per head, T x S, for `reference`, which is faster on a CPU while memory is no concern."""


def kernels(runtime: Runtime) -> str | None:
    """Returns "gpu" (Hopper) or "tpu" if kernels support the device and the runtime's dtype, else None."""
    if runtime.dtype != "bfloat16":
        return None
    return "gpu" if is_hopper() else "tpu" if has_tpu_kernels() else None


def attention_impl(
    runtime: Runtime,
    config: ModelConfig,
    *,
    tokens: int,
    keys: int,
    cached: bool,
    in_order: bool = True,
    in_pages: bool = False,
) -> str:
    """Returns the runtime's implementation of attention, with "auto" resolved.

    Args:
      tokens, keys: T and S of the call. cached: whether the keys come from a cache. in_order: whether tokens are stored
        in the order of their sequence. in_pages: whether plain attention can read the cache in pages, without a copy.
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
    if in_pages and platform() == "cpu":
        return "blockwise"
    return "reference" if tokens * keys <= SMALL else "blockwise"


def unrolls(layers: int, runtime: Runtime, *, tokens: int | None = None) -> bool:
    """Whether a stack of layers is unrolled: on one GPU, if they are few enough to compile fast.

    A loop slices weights and stacks gradients, a tenth of a training step's time at V2-Lite's widths. Without one, XLA
    keeps all layers' weights in the runtime's dtype until the backward pass: on a mesh they would be all-gathered ones.
    It also merges what policy `paper` recomputes with what was computed; `block`, which is for memory, has the loop.
    In decoding, XLA copies a layer's weights out of the stack before most products, a sixth of a step at these widths.

    tokens: of each sequence, with a cache; None without one. Prompts, whose products take long, aren't unrolled.
    """
    few = runtime.remat != "block" if tokens is None else tokens <= STEP_TOKENS
    return platform() == "gpu" and runtime.sharding == "single" and layers <= UNROLLED and few


def experts_impl(runtime: Runtime) -> str:
    """Returns the runtime's implementation of experts, with "auto" resolved."""
    if runtime.experts_impl != "auto":
        return runtime.experts_impl
    if platform() == "cpu":
        return "blocked"
    device = kernels(runtime)
    if device == "gpu":
        return "gpu"
    return "tokamax" if device == "tpu" and _has_tokamax() else "ragged"


def fp8_recipe(runtime: Runtime) -> Recipe:
    """Returns how the runtime multiplies in FP8. Raises ConfigError if the device or `dtype` doesn't support it."""
    implementation = fp8_implementation()
    if implementation == "gpu" and runtime.dtype != "bfloat16":
        raise ConfigError(f"runtime.precision {runtime.precision!r} on a GPU takes dtype bfloat16, not {runtime.dtype}")
    return Recipe(implementation, runtime.fp8_scales, runtime.fp8_power_of_two, runtime.fp8_attention_output)


@functools.cache
def _has_tokamax() -> bool:
    return importlib.util.find_spec("tokamax") is not None


def choices(runtime: Runtime, config: ModelConfig, tokens: int, *, training: bool = False) -> str:
    """Describes in one line the implementations of a forward pass over sequences of `tokens` on this device.

    training: whether it is one of training, which may unroll layers.
    """
    attention = attention_impl(runtime, config, tokens=tokens, keys=tokens, cached=False)
    experts = f"; experts: {experts_impl(runtime)}" if config.num_moe_layers else ""
    precision = runtime.dtype
    if runtime.precision != "dtype":
        recipe = fp8_recipe(runtime)
        experts = f"; linear layers and experts: FP8 {recipe}"
    stacks = {"dense": config.num_dense_layers, "sparse": config.num_moe_layers}
    stacks = {kind: n for kind, n in stacks.items() if training and n > 1 and unrolls(n, runtime)}
    unrolled = "".join(f"; {n} {kind} layers unrolled" for kind, n in stacks.items())
    return f"attention: {attention}{experts}{unrolled} ({precision} on {platform()})"
