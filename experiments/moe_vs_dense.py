"""MoE against dense at equal activated FLOPs: the tokens that each needs for the same loss.

    python -m experiments.moe_vs_dense

Both train for several numbers of steps, each run with its whole schedule, so that every loss is that of a finished run.
A power law of the tokens is fitted to the dense model's losses; the multiplier of a run of the sparse model is the
tokens at which the dense one would have its loss, over its own. `experiments.dense_vs_moe` compares one longer run.
"""

from __future__ import annotations

import dataclasses
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
    SmallRun,
    circumstances,
    circumstances_line,
    once,
    pretrain,
    table,
    write_results,
)

NAME = "moe-vs-dense"
MOE = dataclasses.replace(SMALL, num_nextn_predict_layers=0)
MODELS: dict[str, ModelConfig] = {"MoE": MOE, "dense": dense_twin(MOE)}


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
        for name in MODELS
    )
    return (
        f"# MoE against dense at equal activated FLOPs\n\n{circumstances_line(results)}\n\n{sizes}.\n\n"
        f"{table(['tokens', 'MoE, validation loss (nats per byte)', 'dense', 'multiplier'], rows)}\n\n"
        f"The dense model's losses are fitted by {c:.3f} · tokens^-{b:.4f}. With the most tokens, the dense model "
        f"would need {found[-1]:.2f} times as many for the sparse model's loss. One seed.\n\n"
        "![loss against tokens](moe-vs-dense.png)\n"
    )


def plot(results: Results, path: Path) -> None:
    """Draws the losses against tokens, and the fit."""
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for name in MODELS:
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


def main(steps: tuple[int, ...] = (60, 120, 240), pieces: Path = Path("runs/moe_vs_dense")) -> None:
    """Trains both for each number of steps and writes the report.

    Args:
      steps: optimizer steps of the runs, of 2048 tokens.
      pieces: where finished runs are kept: they aren't done again.
    """
    runs: list[dict[str, Any]] = []
    for count in steps:
        for name, model in MODELS.items():
            run, said = SmallRun(model, count), f"{name}-{count}"
            records = once(pieces / f"{said}.json", lambda r=run, n=said: pretrain(r, name=n)[1])
            runs.append({"model": name, "tokens": run.tokens, "records": records})
    results = {
        "circumstances": circumstances(f"python -m experiments.moe_vs_dense --steps {' '.join(map(str, steps))}"),
        "parameters": {name: parameters(model) for name, model in MODELS.items()},
        "flops": {name: float(model_flops(model, SmallRun().length).total) for name, model in MODELS.items()},
        "runs": runs,
    }
    write_results(NAME, results, render, plot)


if __name__ == "__main__":
    tyro.cli(main)
