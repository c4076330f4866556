"""Checks and times every kernel on the accelerator at hand: one command, one table.

    python experiments/bench_kernels.py --out runs/kernels [--only mla_decode,mla_prefill] [--limit 80] [--total 200]

Each group runs in a process of its own with a time limit and writes and prints its rows as it goes, so that a kernel
that fails or hangs costs only its own rows. The checks come first, side by side, since they mostly compile; then the
timings, one after another. What the total leaves no time for is said in the table.

Times are of many calls, one after another; where the inputs would fit in the L2 cache, the calls rotate among several.
A call so short that the host can't keep up is timed by a trace of the device. The floors use the copy bandwidth and the
matmul rate measured in the same run. Errors are ||out - ref|| / ||ref|| against float64 references over fresh random
inputs.
"""

# Functions defined in loops are called before the next turn.
# ruff: noqa: B023, E402
from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cache_update import cache_update
from pallas_kernels.cache_update.reference import slots
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul
from pallas_kernels.grouped_matmul import gpu as grouped_gpu
from pallas_kernels.grouped_matmul import library as grouped_library
from pallas_kernels.mla_decode import SplitCache, join, mla_decode, plan, quantise, split
from pallas_kernels.mla_decode import gpu as mla_decode_gpu
from pallas_kernels.mla_decode.problem import random_problem
from pallas_kernels.mla_prefill import mla_prefill

Row = dict[str, object]


def relative_error(out, ref) -> float:
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    return float(np.linalg.norm(out - ref) / max(np.linalg.norm(ref), 1e-30))


def seconds_per_call(call: Callable[[int], object], budget: float = 0.25) -> float:
    """Median over five runs of `call(i)` for each i in turn, one after another, by the host's clock."""

    def run(n: int) -> float:
        start = time.perf_counter()
        for i in range(n):
            out = call(i)
        jax.block_until_ready(out)
        return time.perf_counter() - start

    run(1)
    once = min(run(1) for _ in range(2))
    n = int(max(2, min(500, budget / 5 / once)))
    return float(np.median([run(n) / n for _ in range(5)]))


def device_seconds(call: Callable[[int], object], calls: int = 24) -> float:
    """Median over `call(i)` of the time from its first kernel's start to its last one's end, by the device's trace."""
    for i in range(3):
        jax.block_until_ready(call(i))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(calls):
                out = call(i)
            jax.block_until_ready(out)
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = [p for p in jax.profiler.ProfileData.from_file(str(trace)).planes if "GPU" in p.name]
        lines = [line for plane in planes for line in plane.lines if "Stream" in line.name]
        events = sorted((e.start_ns, e.start_ns + e.duration_ns) for line in lines for e in line.events)
    each, rest = divmod(len(events), calls)
    if rest or not each:
        raise ValueError(
            f"a GPU's trace shows as many kernels for each of {calls} calls, but this one {len(events)} in all"
        )
    spans = [events[i : i + each] for i in range(0, len(events), each)]
    return float(np.median([max(end for _, end in s) - s[0][0] for s in spans])) * 1e-9


def ceilings() -> Iterator[Row]:
    """The card's best rates: the two numbers that every floor uses."""
    x = jax.random.normal(jax.random.key(0), (1 << 30,), jnp.bfloat16)
    negate = jax.jit(lambda x: -x)
    t = seconds_per_call(lambda _: negate(x))
    yield dict(case="copy 2 GiB", implementation="xla", seconds=t, bytes=2 * x.nbytes, ceiling="bytes_per_second",
               value=2 * x.nbytes / t)  # fmt: skip
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    t = seconds_per_call(lambda _: multiply(a, b))
    yield dict(case="matmul 8192^3 bf16", implementation="xla", seconds=t, flops=2 * 8192**3,
               ceiling="flops_per_second", value=2 * 8192**3 / t)  # fmt: skip


# --- mla_decode ------------------------------------------------------------------------------------------


def decode_float64(q, cache, table, lengths, scale):
    """The kernel's reference once more, in float64 on the host, a sequence at a time."""
    q, cache = (np.asarray(x.astype(jnp.float32)) for x in (q, cache))
    table, lengths = np.asarray(table), np.asarray(lengths)
    tokens = q.shape[1]
    out, lse = np.zeros((*q.shape[:3], 512)), np.full(q.shape[:3], -np.inf)
    for b, length in enumerate(lengths):
        keys = cache[table[b, : -(-length // 64)]].reshape(-1, 576)[:length].astype(np.float64)
        for t in range(tokens):
            seen = keys[: max(0, length - tokens + t + 1)]
            if len(seen):
                scores = scale * (q[b, t].astype(np.float64) @ seen.T)
                top = scores.max(axis=1, keepdims=True)
                p = np.exp(scores - top)
                out[b, t] = p @ seen[:, :512] / p.sum(axis=1, keepdims=True)
                lse[b, t] = top[:, 0] + np.log(p.sum(axis=1))
    return out, lse


def decode_xla(q, cache, table, lengths, scale):
    """The peer: gather the pages, then two einsums and a softmax, fused as XLA pleases."""
    if isinstance(cache, SplitCache):
        cache = join(cache).astype(q.dtype)
    keys = cache[table].reshape(q.shape[0], -1, q.shape[-1])
    scores = jnp.einsum("bthd,bsd->bths", q, keys, preferred_element_type=jnp.float32) * scale
    tokens = q.shape[1]
    limit = lengths[:, None] - tokens + 1 + jnp.arange(tokens)
    scores = jnp.where(jnp.arange(keys.shape[1]) < limit[:, :, None, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None]).astype(q.dtype)
    return jnp.einsum("bths,bsr->bthr", weights, keys[..., :512]), lse


def decode_check(case: tuple, rng: np.random.Generator) -> Row:
    heads, tokens, lengths, fp8 = case
    name = f"check H={heads} T={tokens} B={len(lengths)} max={max(lengths)}{' FP8' if fp8 else ''}"
    row = dict(case=name, implementation="gpu")
    try:
        q, cache, *rest = random_problem(rng, lengths, tokens, heads)
        scale = 576**-0.5
        if fp8:
            cache = quantise(split(cache))
        out, lse = jax.jit(functools.partial(mla_decode, scale=scale, implementation="gpu"))(q, cache, *rest)
        ref, ref_lse = decode_float64(q, join(cache) if fp8 else cache, *rest, scale)
        lse, out = np.asarray(lse), np.asarray(out.astype(jnp.float32))
        dead = np.isneginf(ref_lse)
        row["error"] = relative_error(out, ref)
        row["lse_error"] = float(np.abs(np.where(dead, 0, lse) - np.where(dead, 0, ref_lse)).max())
        unseen = (out[dead] == 0).all() and (np.isneginf(lse) == dead).all()
        row["ok"] = bool(row["error"] < 6e-3 and row["lse_error"] < 1e-4 and unseen)
    except Exception as e:
        row.update(ok=False, failure=f"{type(e).__name__}: {e}"[:500])
        traceback.print_exc()
    return row


def decode_checks() -> Iterator[Row]:
    rng = np.random.default_rng()
    mixed = [0, 1, 63, 64, 65, 4096, 300, 2]
    cases = [(heads, tokens, mixed, False) for heads in (1, 16, 64, 128) for tokens in (1, 2, 4)]
    cases += [(128, 1, [4095], False), (128, 2, [130] * 40, False), (16, 1, rng.integers(0, 4097, 128), False)]
    cases += [(1, 1, mixed, True), (16, 4, mixed, True), (128, 2, mixed, True), (128, 1, [130] * 40, True)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # most of the time goes into compiling
        yield from pool.map(decode_check, cases, rng.spawn(len(cases)))


def update_checks() -> Iterator[Row]:
    """New tokens as the reference writes them (whose own test is against float64), and nothing else changed."""
    rng = np.random.default_rng()
    for tokens, form in ((1, "array"), (4, "array"), (4, "split"), (4, "FP8")):
        row = dict(case=f"check cache_update T={tokens} {form}", implementation="gpu")
        try:
            lengths = [0, 1, 2, 63, 64, 65, 4096]
            _, cache, table, sizes = random_problem(rng, lengths, tokens, 1)
            cache = {"array": cache, "split": split(cache), "FP8": quantise(split(cache))}[form]
            plain = lambda c: np.asarray((c if form == "array" else join(c)).astype(jnp.float32))
            draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
            angle = draw(len(lengths), tokens, 32)
            rest = draw(len(lengths), tokens, 576).astype(jnp.bfloat16), draw(512), jnp.cos(angle), jnp.sin(angle)
            update = lambda name, *a: cache_update(*a, eps=1e-6, interleave=True, implementation=name)
            run = lambda name: plain(jax.jit(functools.partial(update, name))(cache, *rest, table, sizes))
            out, ref = run("gpu"), run("reference")
            new = np.zeros(ref.shape[:2], bool)
            page, slot = map(np.asarray, slots(table, sizes, tokens, 64))
            new[page[page >= 0], slot[page >= 0]] = True
            row["error"] = relative_error(out[new], ref[new])
            # A last bit of the largest element, rounded otherwise, moves a token's FP8 scale and many of its values.
            limit = 3e-2 if form == "FP8" else 6e-3
            row["ok"] = bool(row["error"] < limit and np.array_equal(out[~new], ref[~new], equal_nan=True))
        except Exception as e:
            row.update(ok=False, failure=f"{type(e).__name__}: {e}"[:500])
        yield row


def update_timings() -> Iterator[Row]:
    """One new token for each of 128 sequences, into a cache that may be overwritten."""
    rng = np.random.default_rng()
    for form in ("array", "FP8"):
        _, cache, table, sizes = random_problem(rng, [1024] * 128, 1, 1)
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        angle = draw(128, 1, 32)
        rest = draw(128, 1, 576).astype(jnp.bfloat16), draw(512), jnp.cos(angle), jnp.sin(angle), table, sizes
        for name in ("gpu", "reference"):
            row = dict(case=f"cache_update B=128 T=1 {form}", implementation=name)
            row["bytes"] = 128 * (2 * 576 + (2 * 576 if form == "array" else 512 + 4 + 128))
            update = functools.partial(cache_update, eps=1e-6, interleave=True, implementation=name)
            program = jax.jit(update, donate_argnums=0)
            state = [cache + 0 if form == "array" else quantise(split(cache))]

            def call(_):
                state[0] = program(state[0], *rest)
                return state[0]

            yield measured(row, lambda: device_seconds(call))


def decode_timings() -> Iterator[Row]:
    rng = np.random.default_rng()
    shapes = [
        (128, 1, 128, 4096, False),
        (128, 1, 128, 4096, True),
        (128, 2, 128, 4096, False),
        (1, 1, 128, 65536, False),
    ]
    shapes += [(128, 1, 16, 4096, False), (128, 1, 16, 4096, True)]
    shapes += [(128, tokens, 128, length, False) for tokens, length in ((1, 8192), (1, 16384), (1, 32768), (2, 32768))]
    for batch, tokens, heads, length, fp8 in shapes:
        scale = 576**-0.5
        token_bytes = 512 + 4 + 128 if fp8 else 2 * 576
        work = dict(
            flops=2 * batch * heads * tokens * length * (576 + 512),
            bytes=batch * (length * token_bytes + 2 * tokens * heads * (576 + 512)),
        )
        # Rotating tables over one pool of pages: together more than the L2 cache holds.
        pool = max(batch * length // 64, (400 << 20) // (64 * 576 * 2))
        cache = jax.random.normal(jax.random.key(0), (pool, 64, 576), jnp.bfloat16)
        if fp8:
            cache = jax.jit(lambda c: quantise(split(c)))(cache)
        q = jax.random.normal(jax.random.key(1), (batch, tokens, heads, 576), jnp.bfloat16)
        tables = [
            jnp.asarray(rng.permutation(pool)[: batch * length // 64].reshape(batch, -1).astype(np.int32))
            for _ in range(4)
        ]
        lengths = jnp.full((batch,), length, jnp.int32)
        pieces = mla_decode_gpu.default_pieces(batch, tokens * heads)
        schedule = jax.jit(functools.partial(plan, page_size=64, pieces=pieces))(lengths)

        def ours(table, x):
            q, cache, lengths, schedule = x
            return mla_decode(q, cache, table, lengths, scale=scale, implementation="gpu", schedule=schedule)

        def ours_with_plan(table, x):
            return mla_decode(x[0], x[1], table, x[2], scale=scale, implementation="gpu")

        peers = dict(gpu=ours)
        if (tokens, heads, length, fp8) == (1, 128, 4096, False):
            peers["gpu_and_plan"] = ours_with_plan
        if batch * length <= 128 * 4096:  # more would not fit
            peers["xla_einsum"] = lambda table, x: decode_xla(x[0], x[1], table, x[2], scale)
        case = f"mla_decode B={batch} T={tokens} S={length} H={heads}{' FP8' if fp8 else ''}"
        for name, fn in peers.items():
            yield timed(dict(case=case, implementation=name, **work), fn, tables, (q, cache, lengths, schedule))


def timed(row: Row, fn: Callable, varying: list, shared) -> Row:
    """The row with the time of `fn(varying[i], shared)`: on the device, if the host may take longer to launch it."""
    program = jax.jit(fn)
    short = max(row["flops"] / 5e14, row["bytes"] / 2e12) < 1e-4
    measure = device_seconds if short else seconds_per_call
    return measured(row, lambda: measure(lambda i: program(varying[i % len(varying)], shared)))


def measured(row: Row, measure: Callable[[], float]) -> Row:
    """The row with `measure()`, or with why there is none."""
    try:
        row["seconds"] = measure()
    except Exception as e:
        row["failure"] = f"{type(e).__name__}: {e}"[:500]
        traceback.print_exc()
    return row


# --- mla_prefill -------------------------------------------------------------------------------------------------


def prefill_arrays(seed: int, batch: int, tokens: int, keys: int, heads: int):
    shapes = (
        (batch, tokens, heads, 128), (batch, tokens, heads, 64),
        (batch, keys, heads, 128), (batch, keys, 64), (batch, keys, heads, 128),
    )  # fmt: skip
    return tuple(jax.random.normal(jax.random.key(seed + i), s, jnp.bfloat16) for i, s in enumerate(shapes))


def prefill_grad(a, scale, segments, implementation):
    def loss(*a):
        out = mla_prefill(*a, scale=scale, segments=segments, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * jnp.cos(jnp.arange(128.0)))

    return jax.grad(loss, argnums=range(5))(*a)


def prefill_checks() -> Iterator[Row]:
    seed = int(np.random.default_rng().integers(1 << 30))
    scale = 192**-0.5
    cases = ((1024, 1024, False), (512, 1024, False), (1024, 1024, True), (1000, 1000, True), (200, 456, True))
    for tokens, keys, packed in cases:
        a = prefill_arrays(seed, 2, tokens, keys, 16)
        segments = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32) // 300, (2, keys)) if packed else None
        with jax.default_matmul_precision("highest"):
            wide = tuple(x.astype(jnp.float32) for x in a)
            ref = mla_prefill(*wide, scale=scale, segments=segments, implementation="reference")
            ref_grad = jax.jit(lambda *a: prefill_grad(a, scale, segments, "reference"))(*wide)
        whole = not packed and tokens == keys
        for name in ("gpu", "tokamax", "blockwise") + ("cudnn",) * whole:
            row = dict(case=f"check T={tokens} S={keys} packed={packed}", implementation=name)
            try:
                out = mla_prefill(*a, scale=scale, segments=segments, implementation=name)
                row["error"] = relative_error(out.astype(jnp.float32), ref)
                grads = prefill_grad(a, scale, segments, name)
                row["gradient_error"] = max(
                    relative_error(x.astype(jnp.float32), y) for x, y in zip(grads, ref_grad, strict=False)
                )
                row["ok"] = bool(row["error"] < 6e-3 and row["gradient_error"] < 1e-2)
            except Exception as e:
                row.update(ok=False, failure=f"{type(e).__name__}: {e}"[:500])
            yield row


def prefill_timings() -> Iterator[Row]:
    scale, heads = 192**-0.5, 128
    for tokens in (4096, 16384):
        a = prefill_arrays(0, 1, tokens, tokens, heads)
        square = heads * tokens**2
        moved = 2 * tokens * heads * (192 + 192 + 128 + 128)
        documents = jnp.asarray(np.arange(tokens) >= tokens // 2, jnp.int32)[None]
        for name, segments in (
            ("gpu", None), ("gpu", documents), ("cudnn", None), ("tokamax", None), ("blockwise", None),
        ):  # fmt: skip
            if name == "blockwise" and tokens > 4096:
                continue
            case = f"mla_prefill T={tokens} H={heads}{' packed' if segments is not None else ''}"
            share = 1 if segments is None else 1 / 2  # of the pairs of tokens
            row = dict(case=f"{case} forward", implementation=name, flops=share * square * 320, bytes=moved)
            fn = functools.partial(mla_prefill, scale=scale, segments=segments, implementation=name)
            yield timed(row, lambda _, a: fn(*a), [jnp.int32(0)], a)
            row = dict(
                case=f"{case} forward and backward",
                implementation=name,
                flops=share * square * (320 + 832),
                bytes=3 * moved,
            )
            yield timed(row, lambda _, a: prefill_grad(a, scale, segments, name), [jnp.int32(0)], a)


# --- grouped matmul ----------------------------------------------------------------------------------------------

# Rows, groups, depth and columns: of V3's experts gate and up together, then down; of V2-Lite's gate or up, then down.
GROUPED = [(32768, 32, 7168, 4096), (32768, 32, 2048, 7168), (98304, 64, 2048, 1408), (98304, 64, 1408, 2048)]
# Name, tokens, experts of each, all experts, hidden and expert width: a layer's experts in decoding.
DECODED = [
    ("V2-Lite", 1, 6, 64, 2048, 1408),
    ("V2-Lite", 64, 6, 64, 2048, 1408),
    ("V3, 64 experts", 1, 8, 64, 7168, 2048),
    ("V3, 64 experts", 128, 8, 64, 7168, 2048),
]


BFLOAT16_GROUPED = {
    "gpu": grouped_gpu.grouped_matmul,
    "tokamax": grouped_library.tokamax,
    "xla_ragged_dot": jax.lax.ragged_dot,
}


def grouped_checks() -> Iterator[Row]:
    """Ragged groups, the last tenth of the rows in none: widths of whole tiles, of parts of them, and filled up."""
    rng = np.random.default_rng()
    for depth, columns in ((1024, 512), (2048, 1408), (1408, 2048), (1536, 704), (96, 264)):
        yield from grouped_check(rng, 3000, 8, depth, columns)
    for rows, groups, depth, columns in ((300, 16, 2048, 1408), (6, 64, 1408, 2048), (77, 5, 96, 264)):
        yield from grouped_check(rng, rows, groups, depth, columns)


def grouped_check(rng: np.random.Generator, rows: int, groups: int, depth: int, columns: int) -> Iterator[Row]:
    used = rows - rows // 10
    cuts = np.sort(rng.integers(0, used + 1, groups - 1))
    sizes = jnp.asarray(np.diff(cuts, prepend=0, append=used), jnp.int32)
    keys = jax.random.split(jax.random.key(int(rng.integers(1 << 30))), 5)
    x, w = jax.random.normal(keys[0], (rows, depth)), jax.random.normal(keys[1], (groups, depth, columns))
    # The gradient of a linear function: its cotangent is drawn, not computed, so that nothing amplifies rounding.
    x16, w16, dy = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), jax.random.normal(keys[4], (rows, columns))
    dy = dy.astype(jnp.bfloat16)
    wide = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    parts = lambda a: np.split(wide(a)[:used], cuts)
    rest = lambda n: np.zeros((rows - used, n))
    host = lambda x, w: np.concatenate([*(a @ b for a, b in zip(parts(x), wide(w), strict=True)), rest(w.shape[2])])
    refs = (
        host(x16, w16),
        host(dy, w16.mT),
        np.stack([a.T @ b for a, b in zip(parts(x16), parts(dy), strict=True)]),
    )
    case = f"check grouped matmul M={rows} E={groups} {depth}x{columns}"

    def row_of(name, fn, refs):
        row = dict(case=case, implementation=name)
        try:
            row["error"], *gradient = (relative_error(wide(a), b) for a, b in zip(jax.jit(fn)(), refs, strict=True))
            row["ok"] = row["error"] < 6e-3
            if gradient:
                row["gradient_error"] = max(gradient)
                row["ok"] = row["ok"] and row["gradient_error"] < 6e-3
        except Exception as e:
            row.update(ok=False, failure=f"{type(e).__name__}: {e}"[:500])
        return row

    for name, fn in BFLOAT16_GROUPED.items():
        if name == "gpu" or (depth, columns) == (1024, 512):
            both = lambda: (lambda out, vjp: (out, *vjp(dy)))(*jax.vjp(lambda x, w: fn(x, w, sizes), x16, w16))
            yield row_of(name, both, refs)
    if (depth, columns) == (1024, 512):
        x_scales, w_scales = (
            jnp.exp(jax.random.normal(k, s)) for k, s in ((keys[2], (rows, 8)), (keys[3], (groups, 4, 8)))
        )
        x8, w8 = x.astype(jnp.float8_e4m3fn), w.astype(jnp.float8_e4m3fn)
        ref = host(
            x8.astype(jnp.float32) * jnp.repeat(x_scales, 128, 1),
            w8.astype(jnp.float32) * jnp.repeat(jnp.repeat(w_scales.mT, 128, 1), 128, 2),
        )[:used]
        fp8 = functools.partial(fp8_grouped_matmul, implementation="gpu")
        yield row_of("fp8 gpu", lambda: (fp8(x8, x_scales, w8.mT, w_scales, sizes)[:used],), (ref,))
    if rows < 3000:
        yield swiglu_check(keys, case, x16, w16, sizes, cuts, used)


def swiglu_check(keys, case, x, gate, sizes, cuts, used) -> Row:
    """Experts in two kernels."""
    row = dict(case=case, implementation="gpu, experts")
    groups, depth, columns = gate.shape
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
    gate, up, down = gate * depth**-0.5, draw(keys[2], *gate.shape) * depth**-0.5, draw(keys[3], groups, columns, 64)
    wide = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    try:
        out = wide(jax.jit(grouped_gpu.grouped_swiglu)(x, gate, up, down, sizes))
        ref = []
        for rows, g, u, d in zip(np.split(wide(x)[:used], cuts), *map(wide, (gate, up, down)), strict=True):
            ref.append((rows @ g / (1 + np.exp(-rows @ g)) * (rows @ u)) @ d)
        row["error"] = relative_error(out[:used], np.concatenate(ref))
        row["ok"] = bool(row["error"] < 6e-3 and (out[used:] == 0).all())
    except Exception as e:
        row.update(ok=False, failure=f"{type(e).__name__}: {e}"[:500])
    return row


def few_rows_timings() -> Iterator[Row]:
    """A layer's experts in decoding: gate alone, and all three products. Bytes are those of the touched matrices."""
    rng = np.random.default_rng()
    for name, tokens, each, experts, hidden, width in DECODED:
        sizes = np.zeros(experts, np.int32)
        for _ in range(tokens):
            sizes[rng.permutation(experts)[:each]] += 1
        rows, touched = tokens * each, int((sizes > 0).sum())
        matrix = touched * hidden * width * 2
        sets = max(1, (400 << 20) // (3 * matrix))  # so many that L2 holds none when its turn comes
        keys = jax.random.split(jax.random.key(0), 1 + 3 * sets)
        shapes = [(experts, hidden, width)] * 2 + [(experts, width, hidden)]
        draw = lambda i: [jax.random.normal(keys[3 * i + j], s, jnp.bfloat16) for j, s in enumerate(shapes)]
        matrices, x = [draw(i) for i in range(sets)], jax.random.normal(keys[-1], (rows, hidden), jnp.bfloat16)
        case = f"few rows, {name} B={tokens} M={rows}, {touched} experts touched"
        three = lambda fn: lambda w, x: fn(jax.nn.silu(fn(x, w[0], sizes)) * fn(x, w[1], sizes), w[2], sizes)
        gate = lambda fn: lambda w, x: fn(x, w[0], sizes)
        sizes = jnp.asarray(sizes)
        for label, implementation, count, fn in (
            ("gate", "gpu", 1, gate(grouped_gpu.grouped_matmul)),
            ("gate", "gpu, form for many rows", 1, gate(grouped_gpu.product)),
            ("gate", "xla_ragged_dot", 1, gate(jax.lax.ragged_dot)),
            ("experts", "gpu", 3, lambda w, x: grouped_gpu.grouped_swiglu(x, *w, sizes)),
            ("experts", "gpu, three products", 3, three(grouped_gpu.grouped_matmul)),
        ):
            row = dict(case=f"{case}, {label}", implementation=implementation)
            row.update(flops=2 * count * rows * hidden * width, bytes=count * matrix)
            program = jax.jit(fn)
            yield measured(row, lambda: device_seconds(lambda i: program(matrices[i % sets], x)))


def grouped_timings() -> Iterator[Row]:
    for rows, groups, depth, columns in GROUPED:
        sizes = jnp.full((groups,), rows // groups, jnp.int32)
        case = f"grouped matmul M={rows} E={groups} {depth}x{columns}"
        flops = 2 * rows * depth * columns
        x = jax.random.normal(jax.random.key(0), (rows, depth), jnp.bfloat16)
        w = jax.random.normal(jax.random.key(1), (groups, depth, columns), jnp.bfloat16)
        elements = x.size + w.size
        for name, fn in BFLOAT16_GROUPED.items():
            if name != "gpu" and groups == 64:
                continue
            row = dict(case=case, implementation=name, flops=flops, bytes=2 * (elements + rows * columns))
            yield timed(row, lambda _, a: fn(*a), [jnp.int32(0)], (x, w, sizes))
            if name != "xla_ragged_dot":  # ten times slower already
                row = dict(row, case=f"{case} backward", flops=2 * flops, bytes=4 * (elements + rows * columns))
                dout = jax.random.normal(jax.random.key(2), (rows, columns), jnp.bfloat16)

                def backward(_, a):
                    return jax.vjp(lambda x, w: fn(x, w, a[2]), a[0], a[1])[1](a[3])

                yield timed(row, backward, [jnp.int32(0)], (x, w, sizes, dout))
        if groups == 64:
            continue
        x8, w8 = x.astype("float8_e4m3fn"), w.mT.astype("float8_e4m3fn")
        del x, w
        scales = jnp.ones((rows, depth // 128)), jnp.ones((groups, columns // 128, depth // 128))
        row = dict(case=case, implementation="fp8 gpu", flops=flops, bytes=elements + 2 * rows * columns)
        fn = functools.partial(fp8_grouped_matmul, implementation="gpu")
        yield timed(row, lambda _, a: fn(a[0], a[2], a[1], a[3], a[4]), [jnp.int32(0)], (x8, w8, *scales, sizes))


# --- running and reporting ---------------------------------------------------------------------------------------

GROUPS: dict[str, Callable[[], Iterator[Row]]] = {
    "ceilings": ceilings,
    "mla_decode_checks": decode_checks,
    "cache_update_checks": update_checks,
    "grouped_matmul_checks": grouped_checks,
    "mla_prefill_checks": prefill_checks,
    "mla_decode": decode_timings,
    "cache_update": update_timings,
    "grouped_matmul": grouped_timings,
    "few_rows": few_rows_timings,
    "mla_prefill": prefill_timings,
}


def run_group(name: str, path: pathlib.Path) -> None:
    with path.open("a") as file:
        for row in GROUPS[name]():
            line = json.dumps(dict(group=name, **row))
            file.write(line + "\n")
            file.flush()
            print(line[:300], flush=True)


def report(rows: list[Row]) -> str:
    """A markdown table. The floor is the longer of bytes / copy bandwidth and operations / matmul rate."""
    ceiling = {r["ceiling"]: r["value"] for r in rows if "ceiling" in r}
    lines = [
        "| case | implementation | ms | TFLOP/s | GB/s | % of floor | bound by | error | gradient error | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        t = r.get("seconds")
        cells = [r["case"], r["implementation"]]
        cells.append(f"{t * 1e3:.4f}" if t else "")
        cells.append(f"{r['flops'] / t / 1e12:.0f}" if t and "flops" in r else "")
        cells.append(f"{r['bytes'] / t / 1e9:.0f}" if t and "bytes" in r else "")
        floors = {}
        if "bytes_per_second" in ceiling and "bytes" in r:
            floors["bytes"] = r["bytes"] / ceiling["bytes_per_second"]
        if "flops_per_second" in ceiling and "flops" in r:
            floors["matmul"] = r["flops"] / ceiling["flops_per_second"]
        binding = max(floors, key=floors.get) if floors else ""
        cells.append(f"{100 * floors[binding] / t:.1f}" if t and binding else "")
        cells.append(binding)
        cells.append(f"{r['error']:.2e}" if "error" in r else "")
        cells.append(f"{r['gradient_error']:.2e}" if "gradient_error" in r else "")
        cells.append(str(r.get("failure", "" if r.get("ok", True) else "WRONG")).replace("\n", " ")[:160])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for kernels.json and kernels.md")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, separated by commas")
    parser.add_argument("--limit", type=float, default=80, help="seconds that each group may take")
    parser.add_argument("--total", type=float, default=200, help="seconds all may take")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := [name for name in names if name not in GROUPS]:
        raise SystemExit(f"no group {unknown[0]!r}: there are {', '.join(GROUPS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    lines = args.out / "kernels.jsonl"
    if args.group:
        run_group(args.group, lines)
        return
    lines.write_text("")
    end = time.perf_counter() + args.total

    def run(name: str) -> None:
        command = [sys.executable, __file__, "--out", str(args.out), "--group", name]
        start = time.perf_counter()
        limit = min(args.limit, end - start)
        try:
            # Checks run side by side: none may take the whole memory.
            shared = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false") if name.endswith("_checks") else None
            code = subprocess.run(command, timeout=limit, env=shared).returncode if limit > 0 else "no time left"
        except subprocess.TimeoutExpired:
            code = "time limit"
        print(f"{name}: {time.perf_counter() - start:.0f} s, exit {code}", flush=True)
        if code != 0:
            with lines.open("a") as file:
                row = dict(group=name, case=f"group {name}", implementation="", failure=f"ended early: {code}")
                file.write(json.dumps(row) + "\n")

    with concurrent.futures.ThreadPoolExecutor() as side_by_side:
        list(side_by_side.map(run, (n for n in names if n.endswith("_checks"))))
    for name in names:
        if not name.endswith("_checks"):
            run(name)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    device = jax.devices()[0]
    text = f"{device.device_kind}, jax {jax.__version__}\n\n{report(rows)}\n"
    (args.out / "kernels.json").write_text(json.dumps(dict(device=device.device_kind, rows=rows), indent=1))
    (args.out / "kernels.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
