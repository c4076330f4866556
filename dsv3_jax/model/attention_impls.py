"""The attention seam's fast ways: the project's kernels in place of `attention.attention`, chosen by name.

Each is what `attention.attention` computes for tokens in their order. The expanded form goes to `mla_prefill`, which
wants a sequence's new tokens to be the last of the keys; the absorbed form over a cache to `mla_decode`, which sees the
contiguous cache as pages in their order. On a mesh each device attends for its sequences and its heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.config import ConfigError, Runtime
from dsv3_jax.parallel.sharding import current_sharding
from pallas_kernels.mla_decode import SplitCache, mla_decode, pack
from pallas_kernels.mla_prefill import mla_prefill

PAGE = 64
"""Tokens of a page of a cache: its length must be a multiple."""

_PREFILL = {"pallas_reference": "reference", "gpu": "tokamax", "tpu": "tpu", "tpu_interpret": "tpu_interpret"}
_DECODE = {
    "pallas_reference": "reference",
    "gpu": "gpu",
    "gpu_interpret": "gpu_interpret",
    "tpu": "tpu",
    "tpu_interpret": "tpu_interpret",
}


def kernel(
    runtime: Runtime, *, order: jax.Array | None, segments: jax.Array | None, lengths: jax.Array | None, scale: float
) -> Callable[..., jax.Array]:
    """The runtime's kernel as a function of `attention.attention`'s five arrays.

    Args:
      runtime: whose `attention_impl` isn't "reference".
      order: as in `attention.Index`; must be None.
      segments: (B, S) int32 or None, of the keys, of which the last T are the queries' own.
      lengths: (B,) int32 or None: tokens in the cache, the new ones included; the absorbed form needs them.
      scale: what multiplies the scores.

    Raises:
      ConfigError: this implementation has no kernel for the form, or none for tokens out of order.
    """
    name, form = runtime.attention_impl, runtime.attention_form
    if order is not None:
        raise ConfigError(
            f"runtime.attention_impl {name!r} takes tokens in their order, but here they are spread over devices: "
            "use 'reference'"
        )
    choices = _PREFILL if form == "expanded" else _DECODE
    if name not in choices:
        raise ConfigError(f"runtime.attention_impl {name!r} has no {form} form: there are {', '.join(choices)}")
    how: dict[str, Any] = dict(scale=scale, implementation=choices[name])
    if form == "expanded":
        prefill = lambda arrays, segments: mla_prefill(*arrays, segments=segments, **how)
        return lambda *arrays: _on_each_device(prefill, arrays, segments, runtime)
    if lengths is None:
        raise ConfigError(
            f"runtime.attention_impl {name!r} has the absorbed form for decoding from a cache only: use the expanded "
            "form, or 'reference'"
        )
    decode = lambda arrays, lengths: _decode(*arrays, lengths=lengths, **how)
    return lambda *arrays: _on_each_device(decode, arrays, lengths, runtime)


def _on_each_device(
    attend: Callable[[Any, Any], jax.Array], arrays: tuple[jax.Array, ...], rows: jax.Array | None, runtime: Runtime
) -> jax.Array:
    """`attend(arrays, rows)`, cut over the mesh in use by sequences and heads; `rows` has a row a sequence."""
    sharding = current_sharding(runtime)
    if sharding.mesh is None or sharding.manual:
        return attend(arrays, rows)

    def spec(x: jax.Array) -> PartitionSpec:
        heads = "heads" if x.ndim == 4 and x.shape[2] > 1 else None
        logical = ("batch", None, heads, None)[: x.ndim]
        return sharding.spec("an input of an attention kernel", x.shape, logical)

    specs = jax.tree.map(spec, (arrays, rows))
    return jax.shard_map(attend, in_specs=specs, out_specs=specs[0][0], check_vma=False)(arrays, rows)


def turn(latent: jax.Array, k_rope: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turns each sequence's cache so that its last token comes last.

    Args:
      latent, k_rope: (B, S, R) and (B, S, P), of which the first `lengths` (B,) entries are filled.

    Returns:
      The two turned, and segments (B, S) int32: 1 where they are filled, and 0.
    """
    size = latent.shape[1]
    entry = (jnp.arange(size) + lengths[:, None]) % size
    take = functools.partial(jnp.take_along_axis, indices=entry[..., None], axis=1)
    return take(latent), take(k_rope), (entry < lengths[:, None]).astype(jnp.int32)


def _decode(q_nope, q_rope, latent, k_rope, _, *, lengths, scale, implementation):
    """`mla_decode` of queries (B, T, H, R) and (B, T, H, P) from a cache (B, S, 1, R) and (B, S, P)."""
    batch, size, _ = k_rope.shape
    if size % PAGE:
        raise ConfigError(f"MLA decoding by a kernel needs a cache of a multiple of {PAGE} tokens, but it has {size}")
    tables = jnp.arange(batch * size // PAGE, dtype=jnp.int32).reshape(batch, -1)
    latent, k_rope = (x.reshape(-1, PAGE, x.shape[-1]) for x in (latent, k_rope))
    cache = SplitCache(latent, k_rope)
    if implementation.startswith("tpu"):
        cache = pack(cache)  # a copy of the rope keys
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    # Has no gradient. Saying so also lets the scan over layers drop the call where it traces for constants only, as
    # Pallas doesn't by itself: without it, decoding on TPUs fails to trace.
    call = jax.custom_vjp(lambda *a: mla_decode(*a, scale=scale, implementation=implementation)[0])
    call.defvjp(_refuse_gradient, _refuse_gradient)
    return call(q, cache, tables, lengths)


def _refuse_gradient(*_):
    raise ConfigError("MLA decoding by a kernel has no gradient: train in the expanded form")
