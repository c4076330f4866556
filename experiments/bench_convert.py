"""Memory and speed of checkpoint conversion at several sizes, beside a plain copy of the same files.

    python -m experiments.bench_convert --sizes 1 4 16

Makes FP8 checkpoints with DeepSeek-V3's names and true matrix sizes (more or fewer experts and layers give the size),
then, each in a process of its own: copies the files, converts them to orbax (every number kept), converts them back.
Writes docs/results/convert.md and convert.json. Needs three times the largest size of disk under --work, for a while.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import shutil
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

_LARGE = 8
"""GB above which a step runs once."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure the conversion of checkpoints of several sizes."""

    sizes: tuple[float, ...] = (1.0, 4.0, 16.0)
    """GB of each checkpoint, about."""
    work: Path = Path(tempfile.gettempdir())
    """Where the checkpoints are made, on the disk to be measured."""
    repeats: int = 3
    """Times that each step is measured, up to 8 GB; the fastest counts: noise of other work only adds."""
    workers: int = 4
    rest: float = 15.0
    """Seconds before each step: a cloud disk's burst of speed has to recover, or the first step gets all of it."""
    results: Path = ROOT / "docs" / "results"


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
        source, kept, copied, store, back = (Path(scratch) / n for n in ("source", "kept", "copied", "store", "back"))
        config = config_of(gigabytes)
        write_random_checkpoint(source, config)
        size = sum(f.stat().st_size for f in source.iterdir())
        largest = max(math.prod(s) * (1 if len(s) > 1 else 4) for s in names.tensor_shapes(config).values())
        result: dict[str, Any] = {"bytes": size, "experts": config.n_routed_experts, "largest_tensor": largest}
        steps = {
            "copy": (lambda: copy(source, copied), source, copied),
            "import": (lambda: convert(source, store, args.workers), source, store),
            "export": (lambda: convert(kept, back, args.workers), kept, back),
        }
        convert(source, kept, args.workers)
        order = list(steps)
        for _ in range(args.repeats if gigabytes <= _LARGE else 1):
            for step in order:
                do, reads, made = steps[step]
                forget(reads)
                time.sleep(args.rest)
                _keep_best(result, step, do())
                shutil.rmtree(made)
            order = order[1:] + order[:1]
        for step in ("copy", "import", "export"):
            result[step]["gb_per_s"] = size / 1e9 / result[step]["seconds"]
            result[step]["of_copy"] = result["copy"]["seconds"] / result[step]["seconds"]
        return result


def _keep_best(result: dict[str, Any], step: str, measured: dict[str, float]) -> None:
    """The shortest times and the largest memory of the repeats."""
    print(f"{result['bytes'] / 1e9:.2f} GB {step}: {measured}", flush=True)
    best = result.setdefault(step, dict(measured))
    for key, value in measured.items():
        best[key] = max(best[key], value) if key == "peak_bytes" else min(best[key], value)


def report(results: dict[str, dict[str, Any]], args: Args) -> str:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    machine = f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"
    start = max(r["import"]["start_seconds"] for r in results.values())
    lines = [
        "# Conversion: memory and speed",
        "",
        f"{datetime.date.today().isoformat()}, `python -m experiments.bench_convert` on {machine},",
        f"{args.workers} workers, jax {jax.__version__}. Random FP8 checkpoints with DeepSeek-V3's matrix sizes. A",
        "step's files start out of the system's cache, and its time ends when everything is on the disk; it doesn't",
        f"count the start of Python and JAX, which took up to {start:.1f} s. Memory is the peak resident set.",
        "",
        f"Up to {_LARGE} GB each step ran {args.repeats} times in rotating order, {args.rest:g} s apart, as the disk",
        "is fast for a few GB and then slow until it has rested: the shortest time, the largest memory. A larger",
        "checkpoint ran once.",
        "",
        "| checkpoint | step | seconds | GB/s | of the copy's speed | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for r in results.values():
        for step, what in (("copy", "cp -r"), ("import", "to orbax"), ("export", "back")):
            s = r[step]
            of = "" if step == "copy" else f"{s['of_copy']:.0%}"
            memory = "" if step == "copy" else f"{s['peak_bytes'] / 2**20:,.0f} MiB"
            size = f"{r['bytes'] / 1e9:.2f} GB"
            lines.append(f"| {size} | {what} | {s['seconds']:.1f} | {s['gb_per_s']:.2f} | {of} | {memory} |")
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
