"""Checks and times every kernel on the accelerator at hand: one command, one table.

    python experiments/bench_kernels.py --out runs/kernels [--only mla_decode,mla_prefill] [--limit 120]

Each group runs in a process of its own with a time limit and writes its rows as it goes, so that a kernel that fails
or hangs costs only its own rows. Times are of many calls inside one compiled loop; where the inputs would fit in the
L2 cache, the calls rotate among several. The floors use the copy bandwidth and the matmul rate measured in the same
run. Errors are ||out - ref|| / ||ref|| against float64 references over fresh random inputs.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mla_decode import gpu as mla_decode_gpu
from pallas_kernels.mla_decode import mla_decode, plan

Row = dict[str, object]
TOLERANCE = {"bfloat16": 6e-3}


def relative_error(out, ref) -> float:
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    return float(np.linalg.norm(out - ref) / max(np.linalg.norm(ref), 1e-30))


def seconds_per_call(fn: Callable, varying: list, shared, budget: float = 0.4) -> float:
    """Median over five runs of a compiled loop that calls `fn(varying[i], shared)` for each i in turn."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *varying)
    empty = jax.tree.map(lambda o: jnp.zeros(o.shape, o.dtype), jax.eval_shape(fn, varying[0], shared))

    @jax.jit
    def loop(n, stacked, shared):
        def body(i, carry):
            shared, out = lax.optimization_barrier(carry)  # so that calls follow one another, and none is hoisted
            mine = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i % len(varying), keepdims=False), stacked)
            return shared, fn(mine, shared)

        return lax.fori_loop(0, n, body, (shared, empty))[1]

    def run(n: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(loop(n, stacked, shared))
        return time.perf_counter() - start

    run(2)
    base = min(run(0) for _ in range(3))
    once = max((run(3) - base) / 3, 1e-6)
    n = int(max(3, min(2000, budget / 5 / once)))
    return float(np.median([(run(n) - base) / n for _ in range(5)]))


def ceilings() -> Iterator[Row]:
    """What the card does at best: the two numbers that every floor uses."""
    x = jax.random.normal(jax.random.key(0), (1 << 30,), jnp.bfloat16)
    t = seconds_per_call(lambda _, x: -x, [jnp.int32(0)], x)
    yield dict(case="copy 2 GiB", implementation="xla", seconds=t, bytes=2 * x.nbytes, ceiling="bytes_per_second",
               value=2 * x.nbytes / t)  # fmt: skip
    del x
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in range(2))
    t = seconds_per_call(lambda _, ab: ab[0] @ ab[1], [jnp.int32(0)], (a, b))
    yield dict(case="matmul 8192^3 bf16", implementation="xla", seconds=t, flops=2 * 8192**3,
               ceiling="flops_per_second", value=2 * 8192**3 / t)  # fmt: skip


# --- mla_decode --------------------------------------------------------------------------------------------------


def decode_problem(rng: np.random.Generator, lengths, tokens: int, heads: int, spare: int = 3):
    """Shuffled pages; NaN in every slot that holds no token; table entries past the end far out of range."""
    lengths = np.asarray(lengths, np.int32)
    pages = -(-lengths // 64)
    table = np.full((len(lengths), max(1, pages.max())), 1 << 30, np.int32)
    table[np.arange(table.shape[1]) < pages[:, None]] = rng.permutation(pages.sum() + spare)[: pages.sum()]
    used = np.zeros((pages.sum() + spare, 64), bool)
    for row, length, count in zip(table, lengths, pages):
        if count:
            used[row[:count]] = True
            used[row[count - 1]] = np.arange(64) < length - 64 * (count - 1)
    key = jax.random.key(int(rng.integers(1 << 31)))
    cache = jnp.where(used[..., None], jax.random.normal(key, (*used.shape, 576), jnp.bfloat16), jnp.nan)
    q = jax.random.normal(jax.random.fold_in(key, 1), (len(lengths), tokens, heads, 576), jnp.bfloat16)
    return q, cache, jnp.asarray(table), jnp.asarray(lengths)


def decode_float64(q, cache, table, lengths, scale):
    """The kernel's own reference, in float64 on the host, a sequence at a time."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        q, cache = np.asarray(q.astype(jnp.float32)), np.asarray(cache.astype(jnp.float32))
        table, lengths = np.asarray(table), np.asarray(lengths)
        outs = []
        for i, length in enumerate(lengths):
            pages = table[i : i + 1, : max(1, -(-length // 64))]
            own = cache[np.minimum(pages[0], len(cache) - 1)].astype(np.float64)
            args = (
                q[i : i + 1].astype(np.float64),
                own,
                np.arange(len(own), dtype=np.int32)[None],
                lengths[i : i + 1],
            )
            outs.append(mla_decode(*(jnp.asarray(a) for a in args), scale=scale, implementation="reference"))
        return np.concatenate([o[0] for o in outs]), np.concatenate([o[1] for o in outs])


def decode_xla(q, cache, table, lengths, scale):
    """The peer: gather the pages, then two einsums and a softmax, fused as XLA pleases."""
    keys = cache[table].reshape(q.shape[0], -1, q.shape[-1])
    scores = jnp.einsum("bthd,bsd->bths", q, keys, preferred_element_type=jnp.float32) * scale
    tokens = q.shape[1]
    limit = lengths[:, None] - tokens + 1 + jnp.arange(tokens)
    scores = jnp.where(jnp.arange(keys.shape[1]) < limit[:, :, None, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None]).astype(q.dtype)
    return jnp.einsum("bths,bsr->bthr", weights, keys[..., :512]), lse


def decode_checks() -> Iterator[Row]:
    rng = np.random.default_rng()
    mixed = [0, 1, 63, 64, 65, 4096, 300, 2]
    cases = [(heads, tokens, mixed) for heads in (1, 16, 64, 128) for tokens in (1, 2, 4)]
    cases += [(128, 1, [4095]), (128, 2, [130] * 40), (16, 1, list(rng.integers(0, 4097, 128)))]
    for heads, tokens, lengths in cases:
        row = dict(case=f"check H={heads} T={tokens} B={len(lengths)} max={max(lengths)}", implementation="gpu")
        try:
            problem = decode_problem(rng, lengths, tokens, heads)
            scale = 576**-0.5
            step = functools.partial(mla_decode, scale=scale, implementation="gpu")
            out, lse = jax.jit(step)(*problem)
            ref, ref_lse = decode_float64(*problem, scale)
            lse, out = np.asarray(lse), np.asarray(out.astype(jnp.float32))
            dead = np.isneginf(ref_lse)
            row["error"] = relative_error(out, ref)
            row["lse_error"] = float(np.abs(np.where(dead, 0, lse) - np.where(dead, 0, ref_lse)).max())
            row["ok"] = bool(row["error"] < 6e-3 and row["lse_error"] < 1e-4 and (out[dead] == 0).all()
                             and np.isneginf(lse[dead]).all())  # fmt: skip
        except Exception as e:
            row.update(ok=False, failure=f"{type(e).__name__}: {e}"[:500])
            traceback.print_exc()
        yield row


def decode_timings() -> Iterator[Row]:
    rng = np.random.default_rng()
    shapes = [(128, 1, 4096), (128, 2, 4096), (1, 1, 65536), (128, 1, 32768), (128, 2, 32768), (128, 1, 8192)]
    for batch, tokens, length in shapes:
        heads, scale = 128, 576**-0.5
        work = dict(
            flops=2 * batch * heads * tokens * length * (576 + 512),
            bytes=2 * batch * (length * 576 + tokens * heads * (576 + 512)),
        )
        # Rotating tables over one pool of pages: together more than the L2 cache holds.
        pool = max(batch * length // 64, (400 << 20) // (64 * 576 * 2))
        cache = jax.random.normal(jax.random.key(0), (pool, 64, 576), jnp.bfloat16)
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

        peers = dict(gpu=ours, gpu_and_plan=ours_with_plan)
        if batch * length * tokens <= 128 * 4096 * 2:
            peers["xla_einsum"] = lambda table, x: decode_xla(x[0], x[1], table, x[2], scale)
        for name, fn in peers.items():
            row = dict(case=f"mla_decode B={batch} T={tokens} S={length} H={heads}", implementation=name, **work)
            yield timed(row, fn, tables, (q, cache, lengths, schedule))


def timed(row: Row, fn: Callable, varying: list, shared) -> Row:
    try:
        row["seconds"] = seconds_per_call(fn, varying, shared)
    except Exception as e:
        row["failure"] = f"{type(e).__name__}: {e}"[:500]
        traceback.print_exc()
    return row


# --- running and reporting ---------------------------------------------------------------------------------------

GROUPS: dict[str, Callable[[], Iterator[Row]]] = {
    "ceilings": ceilings,
    "mla_decode_checks": decode_checks,
    "mla_decode": decode_timings,
}


def run_group(name: str, path: pathlib.Path) -> None:
    with path.open("a") as file:
        for row in GROUPS[name]():
            file.write(json.dumps(dict(group=name, **row)) + "\n")
            file.flush()


def report(rows: list[Row]) -> str:
    """A markdown table. The floor is the longer of bytes / copy bandwidth and operations / matmul rate."""
    ceiling = {r["ceiling"]: r["value"] for r in rows if "ceiling" in r}
    lines = [
        "| case | implementation | ms | TFLOP/s | GB/s | % of floor | bound by | error | note |",
        "|---|---|---|---|---|---|---|---|---|",
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
        cells.append(str(r.get("failure", "" if r.get("ok", True) else "WRONG")).replace("\n", " ")[:160])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for kernels.json and kernels.md")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, separated by commas")
    parser.add_argument("--limit", type=float, default=300, help="seconds a group may take")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = args.out / "kernels.jsonl"
    if args.group:
        run_group(args.group, lines)
        return
    lines.unlink(missing_ok=True)
    for name in args.only.split(","):
        if name not in GROUPS:
            raise ValueError(f"no group {name!r}: there are {', '.join(GROUPS)}")
        command = [sys.executable, __file__, "--out", str(args.out), "--group", name]
        start = time.perf_counter()
        try:
            code = subprocess.run(command, timeout=args.limit).returncode
        except subprocess.TimeoutExpired:
            code = "time limit"
        print(f"{name}: {time.perf_counter() - start:.0f} s, exit {code}", flush=True)
        if code != 0:
            with lines.open("a") as file:
                row = dict(group=name, case=f"group {name}", implementation="", failure=f"ended early: {code}")
                file.write(json.dumps(row) + "\n")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    device = jax.devices()[0]
    text = f"{device.device_kind}, jax {jax.__version__}\n\n{report(rows)}\n"
    (args.out / "kernels.json").write_text(json.dumps(dict(device=device.device_kind, rows=rows), indent=1))
    (args.out / "kernels.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
