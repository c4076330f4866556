"""Causal attention with decoupled heads on TPUs (Mosaic TPU): flash attention, forward and backward.

Rows of TPU memory have 128 lanes. Heads lie side by side in a row, (B, T, H * 128), as the projections write them, so
that nothing is transposed. Rotated parts are half as wide: a grid step takes two heads, which share a row of rotated
queries, and the rope key, which all heads share, lies in a row twice. A head's queries have zeros in the other's lanes.

Scores are in units of log 2, as `exp2` is what the hardware has. Blocks above the diagonal are neither fetched nor
worked on, and those of other documents not worked on; masks are applied where a block needs one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_prefill.residuals import residual

LANES = 128
ROPE = 64
PAIR = LANES // ROPE
LOG2E = math.log2(math.e)
MASKED = -1e30
"""Where the running maximum starts. Finite, so that rows that see nothing in a block don't compute inf - inf."""
INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")


class Problem(NamedTuple):
    """The sizes that the kernels share, and which blocks of queries and keys see each other."""

    tokens: int
    keys: int
    nope: int
    width: int
    scale: float
    interpret: bool | pltpu.InterpretParams

    @property
    def q(self) -> int:
        """Queries a block."""
        return _block(self.tokens)

    @property
    def k(self) -> int:
        """Keys a block."""
        return _block(self.keys)

    def first_query(self, i):
        """Where block i of queries starts, among the keys."""
        return self.keys - self.tokens + i * self.q

    def last_of_keys(self, i):
        """The last block of keys that block i of queries sees any of."""
        return (self.first_query(i + 1) - 1) // self.k

    def first_of_queries(self, j):
        """The first block of queries that sees any of block j of keys."""
        return jnp.maximum(j * self.k - self.first_query(0), 0) // self.q

    def when_seen(self, i, j, ranges, do: Callable[[bool], None]) -> None:
        """Calls do(masked) if queries i see any of keys j. `ranges`: of documents, see `_documents`; or none."""
        seen, whole = j <= self.last_of_keys(i), (j + 1) * self.k <= self.first_query(i) + 1
        if ranges:
            b = pl.program_id(0)
            low_q, high_q, low_k, high_k = (of[b, n] for of, n in zip(ranges, (i, i, j, j), strict=True))
            seen &= (low_q <= high_k) & (low_k <= high_q)
            whole &= (low_q == high_k) & (low_k == high_q)
        pl.when(seen & whole)(lambda: do(False))
        pl.when(seen & jnp.logical_not(whole))(lambda: do(True))


def _block(n: int) -> int:
    return next(b for b in (512, 256, 128) if n % b == 0)


def mla_prefill(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    segments: jax.Array | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """See `api.mla_prefill`. Differentiable. `interpret` runs it on a CPU, slowly; with `INTERPRET` it finds races."""
    tokens, heads, nope = q_nope.shape[1:]
    keys, rope = k_rope.shape[1:]
    width = v.shape[3]
    if rope > ROPE or tokens % LANES or keys % LANES:
        raise ValueError(
            f"mla_prefill on TPUs takes tokens and keys of multiples of {LANES} and rotated parts of up to {ROPE}, but "
            f"got {tokens}, {keys} and {rope}"
        )
    widths = -(-nope // LANES) * LANES, -(-width // LANES) * LANES
    q_nope, k_nope, v = (_side_by_side(x, w) for x, w in ((q_nope, widths[0]), (k_nope, widths[0]), (v, widths[1])))
    q_rope, k_rope = _side_by_side(q_rope, ROPE), jnp.pad(k_rope, ((0, 0), (0, 0), (0, ROPE - rope)))
    problem = Problem(tokens, keys, *widths, scale, interpret)
    out = _attend(problem, q_nope, q_rope, k_nope, k_rope, v, segments)
    return out.reshape(*out.shape[:2], -1, widths[1])[:, :, :heads, :width]


def _side_by_side(x: jax.Array, width: int) -> jax.Array:
    """(B, T, H, N) to (B, T, H * width), with zeros for what is missing, of heads too where their number is odd."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, x.shape[2] % PAIR), (0, width - x.shape[3])))
    return x.reshape(*x.shape[:2], -1)


# --- kernels: each sees a pair of heads, a block of queries and one of keys ---------------------------------------


def _dot(a, b, contract):
    # The precision is said because bfloat16 has no other, whatever the default that the user set.
    return lax.dot_general(a, b, (contract, ((), ())), lax.Precision.DEFAULT, preferred_element_type=jnp.float32)


_times = functools.partial(_dot, contract=((1,), (0,)))
_times_transposed = functools.partial(_dot, contract=((1,), (1,)))


def _of_head(x, head, width):
    return x[0, :, head * width : (head + 1) * width]


def _queries(q_nope, q_rope, head, nope):
    """A head's queries, (block, nope + 128): its plain part, then its rotated one in its own lanes, and zeros."""
    rotated = q_rope[0]
    mine = lax.broadcasted_iota(jnp.int32, rotated.shape, 1) // ROPE == head
    return jnp.concatenate([_of_head(q_nope, head, nope), jnp.where(mine, rotated, jnp.zeros_like(rotated))], axis=1)


def _keys(k_nope, k_rope, head, nope):
    return jnp.concatenate([_of_head(k_nope, head, nope), k_rope[0]], axis=1)


def _scores(p: Problem, rows, columns, i, j, masked: bool, documents, query_axis: int) -> jax.Array:
    """The scaled scores of block (i, j) in units of log 2, -inf where they don't count.

    Queries are `rows` (query_axis 0) or `columns` (1). `documents`: their ids as a column and a row, or two Nones.
    """
    s = _times_transposed(rows, columns) * (p.scale * LOG2E)
    if not masked:
        return s
    query = p.first_query(i) + lax.broadcasted_iota(jnp.int32, s.shape, query_axis)
    mask = j * p.k + lax.broadcasted_iota(jnp.int32, s.shape, 1 - query_axis) <= query
    column, row = documents
    if column is not None:
        mask &= column[0] == row[0]
    return jnp.where(mask, s, -jnp.inf)


def _forward_kernel(
    p: Problem, ranges, *, q_nope, q_rope, k_nope, k_rope, v, column=None, row=None,
    out, lse, queries, acc, top, total,
):  # fmt: skip
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _start():
        for g in range(PAIR):
            queries[g] = _queries(q_nope, q_rope, g, p.nope)
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    def step(masked):
        for g in range(PAIR):
            s = _scores(p, queries[g], _keys(k_nope, k_rope, g, p.nope), i, j, masked, (column, row), query_axis=0)
            old = top[g, :, :1]
            new = jnp.maximum(old, jnp.max(s, axis=1, keepdims=True))
            change, weights = jnp.exp2(old - new), jnp.exp2(s - new)
            values = _of_head(v, g, p.width)
            acc[g] = acc[g] * change + _times(weights.astype(values.dtype), values)
            total[g] = total[g] * change + jnp.sum(weights, axis=1, keepdims=True)
            top[g] = jnp.broadcast_to(new, top.shape[1:])

    p.when_seen(i, j, ranges, step)

    @pl.when(j == pl.num_programs(3) - 1)
    def _finish():
        for g in range(PAIR):  # no total is 0: every query sees itself
            out[0, :, g * p.width : (g + 1) * p.width] = (acc[g] / total[g, :, :1]).astype(out.dtype)
            lse[0, 0, g : g + 1] = (top[g] + jnp.log2(total[g])).T[:1]  # all lanes of a row are equal


def _query_gradient_kernel(
    p: Problem, ranges, *, q_nope, q_rope, k_nope, k_rope, v, dout, lse, inner, column=None, row=None,
    dq_nope, dq_rope, queries, lse_column, inner_column, acc,
):  # fmt: skip
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _start():
        for g in range(PAIR):
            queries[g] = _queries(q_nope, q_rope, g, p.nope)
            for upright, flat in ((lse_column, lse), (inner_column, inner)):
                upright[g] = jnp.broadcast_to(flat[0, 0, g : g + 1], (LANES, p.q)).T
        acc[...] = jnp.zeros_like(acc)

    def step(masked):
        for g in range(PAIR):
            keys = _keys(k_nope, k_rope, g, p.nope)
            s = _scores(p, queries[g], keys, i, j, masked, (column, row), query_axis=0)
            weights = jnp.exp2(s - lse_column[g, :, :1])
            dweights = _times_transposed(_of_head(dout, g, p.width), _of_head(v, g, p.width))
            ds = weights * (dweights - inner_column[g, :, :1])
            acc[g] += _times(ds.astype(keys.dtype), keys)

    p.when_seen(i, j, ranges, step)

    @pl.when(j == pl.num_programs(3) - 1)
    def _finish():
        for g in range(PAIR):
            dq_nope[0, :, g * p.nope : (g + 1) * p.nope] = (acc[g, :, : p.nope] * p.scale).astype(dq_nope.dtype)
        lane = lax.broadcasted_iota(jnp.int32, dq_rope.shape[1:], 1)
        rotated = jnp.where(lane < ROPE, acc[0, :, p.nope :], acc[1, :, p.nope :])
        dq_rope[0] = (rotated * p.scale).astype(dq_rope.dtype)


def _key_gradient_kernel(
    p: Problem, ranges, *, q_nope, q_rope, k_nope, k_rope, v, dout, lse, inner, column=None, row=None,
    dk_nope, dk_rope, dv, nope_acc, rope_acc, v_acc,
):  # fmt: skip
    """Scores are transposed here, (keys, queries), so that the products with them need no transposed operand."""
    j, pair, i = (pl.program_id(a) for a in (1, 2, 3))
    first, last = i == 0, i == pl.num_programs(3) - 1

    @pl.when(first & (pair == 0))
    def _start_shared():
        rope_acc[...] = jnp.zeros_like(rope_acc)

    @pl.when(first)
    def _start():
        nope_acc[...] = jnp.zeros_like(nope_acc)
        v_acc[...] = jnp.zeros_like(v_acc)

    def step(masked):
        for g in range(PAIR):
            queries, keys = _queries(q_nope, q_rope, g, p.nope), _keys(k_nope, k_rope, g, p.nope)
            dout_g = _of_head(dout, g, p.width)
            s = _scores(p, keys, queries, i, j, masked, (column, row), query_axis=1)
            weights = jnp.exp2(s - lse[0, 0, g : g + 1])
            dweights = _times_transposed(_of_head(v, g, p.width), dout_g)
            ds = weights * (dweights - inner[0, 0, g : g + 1])
            dk = _times(ds.astype(queries.dtype), queries)
            nope_acc[g] += dk[:, : p.nope]
            rope_acc[...] += dk[:, p.nope :]  # each head in its own lanes
            v_acc[g] += _times(weights.astype(dout_g.dtype), dout_g)

    p.when_seen(i, j, ranges, step)

    @pl.when(last)
    def _finish():
        for g in range(PAIR):
            dk_nope[0, :, g * p.nope : (g + 1) * p.nope] = (nope_acc[g] * p.scale).astype(dk_nope.dtype)
            dv[0, :, g * p.width : (g + 1) * p.width] = v_acc[g].astype(dv.dtype)

    @pl.when(last & (pair == pl.num_programs(2) - 1))
    def _finish_shared():
        both = rope_acc[...]
        dk_rope[0] = ((both[:, :ROPE] + both[:, ROPE:]) * p.scale).astype(dk_rope.dtype)


# --- launches ------------------------------------------------------------------------------------------------------


def _along_keys(p: Problem):
    """Keys change fastest: the grid after the sequences, its axes without order, and what of it is worked on where.

    Of a block that is left out the neighbour is named, which is there already, so that nothing is fetched.
    """
    axes = lambda pairs: (pairs, p.tokens // p.q, p.keys // p.k)
    return axes, 3, lambda b, pair, i, j: (b, pair, i, jnp.minimum(j, p.last_of_keys(i)))


def _along_queries(p: Problem):
    """Queries change fastest, then heads, so that the gradient of the shared keys is summed in place."""
    axes = lambda pairs: (p.keys // p.k, pairs, p.tokens // p.q)
    return axes, 2, lambda b, j, pair, i: (b, pair, jnp.maximum(i, p.first_of_queries(j)), j)


def _call(kernel, p: Problem, order, ranges, inputs: dict, outputs: dict, scratch: dict) -> list[jax.Array]:
    """Runs a kernel. Inputs are (kind, array) by the kernel's names for them, outputs (kind, shape and dtype)."""
    axes, parallel, place = order(p)
    batch, _, all_heads = inputs["v"][1].shape
    pairs = all_heads // (PAIR * p.width)

    def spec(kind, shape):
        block, index = {
            "queries": ((1, p.q, shape[-1] // pairs), lambda b, pair, i, j: (b, i, pair)),
            "keys": ((1, p.k, shape[-1] // pairs), lambda b, pair, i, j: (b, j, pair)),
            "shared_queries": ((1, p.q, shape[-1]), lambda b, pair, i, j: (b, i, 0)),
            "shared_keys": ((1, p.k, shape[-1]), lambda b, pair, i, j: (b, j, 0)),
            "query_row": ((1, 1, p.q), lambda b, pair, i, j: (b, 0, i)),
            "key_row": ((1, 1, p.k), lambda b, pair, i, j: (b, 0, j)),
            "query_rows": ((1, 1, PAIR, p.q), lambda b, pair, i, j: (b, pair, 0, i)),
        }[kind]
        return pl.BlockSpec(block, lambda *position: index(*place(*position[:4])))

    names = [*inputs, *outputs, *scratch]

    def body(*refs):
        kernel(p, refs[: len(ranges)], **dict(zip(names, refs[len(ranges) :], strict=True)))

    return pl.pallas_call(
        body,
        out_shape=[shape for _, shape in outputs.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(ranges),
            grid=(batch, *axes(pairs)),
            in_specs=[spec(kind, x.shape) for kind, x in inputs.values()],
            out_specs=[spec(kind, x.shape) for kind, x in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (4 - parallel)
        ),
        name=kernel.__name__.strip("_"),
        interpret=p.interpret,
    )(*ranges, *(x for _, x in inputs.values()))


def _documents(p: Problem, segments: jax.Array | None, along_keys: bool) -> tuple[list[jax.Array], dict]:
    """The least and greatest document of each block of queries and of keys, and the ids as a column and a row."""
    if segments is None:
        return [], {}
    q, k = segments[:, p.keys - p.tokens :], segments
    blocks = [s.reshape(len(s), -1, size) for s, size in ((q, p.q), (k, p.k))]
    ranges = [f(s, axis=-1) for s in blocks for f in (jnp.min, jnp.max)]
    if along_keys:
        return ranges, dict(column=("shared_queries", q[..., None]), row=("key_row", k[:, None]))
    return ranges, dict(column=("shared_keys", k[..., None]), row=("query_row", q[:, None]))


def _inputs(q_nope, q_rope, k_nope, k_rope, v) -> dict:
    return dict(
        q_nope=("queries", q_nope), q_rope=("queries", q_rope), k_nope=("keys", k_nope),
        k_rope=("shared_keys", jnp.concatenate([k_rope] * PAIR, axis=-1)), v=("keys", v),
    )  # fmt: skip


def _float32(*shape):
    return pltpu.VMEM(shape, jnp.float32)


def _forward(p: Problem, q_nope, q_rope, k_nope, k_rope, v, segments):
    """The output, and the log-sum-exps in base 2, (B, H / 2, 2, T): what the backward pass needs."""
    batch, tokens, _ = q_nope.shape
    all_heads = v.shape[2]
    ranges, documents = _documents(p, segments, along_keys=True)
    inputs = _inputs(q_nope, q_rope, k_nope, k_rope, v) | documents
    out = jax.ShapeDtypeStruct((batch, tokens, all_heads), v.dtype)
    lse = jax.ShapeDtypeStruct((batch, all_heads // (PAIR * p.width), PAIR, tokens), jnp.float32)
    scratch = dict(
        queries=pltpu.VMEM((PAIR, p.q, p.nope + LANES), q_nope.dtype), acc=_float32(PAIR, p.q, p.width),
        top=_float32(PAIR, p.q, LANES), total=_float32(PAIR, p.q, LANES),
    )  # fmt: skip
    outputs = dict(out=("queries", out), lse=("query_rows", lse))
    return _call(_forward_kernel, p, _along_keys, ranges, inputs, outputs, scratch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(p: Problem, q_nope, q_rope, k_nope, k_rope, v, segments):
    """(B, T, H * V) of queries and keys side by side, k_rope (B, S, P) and segments (B, S) or None."""
    return _forward(p, q_nope, q_rope, k_nope, k_rope, v, segments)[0]


def _attend_forward(p: Problem, *given):
    out, lse = map(residual, _forward(p, *given))
    return out, (given, out, lse)


def _attend_backward(p: Problem, residuals, dout):
    (*arrays, segments), out, lse = residuals
    q_nope, q_rope, k_nope, k_rope, v = arrays
    # Of each query and head: how its output and its gradient agree, which the softmax takes away from all weights'.
    inner = out.astype(jnp.float32) * dout.astype(jnp.float32)
    inner = jnp.sum(inner.reshape(*out.shape[:2], -1, PAIR, p.width), axis=-1).transpose(0, 2, 3, 1)
    inputs = _inputs(*arrays) | dict(dout=("queries", dout), lse=("query_rows", lse), inner=("query_rows", inner))
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)

    ranges, documents = _documents(p, segments, along_keys=True)
    scratch = dict(
        queries=pltpu.VMEM((PAIR, p.q, p.nope + LANES), q_nope.dtype), lse_column=_float32(PAIR, p.q, LANES),
        inner_column=_float32(PAIR, p.q, LANES), acc=_float32(PAIR, p.q, p.nope + LANES),
    )  # fmt: skip
    outputs = dict(dq_nope=("queries", like(q_nope)), dq_rope=("queries", like(q_rope)))
    dq = _call(_query_gradient_kernel, p, _along_keys, ranges, inputs | documents, outputs, scratch)

    ranges, documents = _documents(p, segments, along_keys=False)
    scratch = dict(
        nope_acc=_float32(PAIR, p.k, p.nope), rope_acc=_float32(p.k, LANES), v_acc=_float32(PAIR, p.k, p.width)
    )
    outputs = dict(dk_nope=("keys", like(k_nope)), dk_rope=("shared_keys", like(k_rope)), dv=("keys", like(v)))
    dkv = _call(_key_gradient_kernel, p, _along_queries, ranges, inputs | documents, outputs, scratch)
    return *dq, *dkv, None


_attend.defvjp(_attend_forward, _attend_backward)
