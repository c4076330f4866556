"""The engine on a CPU: what batching, drafts and long caches cost, and transformers on the same weights.

    python -m dsv3_jax train --run-dir runs/mine && python -m dsv3_jax convert runs/mine runs/mine_hf
    python -m experiments.bench_serving runs/mine --hf runs/mine_hf --reference-python REF/bin/python --out runs/serving

The run must have an MTP module. Prompts are its held-out text. REF is an environment with torch and transformers.
Each part is timed after a first round that compiles. Writes results.json after every part.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import functools
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dsv3_jax import load_pretrained
from dsv3_jax.checkpoint.run_tokenizer import run_tokenizer
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import validation_batches
from dsv3_jax.inference import Engine, EngineConfig, Sampling, steps
from dsv3_jax.inference.sampling import kind, rows, sample_rows
from dsv3_jax.model.auto import PAGE
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.config import TrainConfig
from experiments.bench_step import seconds

GREEDY = Sampling(temperature=0, ignore_eos=True)
PROMPT, NEW = 64, 64

REFERENCE = """
import json, sys, time, torch, transformers
torch.set_num_threads(int(sys.argv[3]))
prompts, new = json.load(open(sys.argv[2]))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = torch.tensor(prompts)
taken = []
with torch.no_grad():
    for _ in range(3):
        start = time.perf_counter()
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new,
                             do_sample=False, pad_token_id=0)
        taken.append(time.perf_counter() - start)
print(json.dumps({"seconds": min(taken[1:]), "versions": [torch.__version__, transformers.__version__],
                  "tokens": out[:, tokens.shape[1]:].tolist()}))
"""


def held_out(run: Path, count: int) -> list[list[int]]:
    """Held-out sequences."""
    config = TrainConfig.from_json(run / "config.json")
    batches = validation_batches(config.data, run_tokenizer(run), 16, -(-count // 16))
    return np.concatenate([b["tokens"] for b in batches])[:count].tolist()


def timed(engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY, new: int = NEW) -> float:
    """Seconds to continue the prompts together; the best of two rounds, after one that compiles."""

    def once() -> float:
        start = time.perf_counter()
        for _ in engine.generate(prompts, sampling, max_new_tokens=new):
            pass
        return time.perf_counter() - start

    once()
    return min(once(), once())


def agreement(model: Any, variables: Any, texts: list[list[int]]) -> float:
    """Share of positions in texts at which the MTP module's choice, given the next token, is the model's own there."""

    @jax.jit
    def agree(tokens: jax.Array) -> jax.Array:
        out = model.apply(variables, tokens, (jnp.roll(tokens, -1, axis=1),), method="forward")
        drafts, chosen = out.mtp_logits[0].array().argmax(-1), out.logits.array().argmax(-1)
        return jnp.mean(drafts[:, :-2] == chosen[:, 1:-1])

    return float(agree(jnp.array(texts)))


SAMPLED = Sampling(temperature=0.7, ignore_eos=True, seed=0)


def acceptance(model: Any, variables: Any, prompts: list[list[int]], texts: list[list[int]]) -> dict[str, Any]:
    """How many drafts are accepted on held-out text, and when the model continues its beginnings."""
    result: dict[str, Any] = {"agreement on held-out text": agreement(model, variables, texts)}
    for drafts in (1, 2):
        for name, how in (("greedy", GREEDY), ("temperature 0.7", SAMPLED)):
            sizes = EngineConfig(max_batch=32, max_length=256, drafts=drafts, drafts_up_to=32)
            engine = Engine(model, variables, sizes)
            list(engine.generate(prompts[:32], how, max_new_tokens=NEW))
            s = engine.stats()
            result[f"{drafts} drafts, {name}"] = {
                "of drafted tokens": s.accepted_tokens / s.draft_tokens,
                "by position": [n / s.drafts for n in s.accepted_per_position],
                "tokens per verification": 1 + s.accepted_tokens / s.drafts,
            }
            engine.close()
    return result


def speculative(model: Any, variables: Any, prompts: list[list[int]], how: Sampling) -> dict[str, Any]:
    """Time per token without drafts, with one in all steps, and as the engine chooses by itself, by batch."""
    make = lambda drafts, up_to=None: Engine(
        model, variables, EngineConfig(max_batch=32, max_length=256, drafts=drafts, drafts_up_to=up_to)
    )
    engines = {"without": make(0), "with one": make(1, 32), "by measurement": make(1)}
    rows = {batch: in_turns(engines, prompts, how, batch) for batch in (1, 2, 4, 8, 16, 32)}
    gains = {batch: row["gain"]["with one"] for batch, row in rows.items()}
    pay = max((b for b in gains if all(gains[n] > 1 for n in gains if n <= b)), default=0)
    choice = engines["by measurement"].stats().drafts_up_to
    for e in engines.values():
        e.close()
    return {"texts": rows, "pay up to": pay, "the engine's choice": choice}


def in_turns(
    engines: dict[str, Engine], prompts: list[list[int]], how: Sampling, batch: int, rounds: int = 6
) -> dict[str, Any]:
    """Milliseconds per token of `batch` texts at a time with each engine, after two rounds that aren't timed; medians.

    The engines take turns, so that what else the machine does slows all. `gain`: medians of the first one's times over
    the others' right after.
    """
    groups = [prompts[i : i + batch] for i in range(0, max(batch, 8), batch)]
    taken: dict[str, list[float]] = {name: [] for name in engines}
    for group in groups * (2 + rounds):
        for name, engine in engines.items():
            start = time.perf_counter()
            for _ in engine.generate(group, how, max_new_tokens=NEW):
                pass
            taken[name].append((time.perf_counter() - start) / (batch * NEW) * 1e3)
    ms = {name: np.array(times[2 * len(groups) :]) for name, times in taken.items()}
    first = next(iter(ms.values()))
    return {
        "ms per token": {name: float(np.median(x)) for name, x in ms.items()},
        "gain": {name: float(np.median(first / x)) for name, x in ms.items()},
    }


def together(model: Any, variables: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """64 requests at once, and one after another; without drafts, and as the engine uses them by itself."""
    result: dict[str, Any] = {}
    for name, drafts in (("no drafts", 0), ("by default", None)):
        engine = Engine(model, variables, EngineConfig(max_batch=64, max_length=256, drafts=drafts))
        at_once = timed(engine, (prompts * 2)[:64])
        alone = statistics.mean(timed(engine, [p]) for p in prompts[:8])
        engine.close()
        rate = {"together": 64 * NEW / at_once, "one after another": NEW / alone}
        result[name] = {"tokens per second": rate, "times": rate["together"] / rate["one after another"]}
    return result


def long_caches(config: ModelConfig) -> dict[str, Any]:
    """A decoding step of 32 texts after 100 and after 4000 cached tokens: its time in attention, and outside it."""
    c = dataclasses.replace(config, max_position_embeddings=8192, num_nextn_predict_layers=0)
    model = DeepSeekV3(c, Runtime())
    variables = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))()
    engine, batch = Engine(model, variables, EngineConfig(max_batch=32, max_length=4200, cache_tokens=32 * 4352)), 32
    programs: dict[int, tuple[Callable[[], Any], set[str]]] = {}
    for cached in (100, 4000):
        size = next(s for s in engine._decode_tables if s >= -(-(cached + 64) // PAGE))
        every = np.arange(batch, dtype=np.int32)
        tables = np.arange(1, 1 + batch * size, dtype=np.int32).reshape(batch, size) % engine.pages.total
        one, none = np.ones(batch, np.int32), np.zeros(batch, np.int32)
        packed = steps.Batch(every, none, one, none, rows([GREEDY] * batch, [0] * batch), tables).pack()
        given: Any = dict(length=jnp.full(batch + 1, cached, jnp.int32))
        arguments: Any = lambda packed=packed, given=given: (
            *(engine._absorbed, engine._variables, engine._pool),
            *(dataclasses.replace(engine._slots, **jax.tree.map(jnp.array, given)), packed),
        )

        def step(arguments: Any = arguments) -> Any:
            engine._pool, engine._slots, logits = steps.decode(*arguments(), drafts=0)
            return logits

        text = steps.decode.lower(*arguments(), drafts=0).compile().as_text()
        programs[cached] = step, operations(text, "/attend/")
    taken: dict[int, list[tuple[float, float]]] = {cached: [] for cached in programs}
    for _ in range(24):  # in turns, so that what else the machine does slows both
        for cached, (step, attention) in programs.items():
            taken[cached] += traced(step, "jit_decode", attention, calls=5)
    ms = {cached: np.median(pairs, axis=0) * 1e3 for cached, pairs in taken.items()}
    growth = [long[1] - short[1] for short, long in zip(taken[100], taken[4000], strict=True)]
    of_short_step = np.array(growth) * 1e3 / ms[100].sum()
    return {
        "ms": {cached: {"attention": float(a), "rest": float(rest)} for cached, (a, rest) in ms.items()},
        "growth of the rest, of the short step": {
            "of medians": float((ms[4000][1] - ms[100][1]) / ms[100].sum()),
            "quartiles": np.percentile(of_short_step, [25, 50, 75]).tolist(),
        },
    }


def operations(text: str, scope: str) -> set[str]:
    """Names of the operations in a compiled program's text that a named scope made, or that XLA added for these alone.

    XLA's own, such as copies of what a loop carries, have no origin: they belong to what uses them.
    """
    origin, users, computation = {}, collections.defaultdict(set), ""
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%([\w.-]+) .*{$", line):
            computation = opened[1]
        elif found := re.match(r"\s+(ROOT )?%([\w.-]+) = (.*)", line):
            root, name, rest = found.groups()
            made_by = re.search(r'op_name="([^"]*)"', rest)
            origin[name] = made_by and made_by[1]
            for used in re.findall(r"%([\w.-]+)", rest):
                users[used].add(name)
            if root:
                users[name].add(computation)
    these = {name for name, made_by in origin.items() if made_by and scope in made_by}
    while more := {
        name for name, of in users.items() if origin.get(name) is None and name not in these and of and of <= these
    }:
        these |= more
    return these


def traced(call: Callable[[], Any], module: str, these: set[str], calls: int) -> list[tuple[float, float]]:
    """Seconds in `these` operations of a program and in its others, of each call but the first, by the profiler."""
    jax.block_until_ready(call())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(calls):
                jax.block_until_ready(call())
        (trace,) = Path(folder).rglob("*.xplane.pb")
        runs: dict[Any, list[tuple[float, float, bool]]] = {}
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            for event in (event for line in plane.lines for event in line.events):
                said = dict(event.stats)
                if said.get("hlo_module") == module:
                    start, end = event.start_ns, event.start_ns + event.duration_ns
                    runs.setdefault(said["run_id"], []).append((start, end, said["hlo_op"] in these))
    in_order = sorted(runs.values(), key=min)
    return [shares(events) for events in in_order[1:]]


def shares(events: list[tuple[float, float, bool]]) -> tuple[float, float]:
    """Seconds of one run that belong to marked operations, and to others.

    events: start and end in nanoseconds, and whether it is marked. An operation has the time until the next one starts,
    so that what a loop takes between its operations counts as theirs.
    """
    events = sorted(events)
    ends = [start for start, *_ in events[1:]] + [max(end for _, end, _ in events)]
    taken = {True: 0.0, False: 0.0}
    for (start, _, marked), end in zip(events, ends, strict=True):
        taken[marked] += (end - start) * 1e-9
    return taken[True], taken[False]


def sampling(vocabulary: int = 129280, batch: int = 8) -> dict[str, Any]:
    """Drawing from V3's vocabulary, beside the head's product alone at V3's width, a small part of a step."""
    logits, how = jax.random.normal(jax.random.key(0), (batch, vocabulary)) * 3, {}
    at = np.arange(batch, dtype=np.int32)
    for name, sampling in (
        ("greedy", Sampling(temperature=0)),
        ("temperature", Sampling(temperature=0.6)),
        ("top-p", Sampling(temperature=0.6, top_p=0.95)),
        ("top-k and top-p", Sampling(temperature=0.6, top_k=50, top_p=0.95)),
    ):
        draw = jax.jit(functools.partial(sample_rows, kind=kind([sampling])))
        how[name] = seconds(draw, logits, rows([sampling] * batch, range(batch)), at) * 1e3
    sort = seconds(jax.jit(functools.partial(jnp.sort, axis=-1)), logits) * 1e3
    x, head = jnp.ones((batch, 7168)), jnp.ones((7168, vocabulary), jnp.bfloat16)
    product = seconds(jax.jit(lambda x, w: x.astype(jnp.bfloat16) @ w), x, head) * 1e3
    return {"batch": batch, "vocabulary": vocabulary, "ms": how, "a sort": sort, "the head's product": product}


def against_transformers(
    model: Any, variables: Any, prompts: list[list[int]], hf: Path, python: Path, out: Path, batch: int = 16
) -> dict[str, Any]:
    """Greedy tokens per second at batch 16, and how many of the tokens are the same."""
    engine = Engine(model, variables, EngineConfig(max_batch=batch, max_length=256))
    took = timed(engine, prompts[:batch])
    ours = list(engine.generate(prompts[:batch], GREEDY, max_new_tokens=NEW))
    engine.close()
    (out / "prompts.json").write_text(json.dumps([prompts[:batch], NEW]))
    command = [str(python), "-c", REFERENCE, str(hf), str(out / "prompts.json"), str(os.cpu_count())]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    rate = {"dsv3_jax": batch * NEW / took, "transformers": batch * NEW / said["seconds"]}
    same = float(np.mean(np.array(ours) == np.array(said["tokens"])))
    return {
        "versions": said["versions"], "tokens per second": rate, "times": said["seconds"] / took, "same tokens": same
    }  # fmt: skip


def main(
    run: tyro.conf.Positional[Path], hf: Path | None = None, reference_python: Path | None = None,
    out: Path = Path("runs/bench_serving"), parts: str = "",
) -> None:  # fmt: skip
    """Measures.

    Args:
      run: a training run with an MTP module.
      hf: the same, converted to Hugging Face's layout.
      reference_python: the Python of an environment with torch and transformers.
      out: folder of results.json, which is added to.
      parts: of acceptance, speculative, speculative_sampled, together, long_caches, sampling, transformers,
        separated by commas; by default all.
    """
    out.mkdir(parents=True, exist_ok=True)
    model, variables = load_pretrained(run)
    texts = held_out(run, 32)
    prompts = [text[:PROMPT] for text in texts]
    todo: dict[str, Callable[[], dict[str, Any]]] = {
        "acceptance": lambda: acceptance(model, variables, prompts, texts),
        "speculative": lambda: speculative(model, variables, prompts, GREEDY),
        "speculative_sampled": lambda: speculative(model, variables, prompts, SAMPLED),
        "together": lambda: together(model, variables, prompts),
        "long_caches": lambda: long_caches(model.config),
        "sampling": sampling,
    }
    if hf is not None and reference_python is not None:
        todo["transformers"] = lambda: against_transformers(model, variables, prompts, hf, reference_python, out)
    path = out / "results.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "cores": os.cpu_count()}
    wanted = parts.split(",") if parts else list(todo)
    if unknown := set(wanted) - set(todo):
        raise SystemExit(f"no part {min(unknown)!r}: there are {', '.join(todo)}; transformers needs --hf")
    for name in wanted:
        record[name] = todo[name]() | {"load before": os.getloadavg()[0]}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(name, json.dumps(record[name], indent=1), flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
