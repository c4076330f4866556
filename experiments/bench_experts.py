"""The experts of one layer on a CPU, beside a dense feed-forward of as many FLOPs.

    python -m experiments.bench_experts

Forward, and forward with gradients of input and weights, in float32: top-6 of 64 experts on 4,096 tokens through the
model's own experts seam (`blocked`), and a dense SwiGLU of 6 times the experts' width. Dense and sparse take turns,
and the fastest run of each counts. Writes docs/results/experts-cpu.md.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import ExpertWeights, experts
from dsv3_jax.runtime import Runtime

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Args:
    """Measurements to make."""

    experts: int = 64
    top: int = 6
    tokens: int = 4096
    widths: tuple[tuple[int, int], ...] = ((512, 256), (1024, 512))
    """Widths of the model and of an expert."""
    repeats: int = 7
    results: Path = ROOT / "docs" / "results"


def turns(functions: dict[str, Callable[[], jax.Array]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest run of each; they take turns, so that what disturbs one disturbs all."""
    best: dict[str, float] = {}
    for i in range(repeats + 1):  # the first compiles
        for name, f in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(f())
            if i:
                best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
    return best


def measure(width: int, hidden: int, args: Args) -> dict[str, float]:
    e, k, n = args.experts, args.top, args.tokens
    keys = jax.random.split(jax.random.key(0), 8)
    draw = lambda i, *shape: jax.random.normal(keys[i], shape)
    x = draw(0, 1, n, width)
    ids = jax.lax.top_k(draw(1, 1, n, e), k)[1].astype(jnp.int32)
    weights = jax.nn.softmax(draw(2, 1, n, k))
    w = ExpertWeights(draw(3, e, width, hidden), draw(4, e, width, hidden), draw(5, e, hidden, width))
    dense = ExpertWeights(draw(3, width, k * hidden), draw(4, width, k * hidden), draw(5, k * hidden, width))
    config, runtime = ModelConfig.preset("tiny"), Runtime(experts_impl="blocked")

    def sparse_forward(x: jax.Array, w: ExpertWeights) -> jax.Array:
        return experts(x, ids, weights, w, config, runtime)

    def dense_forward(x: jax.Array, w: ExpertWeights) -> jax.Array:
        return (jax.nn.silu(x @ w.gate_proj) * (x @ w.up_proj)) @ w.down_proj

    functions = {}
    for name, forward, matrices in (("dense", dense_forward, dense), ("sparse", sparse_forward, w)):
        run = jax.jit(forward)
        gradients = jax.jit(jax.grad(lambda x, w, f=forward: jnp.sum(f(x, w) ** 2), (0, 1)))
        functions[name] = lambda run=run, m=matrices: run(x, m)
        functions[f"{name} gradients"] = lambda run=gradients, m=matrices: run(x, m)
    return turns(functions, args.repeats)


def main(args: Args) -> None:
    lines = [
        "# Experts on a CPU",
        "",
        f"{datetime.date.today().isoformat()}, `python -m experiments.bench_experts` on {os.cpu_count()} cores "
        f"({platform.machine()}, {platform.system()}), jax {jax.__version__}, float32.",
        f"{args.experts} experts, top {args.top}, {args.tokens:,} tokens, routing uniform at random; the dense",
        f"feed-forward is {args.top} experts wide. Fastest of {args.repeats} runs in turn. With gradients: of the",
        "input and of all weights.",
        "",
        "| model x expert width | pass | dense, ms | GFLOP/s | experts, ms | experts / dense |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for width, hidden in args.widths:
        found = measure(width, hidden, args)
        flops = 2 * 3 * args.tokens * args.top * width * hidden
        for suffix, what, times in (("", "forward", 1), (" gradients", "with gradients", 3)):
            a, b = found["dense" + suffix], found["sparse" + suffix]
            rate = times * flops / a / 1e9
            lines.append(f"| {width} x {hidden} | {what} | {a * 1e3:.0f} | {rate:.0f} | {b * 1e3:.0f} | {b / a:.2f} |")
        print("\n".join(lines[-2:]), flush=True)
    (args.results / "experts-cpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
