"""Whole models on the accelerator at hand, with the defaults: training, prefill and decoding beside their floors.

    python -m experiments.bench_model --out runs/bench_model

Two models of random bfloat16 weights: DeepSeek-V2-Lite's widths (6 layers, one of them dense) and DeepSeek-V3's (one
dense and one sparse layer). A floor is the time of the model's products at the matmul rate, or of the bytes that must
be read at the copy rate, both measured in the same run. A decoding step must read each weight once, of experts those
that the batch's tokens went to, and the cached tokens. Writes results.json after every row, and report.md.

`--peers FILE` puts other programs' times beside: JSON of {row: {program: milliseconds}}, made on the same machine.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from dsv3_jax.accounting.flops import forward_flops, model_flops
from dsv3_jax.accounting.parameters import cache_bytes_per_token
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.auto import choices
from dsv3_jax.model.cache import Cache, init_cache
from dsv3_jax.model.router import CHOICES
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import forward, loss_sums, model_inputs, objective
from experiments.bench_decode import weights_read
from experiments.bench_step import measure_copy, seconds

V2_LITE = dataclasses.replace(
    ModelConfig.preset("v3-671b"),
    **dict(vocab_size=32768, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408),
    **dict(num_hidden_layers=6, first_k_dense_replace=1, num_attention_heads=16, q_lora_rank=None),
    **dict(n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, n_group=8, topk_group=4),
    **dict(num_nextn_predict_layers=0),
)
V3 = dataclasses.replace(
    ModelConfig.preset("v3-671b"),
    **dict(vocab_size=32768, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0),
)
SMALL = dataclasses.replace(ModelConfig.preset("tiny"), num_nextn_predict_layers=0)

ROWS: dict[str, tuple[str, ModelConfig, int, int]] = {
    "training, V2-Lite": ("train", V2_LITE, 4, 4096),
    "forward, V3": ("forward", V3, 1, 4096),
    "decode, V2-Lite, B=1": ("decode", V2_LITE, 1, 4096),
    "decode, V2-Lite, B=64": ("decode", V2_LITE, 64, 4096),
    "decode, V3, B=1": ("decode", V3, 1, 4096),
    "decode, V3, B=128": ("decode", V3, 128, 4096),
    "training, tiny": ("train", SMALL, 2, 256),
    "forward, tiny": ("forward", SMALL, 1, 256),
    "decode, tiny, B=4": ("decode", SMALL, 4, 256),
}
"""Kind of work, model, sequences, and tokens of each. The last three are for trying this script out on a CPU."""


def measure_matmul() -> float:
    """FLOP/s of a product of two bfloat16 matrices of 8192 x 8192 (1024 on a CPU)."""
    n = 1024 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    return 2 * n**3 / seconds(jax.jit(jnp.dot), x, x)


def median_ms(call: Callable[[], Any], times: int = 10) -> float:
    """The median of `times` calls, each waited for, after two to warm up."""
    taken = []
    for _ in range(2 + times):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:]) * 1e3


def init(model: DeepSeekV3) -> Any:
    """Random variables in the model's parameter dtype."""
    return jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))()


def gradient_of(
    config: ModelConfig, batch: int, length: int, **changes: Any
) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """The loss with its gradient, a function of variables, and one that makes them, by `train`'s default runtime.

    changes: other fields of the runtime.
    """
    runtime = dataclasses.replace(Runtime.for_backend(jax.default_backend()), dtype="bfloat16", **changes)
    model = DeepSeekV3(config, runtime)
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)

    def gradient(variables: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            inputs = model_inputs(model, {"tokens": tokens, "targets": jnp.roll(tokens, -1, axis=1)})
            sums = loss_sums(forward(model, variables | {"params": params}, inputs), inputs, config)
            return objective(sums, 0.0, 0.0, sums.tokens, sums.sequences)

        return jax.value_and_grad(loss)(variables["params"])

    return gradient, lambda: init(model)


def train(config: ModelConfig, batch: int, length: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of the loss and its gradient, with the recomputation that `train` uses by default; FLOPs."""
    gradient, make = gradient_of(config, batch, length)
    gradient, variables = jax.jit(gradient), make()
    return median_ms(lambda: gradient(variables)), {"flops": model_flops(config, length).total * batch * length}


def prefill(config: ModelConfig, batch: int, length: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of a forward pass with the last token's logits; FLOPs."""
    model = DeepSeekV3(config, Runtime(dtype="bfloat16", param_dtype="bfloat16"))
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)
    cache, last = init_cache(config, model.runtime, batch, length), jnp.full((batch, 1), length - 1, jnp.int32)
    call = jax.jit(functools.partial(model.apply, method="decode"))
    variables = init(model)
    return median_ms(lambda: call(variables, tokens, cache, last)), {
        "flops": forward_flops(config, length / 2).total * batch * length
    }


def decode(config: ModelConfig, batch: int, length: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of a greedy step after `length` cached tokens, of 50 in a row; bytes that it must read."""
    runtime = Runtime(dtype="bfloat16", param_dtype="bfloat16", attention_form="absorbed")
    model, steps = DeepSeekV3(config, runtime), 50
    variables = init(model)
    cache = init_cache(config, runtime, batch, length + 128)
    noise = lambda x: jax.random.normal(jax.random.key(2), x.shape, x.dtype) if x.ndim > 1 else x
    cache = dataclasses.replace(jax.tree.map(noise, cache), length=jnp.full((batch,), length, jnp.int32))
    tokens = jax.random.randint(jax.random.key(1), (batch, 1), 0, config.vocab_size)
    call = functools.partial(model.apply, method="decode")

    @functools.partial(jax.jit, donate_argnums=2)
    def step(variables: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        logits, cache = call(variables, tokens, cache)
        return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), cache

    (_, _), chosen = jax.jit(functools.partial(call, mutable=[CHOICES]))(variables, tokens, cache)
    tokens, cache = step(variables, tokens, cache)
    jax.block_until_ready(tokens)
    start = time.perf_counter()
    for _ in range(steps):
        tokens, cache = step(variables, tokens, cache)
    jax.block_until_ready(tokens)
    ms = (time.perf_counter() - start) / steps * 1e3
    return ms, {"bytes": 2 * weights_read(config, chosen) + batch * length * cache_bytes_per_token(config)}


KINDS = {"train": train, "forward": prefill, "decode": decode}


def measure(names: list[str]) -> Iterator[dict[str, Any]]:
    """Measures the rates and then the rows; yields everything so far."""
    rates = {"matmul": measure_matmul(), "copy": measure_copy()}
    record: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "rates": rates,
        "rows": {},
    }
    for name in names:
        kind, config, batch, length = ROWS[name]
        try:
            ms, work = KINDS[kind](config, batch, length)
        except jax.errors.JaxRuntimeError as error:  # too little memory
            record["rows"][name] = {"error": str(error).splitlines()[0][:200]}
        else:
            rate = rates["matmul"] if "flops" in work else rates["copy"]
            record["rows"][name] = {"ms": ms, "floor_ms": sum(work.values()) / rate * 1e3, **work}
        yield record


def report(record: dict[str, Any], peers: dict[str, dict[str, float]]) -> str:
    """The table, in Markdown."""
    rates, programs = record["rates"], sorted({program for row in peers.values() for program in row})
    lines = [
        "# Whole models with the defaults",
        "",
        f"{record['date']}, {record['device']}, jax {record['jax']}, `python -m experiments.bench_model`. Products at "
        f"{rates['matmul'] / 1e12:.0f} TFLOP/s, copies at {rates['copy'] / 1e9:,.0f} GB/s.",
        "",
        f"| | ms | floor | times the floor |{''.join(f' {p} |' for p in programs)}",
        f"|---|---:|---:|---:|{'---:|' * len(programs)}",
    ]
    for name, row in record["rows"].items():
        if "error" in row:
            lines.append(f"| {name} | not measured: {row['error']} | | |" + " |" * len(programs))
            continue
        beside = "".join(f" {peers.get(name, {}).get(p, math.nan):.1f} |".replace("nan", "") for p in programs)
        lines.append(
            f"| {name} | {row['ms']:.2f} | {row['floor_ms']:.2f} | {row['ms'] / row['floor_ms']:.2f} |{beside}"
        )
    return "\n".join(lines) + "\n"


def main(out: Path = Path("runs/bench_model"), rows: str = "", peers: Path | None = None) -> None:
    """Measures and reports.

    Args:
      out: folder of results.json and report.md.
      rows: parts of the names of the rows to measure, separated by "; "; by default all of the device's sizes.
      peers: JSON file of other programs' milliseconds.
    """
    cpu = jax.default_backend() == "cpu"
    names = [n for n in ROWS if any(part in n for part in rows.split("; "))] if rows else list(ROWS)
    names = names if rows else [n for n in ROWS if ("tiny" in n) == cpu]
    if not names:
        raise SystemExit(f"no row has {rows!r} in its name: there are {', '.join(ROWS)}")
    beside = json.loads(peers.read_text()) if peers else {}
    out.mkdir(parents=True, exist_ok=True)
    print(choices(Runtime(dtype="bfloat16"), ROWS[names[0]][1], ROWS[names[0]][3]), flush=True)
    for record in measure(names):
        (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
        name, row = list(record["rows"].items())[-1]
        print(f"{name}: {row}", flush=True)
    (out / "report.md").write_text(report(record, beside))
    print(report(record, beside))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
