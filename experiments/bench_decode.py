"""Decoding through the engine at V3's widths: time per step beside its byte floor, and what the host adds.

    python -m experiments.bench_decode --out runs/bench_decode

One dense and one sparse layer of random bfloat16 weights, the whole vocabulary, no MTP. Each text's cache holds other
random latents, and its prompt is found there as a shared prefix is, so that only a last token is prefilled; then the
engine's own loop runs, with all texts in each step. A batch's program is compiled once for all contexts, where a
decoding kernel is used. `device_ms` is the same step without the host: many handed to the device one after another.
`gap` is what the engine takes more, as a share of its step. The floor is the time to copy what a step must read: each
weight once, of the experts those that tokens went to, and the cached tokens. Sampling is timed by itself at temperature
0.6 and top-p 0.95. Writes results.json after every row.

On a CPU a tiny model shows that the script works. experiments/bench_serving.py has what is measured there.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import gc
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dsv3_jax.accounting.parameters import cache_bytes_per_token, model_variables
from dsv3_jax.config import ModelConfig
from dsv3_jax.inference import Engine, EngineConfig, Sampling
from dsv3_jax.inference.paged_cache import batch_cache, pool_of
from dsv3_jax.inference.sampling import kind, rows, sample_rows
from dsv3_jax.model.auto import PAGE, choices, kernels
from dsv3_jax.model.router import CHOICES
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.runtime import Runtime
from experiments.bench_step import measure_copy, seconds

V3 = dataclasses.replace(
    ModelConfig.preset("v3-671b"), num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0
)
TINY = dataclasses.replace(ModelConfig.preset("tiny"), num_nextn_predict_layers=0)
STEPS, WARM = 40, 5


def weights_read(config: ModelConfig, chosen: Any) -> int:
    """Weights that a decoding step must read: all, but of experts those that its tokens went to, by `CHOICES`."""
    layers = [layer for ids in jax.tree.leaves(chosen) for layer in np.asarray(ids)]
    touched = statistics.mean(len(np.unique(layer)) for layer in layers) / config.n_routed_experts
    of = model_variables(config)
    count = sum(v.size * (touched if v.is_routed else 1) for v in of if v.collection == "params")
    return int(count) - config.vocab_size * config.hidden_size  # of the embedding a step reads a row per text


class Bench:
    """An engine whose loop is run by hand, and a pool of random latents."""

    def __init__(self, config: ModelConfig, most: int, longest: int) -> None:
        on_cpu = jax.default_backend() == "cpu"
        self.config, dtype = config, "float32" if on_cpu else "bfloat16"
        model = DeepSeekV3(config, Runtime(dtype=dtype, param_dtype=dtype))
        variables = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))()
        room = (longest // PAGE + 5) * PAGE
        self.sizes = EngineConfig(max_batch=most, max_length=room - 2 * PAGE, cache_tokens=(most + 1) * room)
        self.engine = e = Engine(model, variables, self.sizes, end_ids=())
        noise = lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype)
        e._pool = jax.jit(lambda pool: jax.tree.map(noise, pool), donate_argnums=0)(e._pool)
        e._thread = threading.current_thread()  # none of its own
        if kernels(model.runtime) is not None:  # it doesn't read what a text hasn't: all contexts share their programs
            e._table_sizes, e._decode_tables = e._table_sizes[-1:], e._decode_tables[-1:]
        self.model, self.variables = model, variables

    def fill(self, batch: int, context: int) -> list[Any]:
        """Runs `batch` texts up to the first token after `context` cached ones."""
        e, rng = self.engine, np.random.default_rng(batch)
        prompts = rng.integers(0, self.config.vocab_size, (batch, context + 1)).tolist()
        for prompt in prompts:
            pages = e.pages.allocate(context // PAGE)
            assert pages is not None
            e.pages.publish(prompt[:-1], pages)
            e.pages.release(pages)
        e._batch_sizes = [batch]  # no padding
        requests = [e.submit(prompt, Sampling(temperature=0), max_new_tokens=3 * STEPS) for prompt in prompts]
        e._admit()
        while pieces := e._next_pieces():
            e._prefill_pieces(pieces)
        e._read(0)
        assert len(e._running) == batch
        return requests

    def row(self, batch: int, context: int, copy: float) -> dict[str, Any]:
        e, requests, taken = self.engine, self.fill(batch, context), []
        for i in range(WARM + STEPS):
            start = time.perf_counter()
            e._turn()
            if i >= WARM:
                taken.append(time.perf_counter() - start)
        e._read(0)
        running, host = list(e._running), time.perf_counter()
        table = next(s for s in e._decode_tables if s >= max(len(r.pages) for r in running))
        packed = e._put(e._batch_of(running, batch, table))
        decode = lambda: e._draw(e._decode(packed, 0), packed, None, 0, False).result
        jax.block_until_ready(decode())
        start = time.perf_counter()
        for _ in range(STEPS):
            drawn = decode()
        host = (time.perf_counter() - start) / STEPS  # until all were handed over, an upper bound of the host's part
        jax.block_until_ready(drawn)
        device = (time.perf_counter() - start) / STEPS
        weights = self.bytes_of_weights(running, batch, table)
        for request in requests:
            e.cancel(request)
        e._turn()
        e.pages.forget()
        assert e.pages.available == e.pages.total
        cached = batch * (context + WARM + STEPS) * cache_bytes_per_token(self.config, self.model.runtime.dtype)
        ms, floor = sum(taken) / STEPS * 1e3, (weights + cached) / copy * 1e3
        return {
            "batch": batch, "context": context, "ms": ms, "median_ms": statistics.median(taken) * 1e3,
            "device_ms": device * 1e3, "handed_over_ms": host * 1e3, "gap": 1 - device * 1e3 / ms,
            "weight_bytes": weights, "cache_bytes": cached, "floor_ms": floor, "times_floor": ms / floor,
            "tokens_per_second": batch / ms * 1e3, "sampling_ms": sampling(self.config.vocab_size, batch),
        }  # fmt: skip

    def bytes_of_weights(self, running: list[Any], batch: int, table: int) -> int:
        """Bytes of the weights that a step of these texts reads, with the experts that its tokens went to."""
        e = self.engine
        of = e._batch_of(running, batch, table)
        e._pool, chosen = choose(e._absorbed, self.variables, e._pool, e._slots, of.slot, of.tables)
        return weights_read(self.config, chosen) * jnp.dtype(self.model.runtime.param_dtype).itemsize


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def choose(model: DeepSeekV3, variables: Any, pool: Any, slots: Any, slot: Any, tables: Any) -> Any:
    """The pool after a step, and the experts that its tokens chose in each layer."""
    cache = batch_cache(pool, tables, slots.length[slot], jnp.ones(len(slot), jnp.int32))
    tokens = slots.token[slot][:, None]
    (_, cache), chosen = model.apply(variables, tokens, cache, method="extend", mutable=[CHOICES])
    return pool_of(cache), chosen


@functools.cache
def sampling(vocabulary: int, batch: int) -> float:
    """Milliseconds to draw a token of each text from logits of the whole vocabulary."""
    logits = jax.random.normal(jax.random.key(2), (batch, vocabulary)) * 3
    how = [Sampling(temperature=0.6, top_p=0.95)] * batch
    draw = jax.jit(functools.partial(sample_rows, kind=kind(how)))
    return seconds(draw, logits, rows(how, list(range(batch))), np.arange(batch, dtype=np.int32), at_least=0.1) * 1e3


def numbers(name: str, text: str) -> list[int]:
    """Reads positive numbers that commas separate."""
    if not all(number.isdecimal() and int(number) for number in text.split(",")):
        raise SystemExit(f"{name} is {text!r}: give positive numbers separated by commas, such as 1,128")
    return [int(number) for number in text.split(",")]


def main(out: Path = Path("runs/bench_decode"), batches: str = "", contexts: str = "", seconds: float = 225.0) -> None:
    """Measures.

    Args:
      out: folder of results.json.
      batches: numbers of texts; by default 1, 128, 16, 64, 256 (1, 4 on a CPU).
      contexts: cached tokens of each; by default 4096, 16384 (256 on a CPU).
      seconds: begins no further row after that many.
    """
    on_cpu, began = jax.default_backend() == "cpu", time.monotonic()
    sizes = numbers("batches", batches or ("1,4" if on_cpu else "1,128,16,64,256"))
    lengths = numbers("contexts", contexts or ("256" if on_cpu else "4096,16384"))
    config = TINY if on_cpu else V3
    out.mkdir(parents=True, exist_ok=True)
    copy = measure_copy()
    record: dict[str, Any] = {
        "device": jax.devices()[0].device_kind, "date": datetime.date.today().isoformat(), "jax": jax.__version__,
        "copy_bytes_per_second": copy, "implementations": choices(Runtime(dtype="bfloat16"), config, PAGE), "rows": [],
    }  # fmt: skip
    bench = Bench(config, max(sizes), max(lengths))
    print(f"engine ready after {time.monotonic() - began:.0f} s; copies at {copy / 1e9:,.0f} GB/s", flush=True)
    for context in lengths:
        for batch in sizes:
            if time.monotonic() - began > seconds:
                print(f"{seconds:g} s are over", flush=True)
                return
            try:
                row = bench.row(batch, context, copy)
            except jax.errors.JaxRuntimeError as error:
                row = {"batch": batch, "context": context, "error": str(error).splitlines()[0][:300]}
            if "error" in row:  # the pool was given away
                del bench
                gc.collect()
                bench = Bench(config, max(sizes), max(lengths))
            row["after_seconds"] = time.monotonic() - began
            record["rows"].append(row)
            (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            print(shown, flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
