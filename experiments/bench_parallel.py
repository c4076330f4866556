"""Several devices beside one: the same training steps, tokens per second, and how fast tokens travel to experts.

    python -m experiments.bench_parallel --out runs/bench_parallel

Three parts, each in a process of its own, so that one which fails or takes too long leaves the others' results:

- exchange: dispatch and combine of the expert layer at V3's width, without the experts, beside an `all_to_all` of the
  same devices; several ways to do them, and settings of the libraries below.
- throughput: training steps of a compute-bound size, one device's beside those of all devices with as many tokens each.
- steps: three float32 steps of a small model with packed documents, MTP, the balance loss and the router's bias, on
  meshes of all devices: losses, gradients, parameters and optimizer state against one device's, beside what one
  device's runs differ by among themselves. Once more with the default implementations in bfloat16.

Compiling takes most of the time: `--meshes fsdp --dtypes bfloat16` compiles less, and what it compiled is kept.

On a CPU, `XLA_FLAGS=--xla_force_host_platform_device_count=2` makes two devices, and `--size small` suits them. A rate
is of the bytes that a device sends to the others, over the time; those that it receives go the other way at the same
time. Padding doesn't count as bytes sent. Writes results.json and report.md after each part.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.accounting.flops import model_flops
from dsv3_jax.compilation_cache import keep_compiled_programs
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import ExpertWeights
from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.dispatch import spread_experts
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.parallel.rows import collect, spread
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import PretrainingLoss
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.step import init_state, make_train_step
from experiments.bench_step import scaled

Part = Literal["exchange", "throughput", "steps"]
Axis = Literal["fsdp", "expert", "tensor", "context", "data"]
Row = dict[str, Any]

SETTINGS: dict[str, dict[str, str]] = {
    "": {},
    "copies between devices by memcpy": {"XLA_FLAGS": "--xla_gpu_use_memcpy_local_p2p=true"},
    "32 channels between two devices": {"NCCL_MIN_P2P_NCHANNELS": "32", "NCCL_MAX_P2P_NCHANNELS": "32"},
}
"""Environment variables to try for the exchange on GPUs."""

LIMITS: dict[Part, int] = {"exchange": 100, "throughput": 180, "steps": 160}
"""Seconds for a part if there are several, with its start; for the exchange, with each of the settings."""

# --- exchange ---------------------------------------------------------------------------------------------------------


def per_call(function: Callable[[jax.Array], jax.Array], x: jax.Array, turns: int = 20) -> float:
    """Seconds of one of many calls in one program, each on what the last returned; the median of five programs."""
    loop = jax.jit(lambda x: lax.fori_loop(0, turns, lambda _, x: function(x), x))
    times = []
    for _ in range(6):  # the first compiles
        start = time.perf_counter()
        jax.block_until_ready(loop(x))
        times.append((time.perf_counter() - start) / turns)
    return statistics.median(times[1:])


def maps(ids: jax.Array, devices: int, experts: int) -> tuple[jax.Array, jax.Array]:
    """As `parallel.rows` has them: rows of buffers that hold all tokens for each device."""
    tokens = len(ids)
    reached = (ids[:, :, None] // (experts // devices) == jnp.arange(devices)).any(1)
    places = jnp.where(reached, jnp.arange(devices) * tokens + jnp.cumsum(reached, 0) - 1, devices * tokens)
    source = jnp.full((devices * tokens,), tokens).at[places].set(jnp.arange(tokens)[:, None], mode="drop")
    return source, places


def of_this_turn(x: jax.Array, ids: jax.Array) -> jax.Array:
    """The same ids, so that a compiler can't plan the exchange once for all turns of a loop."""
    return ids + (x[..., :1] > 1e30).astype(ids.dtype)


def swap(rows: jax.Array) -> jax.Array:
    received: jax.Array = lax.all_to_all(rows, "expert", 0, 0, tiled=True)
    return received


def raw(x: jax.Array, ids: jax.Array, devices: int, experts: int) -> jax.Array:
    """`all_to_all` alone, out and back, of buffers that were full."""
    rows = swap(swap(jnp.tile(x, (devices, 1))))
    return rows[: len(x)]


def packed(x: jax.Array, ids: jax.Array, devices: int, experts: int) -> jax.Array:
    """Rows gathered into buffers, exchanged, and added up where they came from."""
    source, places = maps(ids, devices, experts)
    return collect(swap(swap(spread(x, source, places))), source, places).astype(x.dtype)


def packed_alone(x: jax.Array, ids: jax.Array, devices: int, experts: int) -> jax.Array:
    """The same without an exchange."""
    source, places = maps(ids, devices, experts)
    rows = lax.optimization_barrier(spread(x, source, places))
    return collect(rows, source, places).astype(x.dtype)


def packed_in_chunks(x: jax.Array, ids: jax.Array, devices: int, experts: int, chunks: int) -> jax.Array:
    """In several shares of the tokens, so that one's rows may be gathered while another's are under way."""
    shares = zip(jnp.split(x, chunks), jnp.split(ids, chunks), strict=True)
    return jnp.concatenate([packed(x, ids, devices, experts) for x, ids in shares])


def own_rows_stay(x: jax.Array, ids: jax.Array, devices: int, experts: int) -> jax.Array:
    """Only the other devices' rows are sent, to one device after the other."""
    source, places = maps(ids, devices, experts)
    here, size = lax.axis_index("expert"), len(x)
    piece = lambda rows, i: lax.dynamic_slice_in_dim(rows, i % devices * size, size)
    total = jnp.zeros(x.shape, jnp.float32)
    for step in range(devices):
        there = [(i, (i + step) % devices) for i in range(devices)]
        back = [(i, j) for j, i in there]
        rows = spread(x, piece(source, here + step), places)
        if step:
            rows = lax.ppermute(lax.optimization_barrier(lax.ppermute(rows, "expert", there)), "expert", back)
        row = lax.dynamic_index_in_dim(places, (here + step) % devices, 1) - (here + step) % devices * size
        total += collect(rows, jnp.zeros(0, jnp.int32), row)
    return total.astype(x.dtype)


def gathered(x: jax.Array, ids: jax.Array, devices: int, experts: int, *, wide: bool) -> jax.Array:
    """All tokens to all devices. Back by `all_to_all` and a float32 sum (`wide`), or by `psum_scatter`."""
    rows = lax.all_gather(x, "expert", tiled=True)
    if not wide:
        total: jax.Array = lax.psum_scatter(rows, "expert", tiled=True)
        return total
    return swap(rows).reshape(devices, *x.shape).sum(0, dtype=jnp.float32).astype(x.dtype)


WAYS: dict[str, Callable[..., jax.Array]] = {
    "all_to_all alone, out and back": raw,
    "gathering rows and adding up, no exchange": packed_alone,
    "packed": packed,
    "packed, 2 shares": functools.partial(packed_in_chunks, chunks=2),
    "packed, 4 shares": functools.partial(packed_in_chunks, chunks=4),
    "packed, own rows stay": own_rows_stay,
    "all_gather, all_to_all and a sum": functools.partial(gathered, wide=True),
    "all_gather, psum_scatter": functools.partial(gathered, wide=False),
}
COMPUTED = [name for name in WAYS if "alone" not in name and "no exchange" not in name]


def measure_exchange(devices: int, tokens: int, config: ModelConfig, *, every_way: bool) -> list[Row]:
    """`all_to_all`, and dispatch with combine, of `tokens` tokens per device in bfloat16, without experts."""
    mesh = make_mesh(MeshShape(expert=devices), jax.devices())
    width, k, experts = config.hidden_size, config.num_experts_per_tok, config.n_routed_experts
    spec = PartitionSpec("expert")
    cut = NamedSharding(mesh, spec)
    draw = jax.jit(lambda key: jax.random.normal(key, (devices, tokens, width), jnp.bfloat16), out_shardings=cut)
    x = draw(jax.random.key(0))
    scores = jax.jit(lambda key: jax.random.uniform(key, (devices, tokens, experts)), out_shardings=cut)
    ids = jax.jit(lambda s: lax.top_k(s, k)[1].astype(jnp.int32), out_shardings=cut)(scores(jax.random.key(1)))
    reached = (np.asarray(ids) // (experts // devices))[..., None] == np.arange(devices)
    reached = reached.any(2)
    away = reached & (np.arange(devices)[:, None, None] != np.arange(devices))
    crossing = int(away.sum()) / devices  # tokens that a device sends to others
    there_and_back = 2 * crossing * width * 2
    weights = jax.device_put(jnp.ones(ids.shape, jnp.float32), cut)
    nothing = jnp.zeros((experts, 1, 1), jnp.bfloat16)
    w = ExpertWeights(nothing, nothing, nothing)
    rows: list[Row] = []

    def add(what: str, function: Callable[[jax.Array], jax.Array], sent: float, expected: Any = None) -> None:
        row: Row = {"what": what, "bytes": sent, "tokens": tokens, "experts": experts}
        try:
            if expected is not None:
                got = np.asarray(jax.jit(function)(x)[0, :256], np.float32)
                row["error"] = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
            row["seconds"] = per_call(function, x, 2 if "ragged" in what else 20)
        except Exception as e:  # what a backend hasn't got belongs in the table
            row["failure"] = f"{type(e).__name__}: {e}"[:300]
        rows.append(row)
        print(row, flush=True)

    times = reached[0, :256].sum(-1)[:, None]  # devices that return a token: all that there is to add up
    with jax.set_mesh(mesh):
        on_device = functools.partial(jax.shard_map, in_specs=spec, out_specs=spec, check_vma=False)
        sent = x.nbytes / devices * (devices - 1) / devices
        add("all_to_all", on_device(lambda x: swap(x[0])[None]), sent)
        for dispatch in ("all_to_all", "all_gather", "ragged_all_to_all"):
            if dispatch == "ragged_all_to_all" and not every_way:
                continue
            runtime = Runtime(sharding="fsdp_ep", dispatch=dispatch, dtype="bfloat16")

            def whole(x: jax.Array, runtime: Runtime = runtime) -> jax.Array:
                alone = lambda x, ids, weights, w, rows: x  # in the experts' place
                routed = of_this_turn(x, ids)
                return spread_experts(x, routed, weights, w, compute=alone, config=config, runtime=runtime)[0]

            add(f"dsv3_jax, {dispatch}", whole, there_and_back)
        for name, way in WAYS.items() if every_way else ():
            function = on_device(
                lambda x, ids, way=way: way(x[0], of_this_turn(x, ids)[0], devices, experts)[None],
                in_specs=(spec, spec),
            )
            # A gather has no rows to take out: what no expert there was asked for comes back, too.
            exact = np.asarray(x[0, :256], np.float32) * (devices if "gather" in name else times)
            add(name, lambda x, f=function: f(x, ids), there_and_back, exact if name in COMPUTED else None)
    return rows


def run_exchange(size: str, experts: int, tokens: tuple[int, ...]) -> list[Row]:
    config = dataclasses.replace(ModelConfig.preset("v3-671b"), n_routed_experts=experts)
    sizes = tokens or ((64,) if size == "small" else (16384, 4096))
    largest = max(sizes)
    return [r for n in sizes for r in measure_exchange(jax.device_count(), n, config, every_way=n == largest)]


# --- throughput -------------------------------------------------------------------------------------------------------


def run_throughput(size: str, meshes: tuple[str, ...], steps: int = 6) -> list[Row]:
    """Steps with as many tokens per device on one device and on all: the median of `steps`, after two to warm up.

    meshes: axes to spread over, by default `fsdp`.
    """
    n = jax.device_count()
    if size == "small":
        config = dataclasses.replace(ModelConfig.preset("tiny"), vocab_size=512, num_hidden_layers=2)
        sequences, length = 2, 64
    else:
        config, sequences, length = scaled(2048, 10), 32, 1024
    # Layers of one kind: half the program, and little less to compute.
    config = dataclasses.replace(config, first_k_dense_replace=0, num_nextn_predict_layers=0)
    base = Runtime.for_backend(jax.default_backend())
    cases = {"one device": ("", "single")}
    cases |= {f"{axis}={n}": (f"{axis}={n}", "fsdp_ep" if axis == "expert" else "fsdp") for axis in meshes or ("fsdp",)}
    make = lambda mesh, sharding: Throughput(
        config, dataclasses.replace(base, sharding=sharding), mesh, sequences, length
    )
    programs = at_once({name: functools.partial(make, *case) for name, case in cases.items()})
    rows: list[Row] = []
    for name, program in programs.items():
        devices = MeshShape.parse(cases[name][0]).devices
        row: Row = {"mesh": name, "devices": devices, "tokens per device": sequences * length}
        rows.append(row)
        try:
            if isinstance(program, Exception):
                raise program
            row["seconds"], row["objective"] = program.run(steps)
            row["tokens_per_second"] = devices * sequences * length / row["seconds"]
            flops = model_flops(config, length).total * sequences * length
            row["tflops_per_device"] = flops / row["seconds"] / 1e12
            row["times"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        except Exception as e:
            row["failure"] = f"{type(e).__name__}: {e}"[:300]
        print(row, flush=True)
        yield_rows(rows)
    return rows


class Throughput:
    """A step with as many sequences per device, compiled."""

    def __init__(self, config: ModelConfig, runtime: Runtime, mesh: str, sequences: int, length: int) -> None:
        shape = MeshShape.parse(mesh)
        model, batch = DeepSeekV3(config, runtime), sequences * shape.devices
        schedule = Schedule(ScheduleConfig(steps=100, batch_size=batch))
        optimizer = make_optimizer(OptimizerConfig(), schedule)
        self.placement = Placement(shape, runtime, parameter_axes(model))
        self.init = lambda key: init_state(model, optimizer, key)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length + 1), np.int32)
        data = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        self.data = self.placement.batch(np.arange(batch), data, batch)
        abstract, _ = self.placement.abstract(self.init, {})
        step = make_train_step(model, optimizer, PretrainingLoss(config, schedule))
        self.compiled = self.placement.lower(step, abstract, self.data).compile()

    def run(self, steps: int) -> tuple[float, float]:
        """Seconds of a step, the median of `steps` after two to warm up, and the last one's objective."""
        state = self.placement.jit_init(self.init)(jax.random.key(0))
        times = []
        for _ in range(2 + steps):
            before = time.perf_counter()
            state, metrics = self.compiled(state, self.data)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - before)
        return statistics.median(times[2:]), float(metrics["objective"])


def at_once(programs: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Returns the result of each, or the exception that it raised; they run side by side if there are cores."""

    def made(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as e:
            return e

    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else len(programs)) as pool:
        return dict(zip(programs, pool.map(made, programs.values()), strict=True))


# --- steps ------------------------------------------------------------------------------------------------------------

BATCH, LENGTH, STEPS = 8, 128, 3
SMALL = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=3),
    **dict(num_attention_heads=8, q_lora_rank=64, kv_lora_rank=64, n_routed_experts=16, num_experts_per_tok=4),
    **dict(n_group=4, topk_group=2, max_position_embeddings=256, initializer_range=0.1, aux_loss_alpha=0.01),
)
KINDS = ("losses", "gradients", "parameters", "optimizer")


def packed_batch(seed: int) -> dict[str, np.ndarray]:
    """Random tokens of three documents a sequence."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, SMALL.vocab_size, (BATCH, LENGTH + 1), dtype=np.int32)
    segments = np.sort(rng.integers(0, 3, (BATCH, LENGTH), dtype=np.int32), axis=1)
    positions = np.stack([np.arange(LENGTH) - np.searchsorted(row, row) for row in segments]).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments, "positions": positions}


class Steps:
    """Three steps on a mesh, compiled once."""

    def __init__(self, mesh: str, runtime: Runtime, microbatches: int = 1) -> None:
        schedule = Schedule(ScheduleConfig(steps=100, batch_size=BATCH, warmup_steps=1, bias_update_speed=0.01))
        keep = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, _, p: (g, g))
        optimizer = optax.chain(keep, make_optimizer(OptimizerConfig(), schedule))
        model = DeepSeekV3(SMALL, runtime)
        self.placement = Placement(MeshShape.parse(mesh), runtime, parameter_axes(model))
        self.init = lambda key: init_state(model, optimizer, key)
        abstract, batch = self.placement.abstract(self.init, {})
        batch = self.placement.abstract_batch(packed_batch(0), BATCH, LENGTH)
        step = make_train_step(model, optimizer, PretrainingLoss(model.config, schedule), microbatches=microbatches)
        self.compiled = self.placement.lower(step, abstract, batch).compile()

    def run(self) -> dict[str, dict[str, np.ndarray]]:
        """Metrics and gradients of each step, and variables and the optimizer's state after them: by kind and name."""
        state = self.placement.jit_init(self.init)(jax.random.key(0))
        losses, gradients = [], []
        for i in range(STEPS):
            state, metrics = self.compiled(state, self.placement.batch(np.arange(BATCH), packed_batch(i), BATCH))
            # One device has no dispatch.
            losses.append({name: value for name, value in metrics.items() if not name.startswith("dispatch_")})
            gradients.append(jax.tree.map(np.asarray, state.opt_state[0]))
        trees = (losses, gradients, state.variables, state.opt_state[1:])

        def named(tree: Any) -> dict[str, np.ndarray]:
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}

        return {kind: named(tree) for kind, tree in zip(KINDS, trees, strict=True)}


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """The largest ||difference|| / ||array|| of each kind."""

    def of(kind: str) -> float:
        x, y = a[kind], b[kind]
        assert x.keys() == y.keys(), set(x) ^ set(y)
        return float(max(np.linalg.norm(x[k] - y[k]) / max(np.linalg.norm(y[k]), 1e-7) for k in y))

    return {kind: of(kind) for kind in KINDS}


def largest(each: list[dict[str, float]]) -> dict[str, float]:
    return {kind: max(d[kind] for d in each) for kind in KINDS}


def run_steps(meshes: tuple[str, ...], dtypes: tuple[str, ...]) -> list[Row]:
    """Each mesh against one device, beside the spread of one device's own runs. By default all meshes and dtypes."""
    n, rows = jax.device_count(), []
    yield_rows(rows)
    precise = Runtime(experts_impl="ragged", attention_impl="reference")
    runtimes = {"float32": precise}
    if jax.default_backend() != "cpu":
        runtimes["bfloat16"] = Runtime.for_backend(jax.default_backend())
    for name in dtypes or runtimes:
        rows += compare_steps(n, name, runtimes[name], rows, meshes)
        yield_rows(rows)
    return rows


def compare_steps(n: int, name: str, runtime: Runtime, before: list[Row], meshes: tuple[str, ...]) -> list[Row]:
    on = lambda mesh, sharding, **kw: (mesh, dataclasses.replace(runtime, sharding=sharding, **kw))
    cases: dict[str, tuple[Any, ...]] = {
        "one device": ("", runtime),
        "one device, 2 microbatches": ("", runtime, 2),
    }
    for axis in meshes or ("fsdp", "expert", "tensor", "context", "data"):
        cases[f"{axis}={n}"] = on(f"{axis}={n}", "fsdp_ep" if axis == "expert" else "fsdp")
    if name == "float32" and not meshes:
        cases[f"expert={n}, all_gather"] = on(f"expert={n}", "fsdp_ep", dispatch="all_gather")

    def compiled(*case: Any) -> Steps:
        with jax.default_matmul_precision("highest" if name == "float32" else "default"):
            return Steps(*case)

    programs = at_once({what: functools.partial(compiled, *case) for what, case in cases.items()})
    if failed := [p for p in list(programs.values())[:2] if isinstance(p, Exception)]:
        return [{"dtype": name, "mesh": "one device", "failure": f"{type(failed[0]).__name__}: {failed[0]}"[:300]}]
    runs = [programs["one device"].run() for _ in range(3)]
    again = largest([differences(a, b) for a, b in itertools.combinations(runs, 2)])
    other = differences(programs["one device, 2 microbatches"].run(), runs[0])
    rows = [
        {"dtype": name, "mesh": "one device again", **again},
        {"dtype": name, "mesh": "one device, its own order of sums changed by 2 microbatches", **other},
    ]
    for case in list(cases)[2:]:
        row: Row = {"dtype": name, "mesh": case}
        try:
            if isinstance(programs[case], Exception):
                raise programs[case]
            got = programs[case].run()
            # To the nearest of one device's runs, as these are all right; and as far as any of these is from another.
            each = [differences(got, run) for run in runs]
            row |= min(each, key=lambda d: max(d.values()))
            row["within"] = all(row[kind] <= max(again[kind], other[kind]) for kind in KINDS)
        except Exception as e:
            row["failure"] = f"{type(e).__name__}: {e}"[:300]
        rows.append(row)
        print(row, flush=True)
        yield_rows(before + rows)
    return rows


# --- all of it --------------------------------------------------------------------------------------------------------

_OUT: list[Path] = []


def yield_rows(rows: list[Row]) -> None:
    """Writes a part's rows so far, where the process that started this one looks for them."""
    if _OUT:
        _OUT[0].write_text(json.dumps(rows, indent=1) + "\n")


def in_process(
    part: Part, out: Path, size: str, arguments: list[str], environment: dict[str, str], limit: float
) -> Any:
    """Runs a part by itself: its rows, and what became of it if it didn't end well."""
    rows = out / f"{part}.rows.json"
    rows.unlink(missing_ok=True)
    command = [sys.executable, "-m", "experiments.bench_parallel", "--out", str(out), "--part", part, "--size", size]
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), environment.get("XLA_FLAGS"))))
    merged = os.environ | environment | ({"XLA_FLAGS": flags} if flags else {})
    ended = ""
    try:
        with open(out / "log.txt", "a") as log:
            done = subprocess.run(command + arguments, env=merged, timeout=limit, stdout=log, stderr=log, check=False)
        ended = f"ended with {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        ended = f"stopped after {limit:.0f} s"
    return (json.loads(rows.read_text()) if rows.exists() else []), ended


def report(record: dict[str, Any]) -> str:
    n = record["devices"]
    lines = [
        f"# {n} devices beside one",
        "",
        f"{record['date']}, {n} x {record['device']}, jax {jax.__version__}, `{record['command']}`.",
        "",
        *[f"Part {part}: {ended}." for part, ended in record["ended"].items() if ended],
        "",
        "## The same steps",
        "",
        f"Three steps ({BATCH} packed sequences of {LENGTH}, MTP, balance loss, bias updates) against one device's: "
        "the largest ||difference|| / ||array|| over the arrays of each kind. `within`: no further than one device's "
        "runs are from each other, three of them alike and one with its sums in another order.",
        "",
        "| dtype | mesh | losses | gradients | parameters | optimizer | within |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for r in record["steps"]:
        figures = r.get("failure") or " | ".join(f"{r[kind]:.1e}" for kind in KINDS)
        lines.append(f"| {r['dtype']} | {r['mesh']} | {figures} | {'yes' if r.get('within') else ''} |")
    lines += [
        "",
        "## Throughput",
        "",
        "| mesh | tokens per device | ms | tokens/s | times one device | model TFLOP/s per device |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in record["throughput"]:
        figures = r.get("failure", "")
        if "times" in r:
            figures = f"{r['seconds'] * 1e3:.1f} | {r['tokens_per_second']:,.0f} | {r['times']:.2f} | "
            figures += f"{r['tflops_per_device']:.0f}"
        lines.append(f"| {r['mesh']} | {r['tokens per device']:,} | {figures} |")
    lines += [
        "",
        "## The exchange",
        "",
        "At width 7168 in bfloat16. GB/s: what a device sends to others, there and back, over the time. `of "
        "all_to_all`: of the rate of one `all_to_all` of the tokens with the same settings.",
        "",
        "| settings | tokens per device | experts | what | ms | GB/s | of all_to_all | error |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    peak = 0.0
    for r in record["exchange"]:
        rate = r["bytes"] / r["seconds"] / 1e9 if "seconds" in r else 0.0
        peak = rate if r["what"] == "all_to_all" else peak
        share = f"{rate / peak:.0%}" if peak else ""
        error = f"{r['error']:.1e}" if "error" in r else ""
        figures = f"{r['seconds'] * 1e3:.3f} | {rate:.0f} | {share} | {error}" if rate else f"{r.get('failure')} | | |"
        lines.append(f"| {r['settings']} | {r['tokens']:,} | {r['experts']} | {r['what']} | {figures} |")
    return "\n".join(lines) + "\n"


def main(
    out: Path = Path("runs/bench_parallel"),
    size: Literal["small", "full"] = "full",
    parts: tuple[Part, ...] = ("exchange", "throughput", "steps"),
    tokens: tuple[int, ...] = (),
    experts: int = 256,
    meshes: tuple[Axis, ...] = (),
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = (),
    limit: int = 0,
    part: Part | None = None,
) -> None:
    """Compares and measures.

    Args:
      out: folder of results.json and report.md.
      size: small is for trying this script out on a CPU.
      parts: what to do, in this order.
      tokens: per device, of the exchange; by default 16,384 and 4,096, small 64.
      experts: routed experts of the exchange, of which a token takes 8 at random.
      meshes: axes to spread over, of fsdp, expert, tensor, context and data; by default all for steps, and fsdp for
        throughput.
      dtypes: of steps; by default both on an accelerator, and float32 on a CPU.
      limit: seconds for everything; by default 465, small 3600.
      part: for this script's own use: does this part alone, in this process.
    """
    start, limit = time.perf_counter(), limit or (465 if size == "full" else 3600)
    out.mkdir(parents=True, exist_ok=True)
    if part:
        if jax.device_count() < 2:
            raise SystemExit(f"bench_parallel compares several devices with one, but here is one {jax.devices()[0]}")
        keep_compiled_programs()
        _OUT.append(out / f"{part}.rows.json")
        head = {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
        (out / "devices.json").write_text(json.dumps(head))
        run = {
            "exchange": lambda: run_exchange(size, experts, tokens),
            "throughput": lambda: run_throughput(size, meshes),
            "steps": lambda: run_steps(meshes, dtypes),
        }
        yield_rows(run[part]())
        return
    record: dict[str, Any] = {part: [] for part in LIMITS} | {"ended": {}}
    record["date"] = datetime.date.today().isoformat()
    record["command"] = " ".join(["python -m experiments.bench_parallel", *sys.argv[1:]])
    several = {"--tokens": tokens, "--meshes": meshes, "--dtypes": dtypes}
    more = ["--experts", str(experts), *(x for name, of in several.items() if of for x in (name, *map(str, of)))]
    runs: list[tuple[Part, str]] = [(part, "") for part in parts]
    if size == "full" and "exchange" in parts:  # settings to try come last
        runs += [("exchange", name) for name in SETTINGS if name]
    for part, setting in runs:
        left = limit - (time.perf_counter() - start)
        if left < 30:
            record["ended"][f"{part} {setting}".strip()] = "not begun"
            continue
        alone = size == "small" or len(parts) == 1
        rows, ended = in_process(part, out, size, more, SETTINGS[setting], left if alone else min(left, LIMITS[part]))
        record[part] += [{"settings": setting, **row} for row in rows]
        record["ended"][f"{part} {setting}".strip()] = ended
        record |= json.loads((out / "devices.json").read_text())
        (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "report.md").write_text(report(record))
    print((out / "report.md").read_text())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
