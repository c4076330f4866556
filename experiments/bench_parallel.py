"""Several devices beside one: the same training steps, and how fast tokens travel to experts and back.

    python -m experiments.bench_parallel --out runs/bench_parallel

First three float32 steps of a small model with packed documents, MTP, the balance loss and the router's bias, on
meshes of all devices here: losses, gradients and updated parameters against one device's. Then the exchange of the
expert layer at V3's width, without the experts: dispatch and combine, in each of its forms, beside an `all_to_all` of
the same devices. On a CPU, `XLA_FLAGS=--xla_force_host_platform_device_count=2` makes two.

A rate is of the bytes that a device sends to the others, over the time; those that it receives go the other way at
the same time. Padding doesn't count as bytes sent. Writes results.json and report.md.
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
import numpy as np
import optax
import tyro
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import ExpertWeights
from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.dispatch import spread_experts
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import PretrainingLoss
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.step import init_state, make_train_step

BATCH, LENGTH, STEPS = 8, 128, 3
SMALL = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=4),
    **dict(num_attention_heads=8, q_lora_rank=64, kv_lora_rank=32, n_routed_experts=16, num_experts_per_tok=4),
    **dict(n_group=4, topk_group=2, max_position_embeddings=256, initializer_range=0.1, aux_loss_alpha=0.01),
)


def packed_batch(seed: int) -> dict[str, np.ndarray]:
    """Random tokens of three documents a sequence."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, SMALL.vocab_size, (BATCH, LENGTH + 1), dtype=np.int32)
    segments = np.sort(rng.integers(0, 3, (BATCH, LENGTH), dtype=np.int32), axis=1)
    positions = np.stack([np.arange(LENGTH) - np.searchsorted(row, row) for row in segments]).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments, "positions": positions}


def steps_on(mesh: str, runtime: Runtime) -> dict[str, np.ndarray]:
    """Losses and metrics of three steps, the gradients of each, and the variables after them, by name."""
    schedule = Schedule(ScheduleConfig(steps=100, batch_size=BATCH, warmup_steps=1, bias_update_speed=0.01))
    keep = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, _, p: (g, g))
    optimizer = optax.chain(keep, make_optimizer(OptimizerConfig(), schedule))
    model = DeepSeekV3(SMALL, runtime)
    placement = Placement(MeshShape.parse(mesh), runtime, parameter_axes(model))
    state = placement.init(lambda key: init_state(model, optimizer, key), jax.random.key(0))
    step = placement.jit_step(make_train_step(model, optimizer, PretrainingLoss(model.config, schedule)), state)
    seen: list[Any] = []
    for i in range(STEPS):
        state, metrics = step(state, placement.batch(np.arange(BATCH), packed_batch(i), BATCH))
        seen.append((metrics, jax.tree.map(np.asarray, state.opt_state[0])))
    leaves = jax.tree_util.tree_leaves_with_path((seen, state.variables))
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def compare_steps(devices: int) -> list[dict[str, Any]]:
    """The largest relative error of any array on each mesh, beside the same steps on one device twice."""
    runtime = Runtime(experts_impl="ragged")
    many = lambda **kw: dataclasses.replace(runtime, sharding="fsdp_ep", **kw)
    cases = {
        "one device again": ("", runtime),
        f"fsdp={devices}": (f"fsdp={devices}", dataclasses.replace(runtime, sharding="fsdp")),
        f"expert={devices}": (f"expert={devices}", many()),
        f"expert={devices}, ragged_all_to_all": (f"expert={devices}", many(dispatch="ragged_all_to_all")),
        f"expert={devices}, all_gather": (f"expert={devices}", many(dispatch="all_gather")),
        f"tensor={devices}": (f"tensor={devices}", dataclasses.replace(runtime, sharding="fsdp")),
        f"context={devices}": (f"context={devices}", dataclasses.replace(runtime, sharding="fsdp")),
    }
    rows = []
    with jax.default_matmul_precision("highest"):
        expected = steps_on("", runtime)
        for name, (mesh, case) in cases.items():
            try:
                got = steps_on(mesh, case)
                error = {k: np.linalg.norm(got[k] - v) / max(np.linalg.norm(v), 1e-7) for k, v in expected.items()}
                worst = max(error, key=lambda k: error[k])
                rows.append({"mesh": name, "arrays": len(error), "error": float(error[worst]), "worst": worst})
            except Exception as e:  # what a backend hasn't got belongs in the table
                rows.append({"mesh": name, "failure": f"{type(e).__name__}: {e}"[:300]})
            print(rows[-1], flush=True)
    return rows


def per_call(function: Callable[[jax.Array], jax.Array], x: jax.Array, turns: int = 20) -> float:
    """Seconds of one of many calls in one program, each on what the last returned; the median of five programs."""
    loop = jax.jit(lambda x: lax.fori_loop(0, turns, lambda _, x: function(x), x))
    times = []
    for _ in range(6):  # the first compiles
        start = time.perf_counter()
        jax.block_until_ready(loop(x))
        times.append((time.perf_counter() - start) / turns)
    return statistics.median(times[1:])


def measure_exchange(devices: int, tokens: int, config: ModelConfig) -> list[dict[str, Any]]:
    """`all_to_all`, and dispatch with combine, of `tokens` tokens per device in bfloat16."""
    mesh = make_mesh(MeshShape(expert=devices), jax.devices())
    width, k, experts = config.hidden_size, config.num_experts_per_tok, config.n_routed_experts
    cut = NamedSharding(mesh, PartitionSpec("expert"))
    draw = jax.jit(lambda key: jax.random.normal(key, (devices, tokens, width), jnp.bfloat16), out_shardings=cut)
    x = draw(jax.random.key(0))
    scores = jax.random.uniform(jax.random.key(1), (devices, tokens, experts))
    ids = lax.top_k(scores, k)[1].astype(jnp.int32)
    away = (ids // (experts // devices))[..., None] == jnp.arange(devices)
    away = away.any(2) & (jnp.arange(devices)[:, None, None] != jnp.arange(devices))
    crossing = int(away.sum()) / devices  # tokens that a device sends to others
    weights = jnp.ones(ids.shape, jnp.float32)
    nothing = jnp.zeros((experts, 1, 1), jnp.bfloat16)
    w = ExpertWeights(nothing, nothing, nothing)
    rows = []
    with jax.set_mesh(mesh):
        swap = jax.shard_map(
            lambda x: lax.all_to_all(x[0], "expert", 0, 0, tiled=True)[None],
            in_specs=PartitionSpec("expert"), out_specs=PartitionSpec("expert"),
        )  # fmt: skip
        sent = x.nbytes / devices * (devices - 1) / devices
        rows.append({"what": "all_to_all", "seconds": per_call(swap, x), "bytes": sent})
        for dispatch in ("all_to_all", "ragged_all_to_all", "all_gather"):
            runtime = Runtime(sharding="fsdp_ep", dispatch=dispatch, dtype="bfloat16")

            def there_and_back(x: jax.Array, runtime: Runtime = runtime) -> jax.Array:
                halve = lambda x, ids, weights, w, rows: x / devices  # in the experts' place
                return spread_experts(x, ids, weights, w, compute=halve, config=config, runtime=runtime)[0]

            row: dict[str, Any] = {"what": f"dispatch and combine, {dispatch}", "bytes": 2 * crossing * width * 2}
            try:
                row["seconds"] = per_call(there_and_back, x)
            except Exception as e:
                row["failure"] = f"{type(e).__name__}: {e}"[:300]
            rows.append(row)
    for row in rows:
        row |= {"tokens": tokens, "experts": experts}
        print(row, flush=True)
    return rows


def report(device: str, devices: int, steps: list[dict[str, Any]], exchange: list[dict[str, Any]]) -> str:
    lines = [
        f"# {devices} devices beside one",
        "",
        f"{datetime.date.today().isoformat()}, {devices} x {device}, jax {jax.__version__}, "
        "`python -m experiments.bench_parallel`.",
        "",
        f"Three float32 steps ({BATCH} packed sequences of {LENGTH}, MTP, balance loss, bias updates) against one "
        "device's: the largest ||difference|| / ||array|| over metrics, gradients and updated variables.",
        "",
        "| mesh | arrays | largest relative difference |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {r['mesh']} | {r.get('arrays', '')} | {r.get('failure') or format(r['error'], '.1e')} |" for r in steps
    ]
    lines += [
        "",
        "The exchange at width 7168 in bfloat16. GB/s: what a device sends to others, there and back, over the time.",
        "",
        "| tokens per device | experts | what | ms | GB/s | of all_to_all |",
        "|---:|---:|---|---:|---:|---:|",
    ]
    peak = 0.0
    for r in exchange:
        rate = r["bytes"] / r["seconds"] / 1e9 if "seconds" in r else 0.0
        peak = rate if r["what"] == "all_to_all" else peak
        figures = f"{r['seconds'] * 1e3:.3f} | {rate:.0f} | {rate / peak:.0%}" if rate else f"{r['failure']} | |"
        lines.append(f"| {r['tokens']:,} | {r['experts']} | {r['what']} | {figures} |")
    return "\n".join(lines) + "\n"


def main(out: Path = Path("runs/bench_parallel"), tokens: tuple[int, ...] = (), experts: int = 256) -> None:
    """Compares and measures.

    Args:
      out: folder of results.json and report.md.
      tokens: a device, of the exchange; by default 1,024, 4,096 and 16,384, on a CPU 64.
      experts: routed experts of the exchange, of which a token takes 8 at random.
    """
    devices = jax.device_count()
    if devices < 2:
        raise SystemExit(f"bench_parallel compares several devices with one, but here is one {jax.devices()[0]}")
    out.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(ModelConfig.preset("v3-671b"), n_routed_experts=experts)
    sizes = tokens or ((64,) if jax.default_backend() == "cpu" else (1024, 4096, 16384))
    device = jax.devices()[0].device_kind
    exchange = [row for n in sizes for row in measure_exchange(devices, n, config)]
    steps = compare_steps(devices)
    record = {"device": device, "devices": devices, "steps": steps, "exchange": exchange}
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    text = report(device, devices, steps, exchange)
    (out / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
