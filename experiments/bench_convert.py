"""Memory and speed of checkpoint conversion at several sizes, beside a plain copy of the same files.

    python -m experiments.bench_convert --sizes 1 4 16

Makes FP8 checkpoints with DeepSeek-V3's names and true matrix sizes (more or fewer experts and layers give the size),
then converts them to orbax (every number kept) and back, each in a process of its own, in turn with a plain copy of
what it reads. Then loads the converted one, and a training run's checkpoint of the same size, with and without checking
hashes. Writes docs/results/convert.md and convert.json. Needs twice the largest size of disk under --work.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dsv3_jax.checkpoint import names  # noqa: E402
from dsv3_jax.checkpoint.synthetic import write_random_checkpoint  # noqa: E402
from dsv3_jax.config import ModelConfig  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure the conversion of checkpoints of several sizes."""

    sizes: tuple[float, ...] = (1.0, 4.0, 16.0)
    """GB of each checkpoint, about."""
    work: Path = Path(tempfile.gettempdir())
    """Where the checkpoints are made, on the disk to be measured."""
    repeats: int = 3
    """Pairs of a copy and a conversion, each direction."""
    workers: int = 4
    rest: float = 15.0
    """Seconds before each step, so that none gains from what the one before left: a disk's burst, memory at hand."""
    results: Path = ROOT / "docs" / "results"


_LARGEST_LOADED = 4.0
"""GB: a larger one isn't loaded, which takes twice as much memory in bfloat16."""


def config_of(gigabytes: float) -> ModelConfig:
    """DeepSeek-V3's widths with as many layers and experts as make the size, and a small vocabulary."""
    base = ModelConfig.preset("v3-671b")
    dense, moe = (0, 1) if gigabytes < 2 else (1, 2)
    make = lambda experts: dataclasses.replace(
        base,
        vocab_size=4096,
        num_hidden_layers=dense + moe,
        first_k_dense_replace=dense,
        num_nextn_predict_layers=0,
        n_routed_experts=experts,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
    )
    fixed, one = (sum(math.prod(s) for s in names.tensor_shapes(make(e)).values()) for e in (1, 2))
    return make(max(1, round((gigabytes * 1e9 - fixed) / (one - fixed))))


_CHILD = """
import os, sys, time
from pathlib import Path
from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command
start = time.perf_counter()
convert_command(ConvertArgs(sys.argv[1], Path(sys.argv[2]), workers=int(sys.argv[3])))
os.sync()
seconds = time.perf_counter() - start
status = Path("/proc/self/status").read_text()  # Linux: the peak of this very program
print(seconds, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


_LOAD = """
import sys, time
from pathlib import Path
import jax
from dsv3_jax import load_pretrained
from dsv3_jax.checkpoint.jobs import keep_freed_memory
keep_freed_memory()
start, used = time.perf_counter(), time.process_time()
jax.block_until_ready(load_pretrained(sys.argv[1], dtype="bfloat16", check_hashes=sys.argv[2] == "True"))
print(time.perf_counter() - start, time.process_time() - used)
"""

_RUN = """
import dataclasses, json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from dsv3_jax import load_pretrained
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.step import TrainState
model, variables = load_pretrained(sys.argv[1], dtype="bfloat16")
state = TrainState(jnp.int32(1), variables["params"], variables["router"], {}, jax.random.key(0))
checkpoints = Checkpoints(Path(sys.argv[2]) / "checkpoints", keep=1)
checkpoints.save(state, {})
checkpoints.wait()
checkpoints.close()
(Path(sys.argv[2]) / "config.json").write_text(json.dumps({"model": dataclasses.asdict(model.config)}))
"""


def python(script: str, *arguments: object) -> list[float]:
    """Runs a script in a process of its own; the numbers on its last line."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
    return [float(n) for n in (done.stdout.split("\n")[-2].split() if done.stdout else [])]


def readings(directory: Path, args: Args) -> list[dict[str, Any]]:
    """Loads a checkpoint with and without checking hashes in turn, out of the system's cache and from it."""
    measured: list[dict[str, Any]] = []
    for i in range(args.repeats):
        for cached in (False, True):
            pair: dict[str, Any] = {"cached": cached}
            for check in (True, False) if i % 2 == 0 else (False, True):
                if not cached:
                    forget(directory)
                    time.sleep(args.rest)
                seconds, used = python(_LOAD, directory, check)
                pair["checked" if check else "unchecked"] = {"seconds": seconds, "cpu_seconds": used}
            print(f"{directory.name}: {pair}", flush=True)
            measured.append(pair)
    return measured


def copy(source: Path, target: Path) -> dict[str, float]:
    """Seconds of a plain copy until it is on the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    os.sync()
    return {"seconds": time.perf_counter() - start}


def convert(source: Path, target: Path, workers: int) -> dict[str, float]:
    """Seconds of a conversion until it is on the disk, those of its process before that, its peak resident bytes."""
    start = time.perf_counter()
    command = [sys.executable, "-c", _CHILD, str(source), str(target), str(workers)]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak = map(float, done.stdout.split()[-2:])
    return {"seconds": seconds, "start_seconds": time.perf_counter() - start - seconds, "peak_bytes": peak}


def forget(directory: Path) -> None:
    """Asks the system to drop a directory's files from its cache, so that each step reads from the disk."""
    os.sync()
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_size(gigabytes: float, args: Args) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.work, prefix="bench-convert-") as scratch:
        source, store, back, copied = (Path(scratch) / n for n in ("source", "store", "back", "copied"))
        config = config_of(gigabytes)
        write_random_checkpoint(source, config)
        size = sum(f.stat().st_size for f in source.iterdir())
        largest = max(math.prod(s) * (1 if len(s) > 1 else 4) for s in names.tensor_shapes(config).values())
        result: dict[str, Any] = {"bytes": size, "experts": config.n_routed_experts, "largest_tensor": largest}
        result["import"] = pairs(source, store, copied, args)
        shutil.rmtree(source)
        result["export"] = pairs(store, back, copied, args)
        shutil.rmtree(back)
        if gigabytes <= _LARGEST_LOADED:
            result["load"] = readings(store, args)
            (run := Path(scratch) / "run").mkdir()
            python(_RUN, store, run)
            result["load run"] = readings(run, args)
        return result


def pairs(reads: Path, made: Path, copied: Path, args: Args) -> list[dict[str, Any]]:
    """Copies and converts the same files in turn, each first every other time. The last conversion stays."""
    measured: list[dict[str, Any]] = []
    steps = {
        "copy": (lambda: copy(reads, copied), copied),
        "convert": (lambda: convert(reads, made, args.workers), made),
    }
    for i in range(args.repeats):
        pair = {}
        for step in ("copy", "convert") if i % 2 == 0 else ("convert", "copy"):
            do, writes = steps[step]
            forget(reads)
            time.sleep(args.rest)
            pair[step] = do()
            if writes == copied or i < args.repeats - 1:
                shutil.rmtree(writes)
        print(f"{reads.name}: {pair}", flush=True)
        measured.append(pair)
    return measured


def report(results: dict[str, dict[str, Any]], args: Args) -> str:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    machine = f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"
    start = max(p["convert"]["start_seconds"] for r in results.values() for s in ("import", "export") for p in r[s])
    lines = [
        "# Conversion: memory and speed",
        "",
        f"{datetime.date.today().isoformat()}, `python -m experiments.bench_convert` on {machine},",
        f"{args.workers} workers, jax {jax.__version__}. Random FP8 checkpoints with DeepSeek-V3's matrix sizes.",
        "",
        f"Each row is {args.repeats} pairs: `cp -r` of the files that the conversion reads, and the conversion,",
        f"{args.rest:g} s apart, in changing order. Files start out of the system's cache, a time ends when all is on",
        f"the disk; it doesn't count the start of Python and JAX, up to {start:.1f} s. Seconds are medians. The speed",
        "beside the copy's is the median of the pairs, then that of the slowest and of the fastest pair. Memory is the",
        "largest resident set of all.",
        "",
        "| checkpoint | direction | cp -r, s | convert, s | GB/s | of the copy's speed | pairs | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results.values():
        for step, what in (("import", "to orbax"), ("export", "back")):
            copied, took = ([p[s]["seconds"] for p in r[step]] for s in ("copy", "convert"))
            ratios = [c / t for c, t in zip(copied, took, strict=True)]
            seconds, gigabytes = statistics.median(took), r["bytes"] / 1e9
            peak = max(p["convert"]["peak_bytes"] for p in r[step])
            lines.append(
                f"| {gigabytes:.2f} GB | {what} | {statistics.median(copied):.1f} | {seconds:.1f} "
                f"| {gigabytes / seconds:.2f} | {statistics.median(ratios):.0%} "
                f"| {min(ratios):.0%} to {max(ratios):.0%} | {peak / 2**20:,.0f} MiB |"
            )
    loaded = {r["bytes"]: r for r in results.values() if "load" in r}
    if loaded:
        lines += [
            "",
            "## Reading with hashes checked and without",
            "",
            "`load_pretrained` in bfloat16, with the check and without it in changing order, each in its own process:",
            f"{args.repeats} pairs each. Seconds are medians; the cost is the median of the pairs, then the least and",
            "the greatest. CPU time is that of the whole process.",
            "",
            "| checkpoint | files | unchecked, s | checked, s | cost | pairs | cost in CPU time |",
            "|---|---|---|---|---|---|---|",
        ]
    for size, r in loaded.items():
        for step, what in (("load", "converted"), ("load run", "run")):
            for cached, where in ((False, "from the disk"), (True, "cached")):
                of = [p for p in r[step] if p["cached"] == cached]
                cost = lambda unit, of=of: [p["checked"][unit] / p["unchecked"][unit] - 1 for p in of]
                median = lambda kind, of=of: statistics.median(p[kind]["seconds"] for p in of)
                costs = cost("seconds")
                lines.append(
                    f"| {what}, of {size / 1e9:.2f} GB | {where} | {median('unchecked'):.2f} | {median('checked'):.2f} "
                    f"| {statistics.median(costs):+.0%} | {min(costs):+.0%} to {max(costs):+.0%} "
                    f"| {statistics.median(cost('cpu_seconds')):+.0%} |"
                )
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    results: dict[str, dict[str, Any]] = {}
    for size in args.sizes:
        results[f"{size:g}"] = one_size(size, args)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "convert.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.results / "convert.md").write_text(report(results, args))
    print(report(results, args))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
