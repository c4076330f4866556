"""Memory and speed of checkpoint conversion at several sizes, beside a plain copy of the same files.

    python experiments/bench_convert.py --sizes 1 4 16

Makes FP8 checkpoints with DeepSeek-V3's names and true matrix sizes (more or fewer experts and layers give the size),
then, each in a process of its own: copies the files, converts them to orbax (every number kept), converts them back.
Writes docs/results/convert.md and convert.json. Needs four times the largest size of disk under --work, for a while.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
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
    """Times that each step is measured; the fastest counts. A step's noise on a shared machine only adds."""
    workers: int = 4
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


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds until a process has ended and what it wrote is on the disk, and its peak resident bytes."""
    peak = 0
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    watched = psutil.Process(process.pid)

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                peak = max(peak, watched.memory_info().rss)
            except psutil.Error:
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    code = process.wait()
    os.sync()
    seconds = time.perf_counter() - start
    thread.join()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}")
    return seconds, peak


def forget(directory: Path) -> None:
    """Asks the system to drop a directory's files from its cache, so that each step reads from the disk."""
    os.sync()
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_size(gigabytes: float, args: Args) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.work, prefix="bench-convert-") as scratch:
        source, copy, store, back = (Path(scratch) / n for n in ("source", "copy", "store", "back"))
        config = config_of(gigabytes)
        write_random_checkpoint(source, config)
        size = sum(f.stat().st_size for f in source.iterdir())
        largest = max(math.prod(s) * (1 if len(s) > 1 else 4) for s in names.tensor_shapes(config).values())
        convert = [sys.executable, "-m", "dsv3_jax.checkpoint.convert", "--workers", str(args.workers)]
        result: dict[str, Any] = {"bytes": size, "experts": config.n_routed_experts, "largest_tensor": largest}
        result["start_seconds"] = measure([sys.executable, "-c", "import dsv3_jax.checkpoint.convert"])[0]
        steps = {
            "copy": (["cp", "-r", str(source), str(copy)], source, copy),
            "import": ([*convert, str(source), str(store)], source, store),
            "export": ([*convert, str(store), str(back)], store, back),
        }
        for repeat in range(args.repeats):
            for name, (command, reads, made) in steps.items():
                forget(reads)
                seconds, peak = measure(command)
                best = result.setdefault(name, {"seconds": seconds, "peak_bytes": peak})
                best["seconds"], best["peak_bytes"] = min(best["seconds"], seconds), max(best["peak_bytes"], peak)
                print(f"{gigabytes:g} GB {name}: {seconds:.1f} s, {peak / 2**20:.0f} MiB", flush=True)
                if name == "copy":
                    shutil.rmtree(made)
            if repeat < args.repeats - 1:
                shutil.rmtree(store)
                shutil.rmtree(back)
        for name in steps:
            result[name]["gb_per_s"] = size / 1e9 / result[name]["seconds"]
        for name in ("import", "export"):
            working = result[name]["seconds"] - result["start_seconds"]
            result[name]["of_copy"] = result["copy"]["seconds"] / working
        return result


def report(results: dict[str, dict[str, Any]], args: Args) -> str:
    start = max(r["start_seconds"] for r in results.values())
    machine = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.system()}"
    lines = [
        "# Conversion: memory and speed",
        "",
        f"Made by `python experiments/bench_convert.py` on {machine}, {args.workers} workers. Random FP8",
        "checkpoints with DeepSeek-V3's matrix sizes. A step's time runs from the start of its process until",
        "everything is on the disk; its files start out of the cache. The copy's speed is compared with the time",
        f"after Python and JAX were imported, which takes {start:.1f} s here.",
        "Memory is the process's peak resident set.",
        f"Each step ran {args.repeats} times in turn with the others: the shortest time and the largest memory.",
        "",
        "| checkpoint | step | seconds | GB/s | of the copy's speed | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for r in results.values():
        for step in ("copy", "import", "export"):
            s = r[step]
            of = f"{s['of_copy']:.0%}" if "of_copy" in s else ""
            what = {"copy": "cp -r", "import": "to orbax", "export": "back"}[step]
            size, memory = f"{r['bytes'] / 1e9:.2f} GB", f"{s['peak_bytes'] / 2**20:,.0f} MiB"
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
