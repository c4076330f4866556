"""Training steps of four model sizes on the accelerator at hand: predicted beside measured.

    python -m experiments.bench_step --out runs/bench_step

The prediction of a size rests on four rates measured in the same run, with arrays as large as the step's: linear,
batched (attention) and grouped (expert) products, forward and backward, and a copy. FLOPs are counted on the traced
step. Bytes between products are the compiler's for the whole step less its bytes for the products. Nothing is fitted
to the measured steps. Writes results.json after every size, and report.md.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from dsv3_jax.accounting.flops import model_flops, products
from dsv3_jax.accounting.parameters import count_parameters
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.planning.compiled import costs, costs_of_all_layers, device_bytes
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import PretrainingLoss
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.step import init_state, make_train_step
from pallas_kernels.grouped_matmul import grouped_matmul

MINI = ModelConfig.preset("v3-mini")


def scaled(width: int, layers: int, experts: int = 16) -> ModelConfig:
    """A model of v3-mini's proportions, `width` wide."""
    return dataclasses.replace(
        MINI,
        hidden_size=width,
        intermediate_size=3 * width,
        moe_intermediate_size=3 * width // 8,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        q_lora_rank=width // 2,
        kv_lora_rank=width // 4,
        n_routed_experts=experts,
    )


SIZES: dict[str, tuple[ModelConfig, int, int]] = {
    "small": (MINI, 16, 1024),
    "medium": (scaled(1024, 12), 16, 1024),
    "large": (scaled(1536, 16), 8, 1024),
    "largest": (scaled(2048, 20), 8, 1024),
    "cpu": (dataclasses.replace(ModelConfig.preset("tiny"), vocab_size=4096), 4, 256),
}
"""Configuration, sequences and tokens of each. "cpu" is for trying this script out."""


@dataclasses.dataclass(frozen=True)
class Rate:
    """A measured product: FLOP/s, and the compiler's bytes for a FLOP of it."""

    flops_per_second: float
    bytes_per_flop: float


def seconds(function: Callable, *arguments: Any, at_least: float = 0.3) -> float:
    """Time of one call, of as many in a row as take `at_least` seconds; the best of three."""
    jax.block_until_ready(function(*arguments))
    calls = 1
    while True:
        best = min(_timed(function, arguments, calls) for _ in range(3))
        if best >= at_least or calls >= 1024:
            return best / calls
        calls = min(1024, max(calls + 1, int(calls * 1.5 * at_least / max(best, 1e-6))))


def _timed(function: Callable, arguments: tuple, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        out = function(*arguments)
    jax.block_until_ready(out)
    return time.perf_counter() - start


def measure_rates(config: ModelConfig, runtime: Runtime, batch: int, length: int) -> dict[str, Rate]:
    """Products of the step's shapes, forward and backward."""
    c, dtype, n = config, jnp.dtype(runtime.dtype), batch * length
    normal = lambda *shape: jax.random.normal(jax.random.key(sum(shape)), shape, dtype)
    k, heads = c.num_experts_per_tok, c.num_attention_heads
    rows = n * k
    sizes = jnp.full((c.n_routed_experts,), rows // c.n_routed_experts, jnp.int32)
    experts = lambda x, w: grouped_matmul(x, w, sizes, implementation=runtime.experts_impl)
    width = c.qk_nope_head_dim
    cases = {
        "linear": (jnp.dot, (n, c.hidden_size), (c.hidden_size, c.intermediate_size)),
        "grouped": (experts, (rows, c.hidden_size), (c.n_routed_experts, c.hidden_size, c.moe_intermediate_size)),
        "attention": (
            lambda q, k: jnp.einsum("bthn,bshn->bhts", q, k),
            (batch, length, heads, width),
            (batch, length, heads, width),
        ),
    }
    rates = {}
    for kind, (function, left, right) in cases.items():
        x, w = normal(*left), normal(*right)
        cotangent = jnp.ones(jax.eval_shape(function, x, w).shape, dtype)

        def both_ways(x, w, cotangent, function=function):
            out, backward = jax.vjp(function, x, w)
            return out, backward(cotangent)

        compiled = jax.jit(both_ways).lower(x, w, cotangent).compile()
        flops = 3 * 2 * rows * c.hidden_size * c.moe_intermediate_size  # a grouped loop can't be counted everywhere
        if kind != "grouped":
            flops = sum(p.flops for p in products(both_ways, x, w, cotangent))
        rates[kind] = Rate(flops / seconds(compiled, x, w, cotangent), costs(compiled).bytes / flops)
    return rates


def measure_copy() -> float:
    """Bytes/s, read and written, of adding one to an array of half a gigabyte (a sixteenth on a CPU)."""
    size = 2**28 if jax.default_backend() != "cpu" else 2**24
    x = jnp.zeros(size, jnp.bfloat16)
    return 2 * x.nbytes / seconds(jax.jit(lambda x: x + 1), x)


def build(config: ModelConfig, runtime: Runtime, batch: int, length: int) -> tuple[Callable, Any, dict]:
    """The training step, a function that makes its state, and its abstract batch."""
    model, schedule = DeepSeekV3(config, runtime), Schedule(ScheduleConfig(steps=1000, batch_size=batch))
    optimizer = make_optimizer(OptimizerConfig(), schedule)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    step = make_train_step(model, optimizer, PretrainingLoss(model.config, schedule))
    return step, lambda: init_state(model, optimizer, jax.random.key(0)), {"tokens": tokens, "targets": tokens}


def compile_step(config: ModelConfig, runtime: Runtime, batch: int, length: int) -> Any:
    step, state, data = build(config, runtime, batch, length)
    return jax.jit(step, donate_argnums=0).lower(jax.eval_shape(state), data).compile()


def predict(config: ModelConfig, runtime: Runtime, batch: int, length: int, copy: float) -> dict[str, Any]:
    """Seconds of each kind of product and of what is between them."""
    rates = measure_rates(config, runtime, batch, length)
    # Loops over blocks of rows can't be counted; the same products as one ragged product can.
    countable = dataclasses.replace(runtime, experts_impl="ragged")
    step, state, data = build(config, countable, batch, length)
    flops = dict.fromkeys(rates, 0)
    for p in products(step, jax.eval_shape(state), data):
        flops[p.kind] += p.flops * p.times
    total = costs_of_all_layers(lambda c: compile_step(c, runtime, batch, length), config).bytes
    between = max(0.0, total - sum(flops[k] * rates[k].bytes_per_flop for k in rates))
    parts = {k: flops[k] / rates[k].flops_per_second for k in rates} | {"between": between / copy}
    return {
        "predicted_seconds": sum(parts.values()),
        "parts": parts,
        "flops": flops,
        "bytes_between": between,
        "rates": {k: dataclasses.asdict(r) for k, r in rates.items()},
    }


def measure(config: ModelConfig, runtime: Runtime, batch: int, length: int, steps: int) -> dict[str, float]:
    """The median of `steps` steps, each waited for, after three to warm up."""
    _, make_state, _ = build(config, runtime, batch, length)
    compiled = compile_step(config, runtime, batch, length)
    state = jax.jit(make_state)()
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)
    data = {"tokens": tokens, "targets": jnp.roll(tokens, -1, axis=1)}
    times = []
    for _ in range(3 + steps):
        start = time.perf_counter()
        state, metrics = compiled(state, data)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    return {"measured_seconds": statistics.median(times[3:]), "compiler_bytes": device_bytes(compiled)}


def main(out: Path = Path("runs/bench_step"), sizes: str = "", steps: int = 10) -> None:
    """Predicts and measures each size.

    Args:
      out: folder of results.json and report.md.
      sizes: some of small, medium, large, largest, cpu, with commas; by default the first four, on a CPU the last.
      steps: how many steps the median is of.
    """
    cpu = jax.default_backend() == "cpu"
    chosen = sizes.split(",") if sizes else (["cpu"] if cpu else ["small", "medium", "large", "largest"])
    if unknown := [name for name in chosen if name not in SIZES]:
        raise SystemExit(f"no size {unknown[0]!r}: there are {', '.join(SIZES)}")
    out.mkdir(parents=True, exist_ok=True)
    runtime = Runtime.for_backend(jax.default_backend())
    copy = measure_copy()
    device = jax.devices()[0].device_kind
    print(f"{device}: copies {copy / 1e9:,.0f} GB/s; {runtime}", flush=True)
    rows: list[dict[str, Any]] = []
    for name in chosen:
        config, batch, length = SIZES[name]
        row = {"size": name, "batch": batch, "length": length, "parameters": count_parameters(config).total}
        row |= predict(config, runtime, batch, length, copy)
        row |= measure(config, runtime, batch, length, steps)
        row["ratio"] = row["predicted_seconds"] / row["measured_seconds"]
        row["model_tflops"] = model_flops(config, length).total * batch * length / row["measured_seconds"] / 1e12
        rows.append(row)
        print(_line(row), flush=True)
        record = {"device": device, "copy_bytes_per_second": copy, "runtime": dataclasses.asdict(runtime), "rows": rows}
        (out / "results.json").write_text(json.dumps(record, indent=2))
    (out / "report.md").write_text(_report(device, copy, runtime, rows))


def _line(row: dict[str, Any]) -> str:
    parts = ", ".join(f"{k} {v * 1e3:.1f}" for k, v in row["parts"].items())
    return (
        f"{row['size']:>8}: predicted {row['predicted_seconds'] * 1e3:8.1f} ms, measured "
        f"{row['measured_seconds'] * 1e3:8.1f} ms, ratio {row['ratio']:.2f} ({parts})"
    )


def _report(device: str, copy: float, runtime: Runtime, rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Training steps: predicted and measured",
        "",
        f"{datetime.date.today().isoformat()}, {device}, jax {jax.__version__}, copies at {copy / 1e9:,.0f} GB/s.",
        f"{runtime}.",
        "",
        "| size | parameters | tokens | predicted ms | measured ms | ratio | linear TFLOP/s | grouped | attention |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        rates = " | ".join(
            f"{r['rates'][k]['flops_per_second'] / 1e12:.1f}" for k in ("linear", "grouped", "attention")
        )
        lines.append(
            f"| {r['size']} | {r['parameters']:,} | {r['batch'] * r['length']:,} | {r['predicted_seconds'] * 1e3:.1f} "
            f"| {r['measured_seconds'] * 1e3:.1f} | {r['ratio']:.2f} | {rates} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
