"""The public function of MLA prefill: validates arguments, and chooses a backend by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.devices import require_hopper, require_tpu
from pallas_kernels.mla_prefill import blockwise, library, reference, tpu

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference.mla_prefill,
    "blockwise": blockwise.mla_prefill,
    "gpu": library.gpu,
    "tokamax": library.tokamax,
    "cudnn": library.cudnn,
    "tpu": tpu.mla_prefill,
    "tpu_interpret": functools.partial(tpu.mla_prefill, interpret=True),
    "splash": library.splash,
    "splash_interpret": functools.partial(library.splash, interpret=True),
}


def mla_prefill(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    segments: jax.Array | None = None,
    implementation: str,
    for_gradient: bool = False,
) -> jax.Array:
    """Causal attention of the expanded form (report eq. 9 and 10). Differentiable in the five arrays.

    Args:
      q_nope, q_rope: (B, T, H, N) and (B, T, H, P): the sequences' last T tokens.
      k_nope: (B, S, H, N), S >= T; the first S - T keys are a prefix, such as from a cache, that every query attends
        to.
      k_rope: (B, S, P), shared by all heads.
      v: (B, S, H, V).
      scale: factor of the scores.
      segments: (B, S) int32 or None: packed documents; tokens attend only within their own.
      implementation: "reference" (plain); "blockwise" (plain JAX in memory linear in T and S, on any device and in any
        dtype; `blockwise.attention` also supports tokens out of order); "gpu" (Hopper: the fastest of "tokamax",
        "cudnn" and "blockwise" that supports the arguments); "cudnn" (Hopper, bfloat16, neither segments nor a prefix);
        "tokamax" (Hopper, bfloat16; fast if documents are numbered upwards); "tpu" (our own: bfloat16, T and S
        multiples of 128, P up to 64; fastest if N and V are multiples of 128 and P is 64, otherwise padded) or, for
        comparison, "splash" (TPU, bfloat16, T and S multiples of 128). "tpu_interpret" and "splash_interpret" run these
        on a CPU, slowly.
      for_gradient: with "gpu", that gradients are wanted: where they are cuDNN's, the result is, too.

    Returns:
      (B, T, H, V) of `v`'s dtype.

    Raises:
      ValueError: shapes or dtypes are inconsistent or unsupported, or there is no such implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"no MLA prefill {implementation!r}: there are {', '.join(IMPLEMENTATIONS)}")
    shapes = q_nope.shape, q_rope.shape, k_nope.shape, k_rope.shape, v.shape
    if [len(s) for s in shapes] != [4, 4, 4, 3, 4]:
        raise ValueError(f"mla_prefill needs arrays of 4, 4, 4, 3 and 4 axes, but got {shapes}")
    batch, tokens, heads, nope = q_nope.shape
    keys, rope = k_rope.shape[1:]
    expected = (
        q_nope.shape,
        (batch, tokens, heads, rope),
        (batch, keys, heads, nope),
        (batch, keys, rope),
        (batch, keys, heads, v.shape[3]),
    )
    if shapes != expected or keys < tokens:
        raise ValueError(
            "mla_prefill needs (B, T, H, N), (B, T, H, P), (B, S, H, N), (B, S, P), (B, S, H, V) with S >= T, "
            f"but got {shapes}"
        )
    if segments is not None and (segments.shape != (batch, keys) or segments.dtype != jnp.int32):
        raise ValueError(f"segments must be int32 {(batch, keys)}, but are {segments.dtype} {segments.shape}")
    if len({a.dtype for a in (q_nope, q_rope, k_nope, k_rope, v)}) > 1:
        raise ValueError("mla_prefill needs one dtype for its five arrays")
    if implementation not in ("reference", "blockwise", "gpu") and v.dtype != jnp.bfloat16:
        raise ValueError(f"mla_prefill by {implementation} takes bfloat16, but got {v.dtype}")
    if implementation in ("gpu", "tokamax", "cudnn"):
        require_hopper("mla_prefill")
    if implementation.startswith("splash") and (tokens % 128 or keys % 128):
        raise ValueError(f"mla_prefill by splash takes multiples of 128 tokens and keys, but got {tokens} and {keys}")
    if implementation in ("tpu", "splash"):
        require_tpu("mla_prefill")
    compute = IMPLEMENTATIONS[implementation]
    if implementation == "gpu":
        compute = functools.partial(compute, for_gradient=for_gradient)
    return compute(q_nope, q_rope, k_nope, k_rope, v, scale=scale, segments=segments)
