"""MoE against dense at equal activated FLOPs: the tokens that each needs for the same loss.

    python -m experiments.moe_vs_dense [--size gpu]

Both train for several numbers of steps, each run with its whole schedule, so that every loss is that of a finished run.
A power law of the tokens is fitted to the dense model's losses; the multiplier of a run of the sparse model is the
tokens at which the dense one would have its loss, over its own. `experiments.dense_vs_moe` compares one longer run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro

from dsv3_jax.accounting.flops import model_flops
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.transformer import DeepSeekV3
from experiments.dense_vs_moe import dense_twin
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

NAME = "moe-vs-dense"
MOE = dataclasses.replace(SMALL, num_nextn_predict_layers=0)
NAMES = ("MoE", "dense")


def model_of(name: str, size: Size) -> SmallRun:
    """The run of a model, of one step."""
    moe = SmallRun.of(size, MOE, 1)
    return moe if name == "MoE" else dataclasses.replace(moe, model=dense_twin(moe.model))


def fit(tokens: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """c and b of loss = c tokens^-b, by least squares of the logarithms."""
    slope, intercept = np.polyfit(np.log(tokens), np.log(losses), 1)
    return float(np.exp(intercept)), float(-slope)


def points(results: Results, name: str) -> tuple[list[float], list[float]]:
    """Tokens and validation losses of a model's runs."""
    mine = [r for r in results["runs"] if r["model"] == name]
    return [r["tokens"] for r in mine], [r["records"][-1]["validation_loss"] for r in mine]


def multipliers(results: Results) -> list[float]:
    """Per run of the sparse model, the dense model's tokens for its loss over its own."""
    c, b = fit(*points(results, "dense"))
    return [(c / loss) ** (1 / b) / tokens for tokens, loss in zip(*points(results, "MoE"), strict=True)]


def render(results: Results) -> str:
    """The report in Markdown."""
    (tokens, sparse), (_, dense) = points(results, "MoE"), points(results, "dense")
    found, (c, b) = multipliers(results), fit(*points(results, "dense"))
    rows = [
        [f"{t:,.0f}", f"{s:.4f}", f"{d:.4f}", f"{m:.2f}"]
        for t, s, d, m in zip(tokens, sparse, dense, found, strict=True)
    ]
    sizes = "; ".join(
        f"{name}: {results['parameters'][name]:,} parameters, {results['flops'][name]:,.0f} training FLOPs per token"
        for name in NAMES
    )
    return (
        f"# MoE against dense at equal activated FLOPs\n\n{circumstances_line(results)}\n\n{sizes}.\n\n"
        f"{table(['tokens', 'MoE, validation loss (nats per byte)', 'dense', 'multiplier'], rows)}\n\n"
        f"The dense model's losses are fitted by {c:.3f} · tokens^-{b:.4f}. With the most tokens, the dense model "
        f"would need {found[-1]:.2f} times as many for the sparse model's loss. One seed.\n\n"
        f"![loss against tokens]({results['name']}.png)\n"
    )


def plot(results: Results, path: Path) -> None:
    """Draws the losses against tokens, and the fit."""
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for name in NAMES:
        axes.plot(*points(results, name), marker="o", label=name)
    tokens, _ = points(results, "dense")
    c, b = fit(*points(results, "dense"))
    axes.plot(tokens, c * np.array(tokens) ** -b, "--", label="fit of dense")
    axes.set(xlabel="tokens", ylabel="validation loss (nats per byte)", xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parameters(config: ModelConfig) -> int:
    """Parameters of a model."""
    tree = jax.eval_shape(DeepSeekV3(config).init, jax.random.key(0), jax.numpy.zeros((1, 1), jax.numpy.int32))
    return sum(x.size for x in jax.tree.leaves(tree))


def train(run: SmallRun, name: str) -> list[dict[str, Any]]:
    """Trains a model; returns its records."""
    return pretrain(run, name=name)[1]


def main(
    size: Size = "cpu",
    steps: tuple[int, ...] = (100, 200, 400),
    workers: int = 1,
    pieces: Path = Path("runs/moe_vs_dense"),
) -> None:
    """Trains both for each number of steps and writes the report.

    Args:
      size: cpu, 2,048 tokens per step; gpu, a model of 16 times the parameters per layer and 32,768 tokens.
      steps: optimizer steps of the runs.
      workers: runs at a time, each on its share of the cores.
      pieces: where finished runs are kept: they aren't done again.
    """
    models = {name: model_of(name, size) for name in NAMES}
    which = [(name, dataclasses.replace(models[name], steps=count)) for count in steps for name in NAMES]
    files = {
        pieces / f"{name}-{size}-{run.steps}.json": functools.partial(train, run, f"{name}-{run.steps}")
        for name, run in which
    }
    records, name = compute_pieces(files, workers), result_name(NAME, size)
    counts = " ".join(map(str, steps))
    results = {
        "name": name,
        "circumstances": circumstances(
            f"python -m experiments.moe_vs_dense --size {size} --steps {counts} --workers {workers}"
        ),
        "parameters": {name: parameters(run.model) for name, run in models.items()},
        "flops": {name: float(model_flops(run.model, run.length).total) for name, run in models.items()},
        "runs": [
            {"model": name, "tokens": run.tokens, "records": r} for (name, run), r in zip(which, records, strict=True)
        ],
    }
    write_results(name, results, render, plot)


if __name__ == "__main__":
    tyro.cli(main)
