"""Multi-token prediction on and off: the main model's loss, acceptance of drafts, and what decoding gains by them.

    python -m experiments.mtp [--size gpu]

The report's section 4.5.1 (does MTP help the model itself?) and 5.4.3 (acceptance of the second token, 85 to 90 %; 1.8
times the tokens per second). The two models differ in the MTP module alone and see the same tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro

from dsv3_jax.data import load_tokenizer, validation_batches
from dsv3_jax.inference.engine import Engine, EngineConfig
from dsv3_jax.model.transformer import DeepSeekV3
from experiments.small_run import (
    SMALL,
    Results,
    Size,
    SmallRun,
    circumstances,
    circumstances_line,
    compute_pieces,
    pretrain,
    result_name,
    table,
    write_results,
)

NAME = "mtp"
TEXTS, PROMPT, NEW = 16, 64, 128
"""Texts that are continued, the tokens of each prompt, and those that follow."""


def decode(model: DeepSeekV3, variables: Any, prompts: list[list[int]], drafts: int) -> dict[str, float]:
    """Greedy continuation of each prompt by itself: seconds, steps, and the share of drafts that were accepted."""
    engine = Engine(model, variables, EngineConfig(max_batch=1, max_length=PROMPT + NEW, drafts=drafts), end_ids=())
    try:
        list(engine.generate(prompts[:1], max_new_tokens=NEW))  # compiles
        before, began = engine.stats(), time.monotonic()
        for prompt in prompts:
            list(engine.generate([prompt], max_new_tokens=NEW))
        seconds, after = time.monotonic() - began, engine.stats()
    finally:
        engine.close()
    drafted = after.draft_tokens - before.draft_tokens
    return {
        "seconds": seconds,
        "steps": after.steps - before.steps,
        "tokens": after.tokens - before.tokens,
        "acceptance": (after.accepted_tokens - before.accepted_tokens) / drafted if drafted else 0.0,
    }


def compute(on: bool, base: SmallRun, seed: int) -> dict[str, Any]:
    """Trains with or without the module; with it, also decodes with and without drafts."""
    model = dataclasses.replace(base.model, num_nextn_predict_layers=int(on))
    run = dataclasses.replace(base, model=model, seed=seed)
    state, records = pretrain(run, name=f"mtp {'on' if on else 'off'} {seed}")
    found: dict[str, Any] = {"on": on, "seed": seed, "records": records}
    if on:
        batch = validation_batches(dataclasses.replace(run.data, seed=0), load_tokenizer(None), TEXTS, 1)[0]
        prompts = [row[:PROMPT].tolist() for row in np.asarray(batch["tokens"])]
        found["decoding"] = {
            str(n): decode(DeepSeekV3(model, run.runtime), state.variables, prompts, n) for n in (0, 1)
        }
    return found


def render(results: Results) -> str:
    """The report in Markdown."""
    losses = {
        on: [r["records"][-1]["validation_loss"] for r in results["runs"] if r["on"] == on] for on in (True, False)
    }
    gaps = [a - b for a, b in zip(losses[True], losses[False], strict=True)]
    decoded = [r["decoding"] for r in results["runs"] if r["on"]]
    acceptance = float(np.mean([d["1"]["acceptance"] for d in decoded]))
    speed = float(np.mean([d["0"]["seconds"] / d["1"]["seconds"] for d in decoded]))
    per_step = float(np.mean([d["1"]["tokens"] / d["1"]["steps"] for d in decoded]))
    rows = [[("off", "on")[on], *(f"{x:.4f}" for x in losses[on])] for on in (False, True)]
    seeds = [f"validation loss, seed {r['seed']}" for r in results["runs"] if r["on"]]
    return (
        f"# Multi-token prediction on and off\n\n{circumstances_line(results)}\n\n"
        f"{results['tokens']:,} tokens each.\n\n"
        f"{table(['MTP', *seeds], rows)}\n\n"
        f"With MTP the main model's loss is {np.mean(gaps):+.4f} nats per byte from that without. Greedy decoding of "
        f"held-out texts accepts {100 * acceptance:.1f} % of the drafts, {per_step:.2f} tokens per step; one text at a "
        f"time, it takes {speed:.2f} times less time than without drafts.\n\n![training loss]({results['name']}.png)\n"
    )


def plot(results: Results, path: Path) -> None:
    """Draws the main model's training loss with and without."""
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for r in results["runs"]:
        points = [(x["step"], x["loss"]) for x in r["records"]]
        label = f"MTP {('off', 'on')[r['on']]}, seed {r['seed']}"
        axes.plot(*zip(*points, strict=True), label=label, color=("C0", "C1")[r["on"]])
    axes.set(xlabel="step", ylabel="training loss of the next token (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    size: Size = "cpu",
    steps: int | None = None,
    seeds: int = 1,
    workers: int = 1,
    pieces: Path = Path("runs/mtp"),
) -> None:
    """Trains with and without MTP, decodes, and writes the report.

    Args:
      size: cpu, 2,048 tokens per step; gpu, a model of 16 times the parameters per layer and 32,768 tokens.
      steps: optimizer steps of a run; by default 400 on a CPU, 600 on a GPU.
      seeds: runs of each.
      workers: runs at a time, each on its share of the cores.
      pieces: where finished runs are kept: they aren't done again.
    """
    base, name = SmallRun.of(size, SMALL, steps), result_name(NAME, size)
    files = {
        pieces / f"{'on' if on else 'off'}-{seed}-{size}-{base.steps}.json": functools.partial(compute, on, base, seed)
        for seed in range(seeds)
        for on in (False, True)
    }
    command = f"python -m experiments.mtp --size {size} --steps {base.steps} --seeds {seeds} --workers {workers}"
    runs = compute_pieces(files, workers)
    results = {"name": name, "circumstances": circumstances(command), "tokens": base.tokens, "runs": runs}
    write_results(name, results, render, plot)


if __name__ == "__main__":
    tyro.cli(main)
