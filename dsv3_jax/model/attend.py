"""The attention seam: scores, softmax and weighted values (eq. 9 and 10), by the implementation that `model.auto`
chooses.

`attention` is the reference, in plain `jnp`; `blockwise` computes the same block by block, and reads a cache in pages
where they lie. The kernels require tokens in their order: `mla_prefill` for the expanded form, in which a sequence's
new tokens must be the last of the keys, and `mla_decode` for the absorbed form over a cache, which it reads in pages.
On a mesh each device computes its own sequences and heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.model.auto import PAGE, attention_impl
from dsv3_jax.model.cache import Keys, Pages, TokenPositions
from dsv3_jax.parallel.sharding import current_mesh, current_sharding
from dsv3_jax.runtime import Runtime
from pallas_kernels.mla_decode import SplitCache, mla_decode, pack
from pallas_kernels.mla_decode.blockwise import mla_decode as blockwise_decode
from pallas_kernels.mla_prefill import blockwise, mla_prefill, residual

_PREFILL = {"pallas_reference": "reference", "gpu": "gpu", "tpu": "tpu", "tpu_interpret": "tpu_interpret"}
_DECODE = {
    "pallas_reference": "reference",
    "gpu": "gpu",
    "gpu_interpret": "gpu_interpret",
    "tpu": "tpu",
    "tpu_interpret": "tpu_interpret",
}


_PLAIN = ("reference", "blockwise")


def _choose(keys: Keys, where: TokenPositions, config: ModelConfig, runtime: Runtime) -> str:
    """Returns the implementation for these queries and keys."""
    return attention_impl(
        runtime,
        config,
        tokens=where.positions.shape[1],
        keys=keys.latent.shape[1],
        cached=keys.lengths is not None,
        in_order=where.order is None,
        in_pages=_in_pages(keys, runtime),
    )


def _in_pages(keys: Keys, runtime: Runtime) -> bool:
    """Whether plain attention can read the pages of a cache instead of a copy of its keys."""
    return keys.pages is not None and runtime.attention_form == "absorbed" and current_mesh() is None


def arrange(keys: Keys, where: TokenPositions, config: ModelConfig, runtime: Runtime) -> Keys:
    """Orders the tokens of a cache as the implementation of the expanded form requires."""
    kernel = _choose(keys, where, config, runtime) not in _PLAIN
    return right_align(keys) if kernel and keys.lengths is not None and runtime.attention_form == "expanded" else keys


@jax.named_scope("attend")
def attend(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    v: jax.Array,
    keys: Keys,
    where: TokenPositions,
    config: ModelConfig,
    runtime: Runtime,
    *,
    scale: float,
    reference: bool = False,
) -> jax.Array:
    """Causal attention over decoupled heads.

    Args:
      q_nope, q_rope: (B, T, H, N) and (B, T, H, P), queries of the tokens at `where`.
      k_nope, v: (B, S, H, N) and (B, S, H, Vd), of `keys`; in the absorbed form both are the latents, (B, S, 1, R).
      keys: arranged by `arrange`.
      scale: factor of the scores.
      reference: use the reference whatever the runtime says, as during initialisation.

    Returns:
      (B, T, H, Vd) of `v`'s dtype.

    Raises:
      ConfigError: the implementation has no kernel for this form.
    """
    heads = q_nope, q_rope, k_nope, keys.rope_key, v
    name = "reference" if reference else _choose(keys, where, config, runtime)
    if name == "reference":
        out = attention(
            *heads,
            q_places=where.places,
            k_places=keys.places,
            q_segments=where.segments,
            k_segments=keys.segments,
            scale=scale,
        )
        return residual(out)
    if name == "blockwise" and _in_pages(keys, runtime):
        assert keys.pages is not None
        assert keys.lengths is not None
        return _decode(q_nope, q_rope, keys.pages, keys.lengths, scale=scale, implementation="blockwise")
    if name == "blockwise":
        in_order = where.order is None and keys.lengths is None
        return blockwise.attention(
            *heads,
            q_index=None if in_order else where.places,
            k_index=None if in_order else keys.places,
            q_segments=None if keys.segments is None else where.segments,
            k_segments=keys.segments,
            scale=scale,
        )
    return _kernel(name, keys, where, runtime, scale)(*heads)


def attention(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *,
    q_places: jax.Array,
    k_places: jax.Array,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    scale: float,
) -> jax.Array:
    """Causal attention over decoupled heads (eq. 9 and 10): the reference implementation.

    Args:
      q_nope, q_rope: (B, T, H, N) and (B, T, H, P).
      k_nope: (B, S, H, N); in the absorbed form (B, S, 1, N), one key for all heads, where N = R.
      k_rope: (B, S, P), shared by all heads.
      v: (B, S, H, Vd), or (B, S, 1, Vd).
      q_places, k_places: (B, T) and (B, S) int32: a query attends to keys whose place is at most its own,
      q_segments, k_segments: (B, T) and (B, S) int32 or None: and whose segment equals its own.
      scale: factor of the scores.

    Returns:
      (B, T, H, Vd) of `v`'s dtype. The softmax is in float32. A query without any key gets the mean of all values.
    """
    wide = jnp.promote_types(q_nope.dtype, jnp.float32)
    batch, count, heads, _ = q_nope.shape
    one_key = k_nope.shape[2] == 1
    if (
        one_key
    ):  # heads are as many queries of a product of matrices: on a CPU ten times as fast as an axis of their own
        fold: Any = lambda q: q.swapaxes(1, 2).reshape(batch, heads * count, -1)
        scores = jnp.einsum("bmn,bsn->bms", fold(q_nope), k_nope[:, :, 0], preferred_element_type=wide)
        scores += jnp.einsum("bmp,bsp->bms", fold(q_rope), k_rope, preferred_element_type=wide)
        scores = scores.reshape(batch, heads, count, -1)
    else:
        scores = jnp.einsum("bthn,bshn->bhts", q_nope, k_nope, preferred_element_type=wide)
        scores += jnp.einsum("bthp,bsp->bhts", q_rope, k_rope, preferred_element_type=wide)
    mask = k_places[:, None, :] <= q_places[:, :, None]
    if q_segments is not None and k_segments is not None:
        mask &= k_segments[:, None, :] == q_segments[:, :, None]
    scores = jnp.where(mask[:, None], scores * scale, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if one_key:
        out = jnp.einsum("bms,bsv->bmv", weights.reshape(batch, heads * count, -1), v[:, :, 0])
        return out.reshape(batch, heads, count, -1).swapaxes(1, 2)
    return jnp.einsum("bhts,bshv->bthv", weights, v)


def _kernel(name: str, keys: Keys, where: TokenPositions, runtime: Runtime, scale: float) -> Callable[..., jax.Array]:
    """Wraps a kernel as a function of the five arrays of `attention`."""
    form = runtime.attention_form
    choices = _PREFILL if form == "expanded" else _DECODE
    if name not in choices:
        raise ConfigError(f"runtime.attention_impl {name!r} has no {form} form: there are {', '.join(choices)}")
    how: dict[str, Any] = dict(scale=scale, implementation=choices[name])
    if form == "expanded":
        how["for_gradient"] = runtime.remat != "none"  # in training
        prefill = lambda arrays, segments: mla_prefill(*arrays, segments=segments, **how)
        if where.order is not None:
            order = where.order
            return lambda *arrays: _by_pieces(prefill, arrays, keys.segments, order, runtime)
        return lambda *arrays: _on_each_device(prefill, arrays, keys.segments, runtime)
    if keys.lengths is None:
        raise ConfigError(
            f"runtime.attention_impl {name!r} has the absorbed form for decoding from a cache only: use the expanded "
            "form, or 'reference'"
        )
    pages = keys.pages or _pages(keys)
    return lambda q_nope, q_rope, *_: _on_each_device(
        lambda queries, cache: _decode(*queries, *cache, **how), (q_nope, q_rope), (pages, keys.lengths), runtime
    )


def _on_each_device(
    attend: Callable[[Any, Any], jax.Array], arrays: tuple[jax.Array, ...], rows: Any, runtime: Runtime
) -> jax.Array:
    """Computes `attend(arrays, rows)` with sequences and heads sharded over the current mesh.

    rows: segments (B, S), or pages and lengths (B,), sharded by sequences only.
    """
    sharding = current_sharding(runtime)
    if sharding.mesh is None or sharding.manual:
        return attend(arrays, rows)

    def spec(x: jax.Array) -> PartitionSpec:
        heads = "heads" if x.ndim == 4 and x.shape[2] > 1 else None
        logical = ("batch", None, heads, None)[: x.ndim]
        return sharding.spec("an input of an attention kernel", x.shape, logical)

    def by_sequence(x: jax.Array) -> PartitionSpec:
        logical = {0: (), 5: (None, "batch")}.get(x.ndim, ("batch",))  # of pages, those that aren't of all sequences
        return sharding.spec("a cache", x.shape, (*logical, *(None,) * (x.ndim - len(logical))))

    specs = jax.tree.map(spec, arrays), jax.tree.map(by_sequence, rows)
    return jax.shard_map(attend, in_specs=specs, out_specs=specs[0][0], check_vma=False)(arrays, rows)


def _by_pieces(
    attend: Callable[[Any, Any], jax.Array],
    arrays: tuple[jax.Array, ...],
    segments: jax.Array | None,
    order: jax.Array,
    runtime: Runtime,
) -> jax.Array:
    """Computes `attend(arrays, segments)` for sequences that `parallel.context` shards over devices.

    A device has the queries of two pieces of a sequence, and all keys. Kernels require that queries come last, so the
    keys are rotated to put a piece at the end, and the keys after it get another segment.
    """
    sharding = current_sharding(runtime)
    axes, devices = sharding.axes("sequence"), sharding.size("sequence")
    in_order = jnp.argsort(order)
    queries, keys = arrays[:2], tuple(a[:, in_order] for a in arrays[2:])
    segments = jnp.zeros(keys[1].shape[:2], jnp.int32) if segments is None else segments[:, in_order]

    def on_device(queries: Any, keys: Any, segments: jax.Array) -> jax.Array:
        whole = segments.shape[1]
        size, device = whole // (2 * devices), lax.axis_index(axes)

        def piece(here: int, number: jax.Array) -> jax.Array:
            end = (number + 1) * size
            seen = jnp.where(jnp.arange(whole) < end, segments, _UNSEEN)
            *rotated, seen = (jnp.roll(a, -end, axis=1) for a in (*keys, seen))
            return attend((*(q[:, here * size : (here + 1) * size] for q in queries), *rotated), seen)

        return jnp.concatenate([piece(0, device), piece(1, 2 * devices - 1 - device)], axis=1)

    def specs(logical: tuple[str | None, ...], *arrays: jax.Array) -> tuple[PartitionSpec, ...]:
        names = ("batch", *logical)
        return tuple(sharding.spec("an input of an attention kernel", a.shape, names[: a.ndim]) for a in arrays)

    of_queries = specs(("sequence", "heads", None), *queries)
    nope, rope, v = keys
    of_keys = (*specs((None, "heads", None), nope), *specs((None, None), rope), *specs((None, "heads", None), v))
    takes = of_queries, of_keys, specs((None,), segments)[0]
    return jax.shard_map(on_device, in_specs=takes, out_specs=of_queries[0], check_vma=False)(queries, keys, segments)


_UNSEEN = -(2**30)
"""A segment number that no document has."""


def right_align(keys: Keys) -> Keys:
    """Rotates each sequence of a cache so that its last token comes last; segments say which entries are filled."""
    assert keys.lengths is not None
    size = keys.latent.shape[1]
    entry = (jnp.arange(size) + keys.lengths[:, None]) % size
    take = functools.partial(jnp.take_along_axis, indices=entry[..., None], axis=1)
    filled = (entry < keys.lengths[:, None]).astype(jnp.int32)
    return Keys(take(keys.latent), take(keys.rope_key), entry, filled, keys.lengths)


def _pages(keys: Keys) -> Pages:
    """Returns the keys of a cache that isn't paged."""
    batch, size, _ = keys.latent.shape
    if size % PAGE:
        raise ConfigError(f"MLA decoding by a kernel needs a cache of a multiple of {PAGE} tokens, but it has {size}")
    latent, rope_key = (x.reshape(1, batch, -1, PAGE, x.shape[-1]) for x in (keys.latent, keys.rope_key))
    return Pages(latent, rope_key, jnp.zeros((), jnp.int32))


def _decode(
    q_nope: jax.Array, q_rope: jax.Array, pages: Pages, lengths: jax.Array, *, scale: float, implementation: str
) -> jax.Array:
    """Calls `mla_decode`, or `blockwise_decode`, which takes any R and P, for queries (B, T, H, R) and (B, T, H, P) and
    the pages of one layer.
    """
    of_layer = pages.latent.shape[1:-2]
    tables = pages.tables
    if tables is None:
        tables = jnp.arange(math.prod(of_layer), dtype=jnp.int32).reshape(of_layer)
    tables += pages.layer * math.prod(of_layer)
    # All layers' pages, of which the tables name one layer's: a kernel takes whole arrays, and a part would be a copy.
    cache = SplitCache(*(x.reshape(-1, *x.shape[-2:]) for x in (pages.latent, pages.rope_key)))
    if implementation.startswith("tpu") and not cache.packed:
        cache = pack(cache)
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    # Has no gradient. Saying so also lets the scan over layers drop the call where it traces for constants only, as
    # Pallas doesn't by itself: without it, decoding on TPUs fails to trace.
    if implementation == "blockwise":
        decode: Any = functools.partial(blockwise_decode, scale=scale)
    else:
        decode = functools.partial(mla_decode, scale=scale, implementation=implementation)
    call = jax.custom_vjp(lambda *a: decode(*a)[0])
    call.defvjp(_refuse_gradient, _refuse_gradient)
    out: jax.Array = call(q, cache, tables, lengths)
    return out


def _refuse_gradient(*_: Any) -> Any:
    raise ConfigError("MLA decoding by a kernel has no gradient: train in the expanded form")
