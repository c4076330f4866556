"""Well-kept attention kernels of others that take queries and keys wider than values, fitted to our arguments.

Both want one key a head, so that the rope key is copied to every head in memory.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo  # the public entry refuses values narrower than keys

from pallas_kernels.mla_prefill import blockwise
from pallas_kernels.mla_prefill.residuals import residual

LONG = 1024
"""Tokens from which on training is faster with cuDNN: policy `paper` saves what its gradient needs, but repeats
tokamax's forward pass."""


def _joined(q_nope: jax.Array, q_rope: jax.Array, k_nope: jax.Array, k_rope: jax.Array) -> tuple[jax.Array, jax.Array]:
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    return jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, k_rope], -1)


def gpu(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    segments: jax.Array | None = None,
    for_gradient: bool = False,
) -> jax.Array:
    """The fastest on Hopper that takes the arguments, by measurements on an H100. Differentiable.

    tokamax; but for the gradients of long sequences, one per row, cuDNN; where a library isn't at hand, the other;
    else `blockwise`.

    for_gradient: as in `api.mla_prefill`. A rematerialised layer is traced by itself, with the forward pass that it
    doesn't use, and tokamax takes seconds to import and trace.
    """
    a = q_nope, q_rope, k_nope, k_rope, v
    tokens, keys = q_nope.shape[1], k_nope.shape[1]
    by_cudnn = segments is None and tokens == keys and has_cudnn(*a)
    if v.dtype == jnp.bfloat16 and importlib.util.find_spec("tokamax"):
        if by_cudnn and tokens >= LONG:
            return cudnn(*a, scale=scale) if for_gradient else _tokamax_with_gradients_by_cudnn(a, scale)
        return tokamax(*a, scale=scale, segments=segments)
    if by_cudnn:
        return cudnn(*a, scale=scale)
    return blockwise.mla_prefill(*a, scale=scale, segments=segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cudnn(a: blockwise.Arrays, scale: float) -> jax.Array:
    q, k = _joined(*a[:4])
    mask = fused_attention_stablehlo.MaskType.CAUSAL
    out: jax.Array = fused_attention_stablehlo.dot_product_attention(q, k, a[4], scale=scale, mask_type=mask)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _tokamax_with_gradients_by_cudnn(a: blockwise.Arrays, scale: float) -> jax.Array:
    return tokamax(*a, scale=scale)


_Residuals = tuple[blockwise.Arrays, jax.Array, jax.Array]


def _cudnn_forward(a: blockwise.Arrays, scale: float) -> tuple[jax.Array, _Residuals]:
    """cuDNN's, with residuals that have names, which its own rule's don't."""
    out, known = fused_attention_stablehlo._dot_product_attention_fwd_rule(*_cudnn_arrays(a), *_cudnn_options(scale))
    out, lse = residual(out), residual(known[-2])
    return out, (a, out, lse)


def _cudnn_backward(scale: float, residuals: _Residuals, dout: jax.Array) -> tuple[blockwise.Arrays]:
    a, out, lse = residuals
    given: tuple[Any, ...] = (*_cudnn_options(scale), (*_cudnn_arrays(a), lse, out), dout)
    dq, dk, dv, *_ = fused_attention_stablehlo._dot_product_attention_bwd_rule(*given)
    return ((*jax.vjp(_joined, *a[:4])[1]((dq, dk)), dv),)


def _cudnn_arrays(a: blockwise.Arrays) -> tuple[jax.Array, ...]:
    """Queries, keys and values, and empty arrays for what isn't used: a bias, lengths, offsets and pages."""
    return (*_joined(*a[:4]), a[4], *[jnp.zeros(0, a[4].dtype)] * 7)


def _cudnn_options(scale: float) -> tuple[Any, ...]:
    """scale, seed, dropout rate, (whether there is a bias, and a gradient of it), mask, layout, window, version, and
    whether log-sum-exps are returned."""
    lib = fused_attention_stablehlo
    layout, version = lib.AttentionLayout.BTNH.value, lib.check_cudnn_version()
    return scale, 42, 0.0, (False, False), lib.MaskType.CAUSAL, layout, None, version, False


_cudnn.defvjp(_cudnn_forward, _cudnn_backward)
_tokamax_with_gradients_by_cudnn.defvjp(_cudnn_forward, _cudnn_backward)


def has_cudnn(q_nope: jax.Array, q_rope: jax.Array, k_nope: jax.Array, k_rope: jax.Array, v: jax.Array) -> bool:
    """Whether a cuDNN is at hand that takes keys wider than values, and these widths and dtype."""
    try:
        version = fused_attention_stablehlo.check_cudnn_version()
    except RuntimeError:
        return False
    width = q_nope.shape[-1] + q_rope.shape[-1]
    fits = max(width, v.shape[-1]) <= 256 and width % 8 == 0 and v.shape[-1] % 8 == 0
    return version >= 91000 and fits and v.dtype in (jnp.bfloat16, jnp.float16)


def cudnn(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    segments: jax.Array | None = None,
) -> jax.Array:
    """cuDNN's fused attention, of whole sequences: `jax.nn.dot_product_attention` refuses values narrower than keys,
    but what it calls doesn't. Differentiable.

    Raises:
      ValueError: segments, or a prefix.
    """
    if segments is not None or k_nope.shape[1] != q_nope.shape[1]:
        raise ValueError("mla_prefill by cuDNN takes neither segments nor a prefix")
    return _cudnn((q_nope, q_rope, k_nope, k_rope, v), scale)


def tokamax(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    segments: jax.Array | None = None,
) -> jax.Array:
    """tokamax's Mosaic GPU flash attention. Differentiable.

    A document in one piece is a range of keys, and blocks outside it are skipped (in the backward pass masked); should
    there be one in several pieces, `blockwise` takes over as the program runs.
    """
    a = q_nope, q_rope, k_nope, k_rope, v
    if segments is None:
        return _tokamax(a, None, scale)
    start, in_one_piece = _documents(segments)
    out: jax.Array = lax.cond(
        in_one_piece,
        lambda a, start, segments: _tokamax(a, start, scale),
        lambda a, start, segments: blockwise.mla_prefill(*a, scale=scale, segments=segments),
        a, start, segments,
    )  # fmt: skip
    return out


def _tokamax(a: blockwise.Arrays, start: jax.Array | None, scale: float) -> jax.Array:
    from tokamax._src.ops.attention import api, base  # a dependency of this choice only; its public entry has no ranges

    _without_cache_misses()
    v = a[4]
    q, k = _joined(*a[:4])
    tokens, keys = q.shape[1], k.shape[1]
    if start is not None:
        start = start[:, None, keys - tokens :]
    if tokens == keys:
        mask = base.Mask(is_causal=True, k_start=start)
    else:
        mask = base.Mask(k_start=start, k_end=keys - tokens + 1 + jnp.arange(tokens)[None])
    return residual(api.IMPLEMENTATIONS["mosaic_gpu"](q, k, v, mask=mask, logits_scale=scale))


@functools.cache
def _without_cache_misses() -> None:
    """Drops tokamax's warnings, one per call, that it takes its default tiles rather than tuned ones."""
    logging.getLogger("absl").addFilter(lambda record: "Autotuning cache miss" not in record.getMessage())


def _documents(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where each token's document starts, (B, S); and whether they are numbered upwards: none has two pieces."""
    before, after = segments[:, :-1], segments[:, 1:]
    first = jnp.pad(before != after, ((0, 0), (1, 0)), constant_values=True)
    start = lax.cummax(jnp.where(first, jnp.arange(segments.shape[1], dtype=jnp.int32), 0), axis=1)
    return start, jnp.all(before <= after)


def splash(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    segments: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention for TPUs. Differentiable."""
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    q, k = _joined(q_nope, q_rope, k_nope, k_rope)
    tokens, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # it has no scale of its own
    bq, bkv = (next(b for b in (512, 256, 128) if n % b == 0) for n in (tokens, keys))
    blocks = lib.BlockSizes(block_q=bq, block_kv=bkv, block_q_dkv=bq, block_kv_dkv=bkv, block_q_dq=bq, block_kv_dq=bkv)
    mask = lib.MultiHeadMask([lib.CausalMask((tokens, keys), offset=keys - tokens)] * heads)
    kernel = lib.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    if segments is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        ids = lib.SegmentIds(q=segments[:, keys - tokens :], kv=segments)
        out = jax.vmap(functools.partial(kernel))(q, k, v, ids)
    return jnp.swapaxes(out, 1, 2)
