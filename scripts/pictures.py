"""Draws the README's pictures, `docs/pictures/*.png`, from docs/results: `python -m scripts.pictures`.

`--run runs/tiny` first takes the losses of a run of `make train` over into `docs/results/make-train.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jax
import matplotlib
import matplotlib.pyplot as plt

from dsv3_jax.training.directory import METRICS
from dsv3_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
RESULTS, PICTURES = ROOT / "docs/results", ROOT / "docs/pictures"
LOSSES = {"loss": "training", "validation_loss": "validation", "mtp_loss": "training, one token further (MTP)"}

DEFAULT = "gpu"
CASES = {
    "mla_decode B=128 T=1 S=4096 H=128": "decode, 128 sequences of 4,096",
    "mla_decode B=128 T=1 S=32768 H=128": "decode, 128 of 32,768",
    "mla_decode B=128 T=2 S=32768 H=128": "decode, 128 of 32,768, two tokens",
    "mla_decode B=1 T=1 S=65536 H=128": "decode, one of 65,536",
    "mla_prefill T=4096 H=128 forward": "prefill of 4,096 (tokamax)",
    "mla_prefill T=16384 H=128 forward": "prefill of 16,384 (tokamax)",
    "mla_prefill T=16384 H=128 forward and backward": "the same, with gradients (cuDNN)",
    "grouped matmul M=32768 E=32 7168x4096": "experts, 32,768 rows, 7168 x 4096",
    "grouped matmul M=32768 E=32 7168x4096 backward": "the same, gradients",
    "few rows, V3, 64 experts B=128 M=1024, 64 experts touched, gate": "experts, 1,024 rows",
    "few rows, V3, 64 experts B=1 M=8, 8 experts touched, gate": "experts, 8 rows",
}
"""Rows of the tables of kernels-h100.md, and how the picture calls them."""


def record(run: Path) -> None:
    """Writes the losses of a run, with date and hardware."""
    records = read_metrics(run / METRICS)
    curves = {name: [[r["step"], r[name]] for r in records if name in r] for name in LOSSES}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    where = {"date": f"{datetime.date.today()}", "hardware": f"{os.cpu_count()} CPU cores", "jax": jax.__version__}
    content = {"command": "make train", **where, "commit": commit.strip(), "curves": curves}
    (RESULTS / "make-train.json").write_text(json.dumps(content) + "\n")


def kernel_rows(text: str) -> dict[tuple[str, str], float]:
    """By case and implementation the percentage of the floor, of the tables of a report."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > 5 and re.fullmatch(r"[\d.]+", cells[5]):
            found[cells[0], cells[1]] = float(cells[5])
    return found


def draw_loss(content: dict[str, Any]) -> Any:
    """The losses of a run against its steps."""
    figure, axes = plt.subplots(figsize=(7, 3.6), constrained_layout=True)
    for name, label in LOSSES.items():
        steps, values = zip(*content["curves"][name], strict=True)
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "ls": "--"} if name == "validation_loss" else {}
        axes.plot(steps, values, label=label, **style)
    axes.set(xlabel="step", ylabel="nats per byte", title=f"make train ({content['hardware']}, {content['date']})")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def draw_kernels(rows: dict[tuple[str, str], float]) -> Any:
    """Bars of what is picked by default beside the fastest of the others that were timed."""
    figure, axes = plt.subplots(figsize=(7, 5), constrained_layout=True)
    for i, (case, label) in enumerate(reversed(CASES.items())):
        ours = rows[case, DEFAULT]
        others = [(share, name) for (c, name), share in rows.items() if c == case and not _own(name)]
        axes.barh(i + 0.2, ours, 0.36, color="C0", label="`gpu`, the default" if i == 0 else None)
        axes.text(ours + 1, i + 0.2, f"{ours:.0f}%", va="center", fontsize=7)
        if others:
            share, name = max(others)
            axes.barh(i - 0.2, share, 0.36, color="C7", label="fastest other implementation" if i == 0 else None)
            axes.text(share + 1, i - 0.2, f"{share:.0f}% {name}", va="center", fontsize=7)
        axes.text(-1, i, label, ha="right", va="center", fontsize=8)
    axes.set(xlim=(0, 125), yticks=[], xlabel="% of the floor: bytes at the copy rate or operations at the matmul rate")
    axes.set_title("Kernels on an H100, bfloat16", fontsize=10)
    axes.axvline(100, color="k", lw=0.8, ls=":")
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    return figure


def _own(name: str) -> bool:
    return name.startswith((DEFAULT, "fp8 gpu", "gpu_and_plan", "blockwise"))


def draw(folder: Path) -> None:
    """Writes the kernels' picture, and the losses' if a run was taken over."""
    matplotlib.use("Agg")
    folder.mkdir(exist_ok=True)
    figures = {"kernels": draw_kernels(kernel_rows((RESULTS / "kernels-h100.md").read_text()))}
    if (losses := RESULTS / "make-train.json").exists():
        figures["loss"] = draw_loss(json.loads(losses.read_text()))
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)


def main() -> None:
    """Draws, after taking a run over if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    arguments = parser.parse_args()
    if arguments.run:
        if not (arguments.run / METRICS).exists():
            parser.error(f"{arguments.run} holds no run: it has no {METRICS}")
        record(arguments.run)
    draw(PICTURES)


if __name__ == "__main__":
    main()
