"""The output head: logits on demand, and their cross entropy without materialising all of them.

Logits over a vocabulary of 129,280 would be by far the largest array of a training step. `Logits` holds the hidden
states and the head. The cross entropy is computed for a few tokens at a time: its sum together with the gradient of the
sum, from the same logits; that of each token without, so that the backward pass recomputes them. If the vocabulary is
sharded, each device has the logits of its part, and a few numbers per token are summed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dsv3_jax.model.linear import wide_linear
from dsv3_jax.parallel.sharding import Logical, LogicalSharding, constrain, current_sharding
from dsv3_jax.runtime import Runtime

PIECE = 2**27
"""Logits that a device computes at a time: 512 MiB in float32. If there are no more, they are saved for the backward
pass.

Each piece reads and writes the gradient of the whole head, so smaller pieces take more time."""

_HIDDEN: Logical = ("batch", "sequence", None)
_HEAD: Logical = (None, "vocab")
_TOKENS: Logical = ("batch", "sequence")


@struct.dataclass
class Logits:
    """Logits of the next token, computed on demand.

    hidden: (B, T, D) after the last norm. head: (D, V), rounded to the dtype of `hidden`, in an array whose dtype may
      be wider.
    """

    hidden: jax.Array
    head: jax.Array
    runtime: Runtime = struct.field(pytree_node=False)

    def array(self) -> jax.Array:
        """Returns all logits: (B, T, V), float32 or wider."""
        return constrain(wide_linear(self.hidden, self.head), self.runtime, "batch", "sequence", "vocab")

    @jax.named_scope("cross_entropy")
    def cross_entropy(self, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """-log p(target) in nats, float32 or wider, and whether the target is the most likely token: (B, T) both.

        targets: (B, T) int32. The result is NaN for a target outside the vocabulary, such as `IGNORE`; the caller must
          mask it.
        """
        if (pieces := self._pieces(targets)) == 1:
            logits = self.array()
            return cross_entropy(logits, targets), logits.argmax(-1) == targets
        return _in_pieces(self.hidden, self.head, targets, pieces, current_sharding(self.runtime))

    @jax.named_scope("cross_entropy")
    def cross_entropy_sum(self, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sum of `cross_entropy` over the tokens of a mask, () float32 or wider, and (B, T) as there.

        targets: (B, T) int32. mask: (B, T) bool.
        """
        if (pieces := self._pieces(targets)) == 1:
            nll, correct = self.cross_entropy(targets)
            return jnp.sum(jnp.where(mask, nll, 0)), correct
        return _sum_in_pieces(self.hidden, self.head, targets, mask, pieces, current_sharding(self.runtime))

    def _pieces(self, targets: jax.Array) -> int:
        """Number of pieces in which the logits of these targets are computed."""
        sharding = current_sharding(self.runtime)
        parts = math.prod(map(sharding.size_left, ("batch", "sequence", "vocab")))
        return -(-targets.size * self.head.shape[1] // (parts * PIECE))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target), in nats: logits (..., V) float, targets (...) int32 -> (...) float32 or wider.

    NaN for a target outside the vocabulary; the caller must mask it.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    index = jnp.where(targets < 0, logits.shape[-1], targets)  # negative ones would count from the end
    chosen = jnp.take_along_axis(logits, index[..., None], axis=-1, mode="fill")[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _in_pieces(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, pieces: int, sharding: LogicalSharding
) -> tuple[jax.Array, jax.Array]:
    sums: tuple[jax.Array, jax.Array] = _forward(hidden, head, targets, pieces, sharding)[0]
    return sums


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, pieces: int, sharding: LogicalSharding
) -> tuple[Any, Any]:
    def on_device(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
        part, head = _VocabularyPart(head, sharding), head.astype(hidden.dtype)

        def of_piece(_: None, piece: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
            h, t = piece
            return None, part.cross_entropy(wide_linear(h, head), t)

        return _join(lax.scan(of_piece, None, _cut((hidden, targets), pieces))[1], targets.shape)

    run = _on_each_device(on_device, sharding, (_HIDDEN, _HEAD, _TOKENS), (_TOKENS,) * 3)
    nll, correct, log_sum = run(hidden, head, targets)
    return (nll, correct), (hidden, head, targets, log_sum)


def _backward(
    pieces: int, sharding: LogicalSharding, residuals: Any, cotangents: Any
) -> tuple[jax.Array, jax.Array, None]:
    hidden, head, targets, log_sum = residuals
    wide = log_sum.dtype

    def on_device(hidden: jax.Array, head: jax.Array, *of_tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        part, head = _VocabularyPart(head, sharding), head.astype(hidden.dtype)

        def of_piece(d_head: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array]]:
            h, t, log_sum, g = piece
            d_hidden, d_piece = part.gradient(h, head, wide_linear(h, head), t, log_sum, g)
            return d_head + d_piece, (d_hidden,)

        d_head, d_hidden = lax.scan(of_piece, jnp.zeros(head.shape, wide), _cut((hidden, *of_tokens), pieces))
        return _join(d_hidden, hidden.shape)[0], lax.psum(d_head, _over_tokens(sharding))

    run = _on_each_device(on_device, sharding, (_HIDDEN, _HEAD, *(_TOKENS,) * 3), (_HIDDEN, _HEAD))
    d_hidden, d_head = run(hidden, head, targets, log_sum, cotangents[0])
    return d_hidden, d_head.astype(head.dtype), None


_in_pieces.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sum_in_pieces(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array, pieces: int, sharding: LogicalSharding
) -> tuple[jax.Array, jax.Array]:
    nll, correct = _in_pieces(hidden, head, targets, pieces, sharding)
    return jnp.sum(jnp.where(mask, nll, 0)), correct


def _sum_forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array, pieces: int, sharding: LogicalSharding
) -> tuple[Any, Any]:
    """With the gradients for a cotangent of 1, from the same logits."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def on_device(hidden: jax.Array, head: jax.Array, *of_tokens: jax.Array) -> tuple[jax.Array, ...]:
        part, head = _VocabularyPart(head, sharding), head.astype(hidden.dtype)

        def of_piece(d_head: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            h, t, m = piece
            logits = wide_linear(h, head)
            nll, correct, log_sum = part.cross_entropy(logits, t)
            d_hidden, d_piece = part.gradient(h, head, logits, t, log_sum, m.astype(wide))
            return d_head + d_piece, (nll, correct, d_hidden)

        d_head, of_pieces = lax.scan(of_piece, jnp.zeros(head.shape, wide), _cut((hidden, *of_tokens), pieces))
        nll, correct, d_hidden = (_join((x,), (*hidden.shape[:2], *x.shape[2:]))[0] for x in of_pieces)
        return nll, correct, d_hidden, lax.psum(d_head, _over_tokens(sharding))

    run = _on_each_device(on_device, sharding, (_HIDDEN, _HEAD, _TOKENS, _TOKENS), (_TOKENS, _TOKENS, _HIDDEN, _HEAD))
    nll, correct, d_hidden, d_head = run(hidden, head, targets, mask)
    return (jnp.sum(jnp.where(mask, nll, 0)), correct), (d_hidden, d_head.astype(head.dtype))


def _sum_backward(pieces: int, sharding: LogicalSharding, gradients: Any, cotangents: Any) -> tuple[Any, ...]:
    scale = cotangents[0]
    d_hidden, d_head = ((g * scale).astype(g.dtype) for g in gradients)
    return d_hidden, d_head, None, None


_sum_in_pieces.defvjp(_sum_forward, _sum_backward)


class _VocabularyPart:
    """A device's part of the vocabulary, and the collectives that combine the parts."""

    def __init__(self, head: jax.Array, sharding: LogicalSharding) -> None:
        self.axes = sharding.axes_left("vocab")
        self.tokens = head.shape[1]
        self.vocabulary = self.tokens * sharding.size_left("vocab")
        self.first = lax.axis_index(self.axes) * self.tokens if self.axes else 0

    def is_target(self, targets: jax.Array) -> jax.Array:
        """(N,) -> (N, tokens) bool."""
        return targets[:, None] == self.first + jnp.arange(self.tokens, dtype=targets.dtype)

    def cross_entropy(self, logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """-log p, whether the target is the most likely token, and the log-sum-exp: (N, tokens), (N,) -> (N,) each."""
        most = self.largest(logits.max(-1))
        log_sum = most + jnp.log(self.add(jnp.sum(jnp.exp(logits - most[:, None]), -1)))
        chosen = self.add(jnp.sum(jnp.where(self.is_target(targets), logits, 0), -1))
        known = (targets >= 0) & (targets < self.vocabulary)
        return jnp.where(known, log_sum - chosen, jnp.nan), known & (chosen >= most), log_sum

    def gradient(
        self, h: jax.Array, head: jax.Array, logits: jax.Array, targets: jax.Array, log_sum: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Gradients of h (N, D), in its dtype, and of this part of the head, in that of the cotangents g (N,)."""
        d_logits = ((jnp.exp(logits - log_sum[:, None]) - self.is_target(targets)) * g[:, None]).astype(h.dtype)
        d_head = jnp.matmul(h.T, d_logits, preferred_element_type=g.dtype)
        d_hidden = self.add(jnp.matmul(d_logits, head.T, preferred_element_type=g.dtype))
        return d_hidden.astype(h.dtype), d_head

    def add(self, x: jax.Array) -> jax.Array:
        total: jax.Array = lax.psum(x, self.axes)
        return total

    def largest(self, x: jax.Array) -> jax.Array:
        largest: jax.Array = lax.pmax(x, self.axes)
        return largest


def _over_tokens(sharding: LogicalSharding) -> tuple[str, ...]:
    """Mesh axes that cut the tokens."""
    return (*sharding.axes_left("batch"), *sharding.axes_left("sequence"))


def _on_each_device(
    function: Callable[..., Any], sharding: LogicalSharding, takes: tuple[Logical, ...], gives: tuple[Logical, ...]
) -> Callable[..., Any]:
    """Applies `function` to each device's parts of arrays, sharded by `takes` unless a `shard_map` has done so."""
    if sharding.mesh is None or sharding.manual:
        return function

    def run(*arrays: jax.Array) -> Any:
        specs = tuple(sharding.spec("an input of the loss", a.shape, t) for a, t in zip(arrays, takes, strict=True))
        of = dict(zip(takes, specs, strict=True))
        return jax.shard_map(function, in_specs=specs, out_specs=tuple(of[g] for g in gives), check_vma=False)(*arrays)

    return run


def _cut(arrays: tuple[jax.Array, ...], pieces: int) -> tuple[jax.Array, ...]:
    """(B, T, ...) -> (pieces, tokens, ...), the last piece filled with zeros."""

    def cut(x: jax.Array) -> jax.Array:
        flat = x.reshape(-1, *x.shape[2:])
        size = -(-len(flat) // pieces)
        return jnp.pad(flat, [(0, pieces * size - len(flat))] + [(0, 0)] * (flat.ndim - 1)).reshape(
            pieces, size, *flat.shape[1:]
        )

    return tuple(map(cut, arrays))


def _join(arrays: tuple[jax.Array, ...], shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """The inverse of `_cut`: arrays (B, T, ...) of `shape`."""
    return tuple(x.reshape(-1, *x.shape[2:])[: shape[0] * shape[1]].reshape(shape) for x in arrays)
