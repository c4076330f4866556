"""Balancing experts: by bias, by a loss of each sequence, by the classic loss of a batch, or not at all.

    python -m experiments.balance [--size gpu]

Loss and load violation (max / mean - 1, section 4.5.2) by layer over time, for the report's section 2.1.2; and how the
experts of the model that was balanced by bias share out domains of text. Runs differ in the balancing alone.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro

from dsv3_jax.data import load_tokenizer
from dsv3_jax.model.router import RouterStats
from dsv3_jax.model.transformer import DeepSeekV3, Outputs, expert_load, router_stats
from dsv3_jax.training.losses import Loss, LossSums, ModelInputs, PretrainingLoss, Whole, forward, model_inputs
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

NAME = "balance"
METHODS = {
    "bias": "bias (auxiliary-loss-free)",
    "sequence": "loss of each sequence",
    "batch": "loss of the batch (classic)",
    "none": "none",
}
ALPHA = 0.01
"""Factor of the two losses."""
MODEL = dataclasses.replace(SMALL, num_nextn_predict_layers=0, aux_loss_alpha=0.0)


@dataclasses.dataclass(frozen=True)
class ClassicLoss(PretrainingLoss):
    """Cross entropy, and alpha E sum_i f_i P_i of the whole batch (Switch Transformer, eq. 4), summed over layers."""

    def __call__(self, outputs: Outputs, inputs: ModelInputs, whole: Whole) -> tuple[jax.Array, LossSums]:
        objective, sums = super().__call__(outputs, inputs, whole)
        return objective + ALPHA * sum(batch_balance(s) for s in router_stats(outputs).values()), sums


def batch_balance(stats: RouterStats) -> jax.Array:
    """Sum over layers of sum_i f_i P_i, each a mean over the batch; `fraction` has the factor E / K in it."""
    return jnp.sum(jnp.mean(stats.fraction, -2) * jnp.mean(stats.affinity, -2))


def run_and_loss(method: str, base: SmallRun, seed: int) -> tuple[SmallRun, Loss]:
    """The run of a method, and its objective."""
    speed = 0.01 if method == "bias" else 0.0
    model = dataclasses.replace(base.model, aux_loss_alpha=ALPHA if method == "sequence" else 0.0)
    run = dataclasses.replace(base, model=model, seed=seed, bias_update_speed=speed)
    return run, (ClassicLoss if method == "batch" else PretrainingLoss)(model, run.schedule)


def domains() -> dict[str, str]:
    """Texts of some kinds, a few thousand bytes each."""
    rng = np.random.default_rng(0)
    prose = " ".join(line.strip() for line in (inspect.getdoc(json) or "").splitlines()) + (inspect.getdoc(dict) or "")
    text = " ".join(inspect.getdoc(o) or "" for o in (str.split, str.encode, list.sort, int, print, open, range, zip))
    return {
        "Python": inspect.getsource(argparse_module()),
        "prose": prose + text,
        "numbers": " ".join(map(str, rng.integers(0, 10**6, 2000).tolist())),
        "hex": rng.bytes(8000).hex(),
        "upper case": (inspect.getdoc(open) or "").upper(),
    }


def argparse_module() -> Any:
    """A module of Python's standard library whose source is long."""
    import argparse

    return argparse


def shares(run: SmallRun, variables: Any) -> dict[str, list[list[float]]]:
    """Per domain and sparse layer, the share of tokens that goes to each expert."""
    model, tokenizer, found = DeepSeekV3(run.model, run.runtime), load_tokenizer(None), {}

    @jax.jit
    def load(tokens: jax.Array) -> jax.Array:
        inputs = model_inputs(model, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
        return expert_load(forward(model, variables, inputs))["moe_layers"]

    for name, text in domains().items():
        tokens = tokenizer.encode(text * 8)[: 8 * (run.length + 1)].reshape(8, -1)
        counts = np.asarray(load(jnp.asarray(tokens)))
        found[name] = (counts / counts.sum(-1, keepdims=True)).tolist()
    return found


def compute(method: str, base: SmallRun, seed: int) -> dict[str, Any]:
    """Trains with a method: its records, and of the bias the experts' shares."""
    run, loss = run_and_loss(method, base, seed)
    state, records = pretrain(run, loss, every=10, name=f"{method}-{seed}")
    return {"method": method, "seed": seed, "records": records, "shares": shares(run, state.variables)}


# The report ------------------------------------------------------------------------------------------------


def final(results: Results, method: str) -> tuple[float, float]:
    """Means over seeds of a method's validation loss, and of its worst layer's violation on the validation batches."""
    last = [r["records"][-1] for r in results["runs"] if r["method"] == method]
    worst = [max(r["validation_load_violation/moe_layers"]) for r in last]
    return float(np.mean([r["validation_loss"] for r in last])), float(np.mean(worst))


def render(results: Results) -> str:
    """The report in Markdown."""
    rows = [[said, *(f"{x:.4f}" for x in final(results, method))] for method, said in METHODS.items()]
    (loss, worst), (other_loss, other_worst) = final(results, "bias"), final(results, "batch")
    seeds = sorted({r["seed"] for r in results["runs"]})
    return (
        f"# Balancing experts\n\n{circumstances_line(results)}\n\n"
        f"{results['tokens']:,} tokens each, {len(seeds)} seed{'s' * (len(seeds) > 1)}; factor of the losses "
        f"{results['alpha']}.\n\n"
        f"{table(['balancing', 'validation loss (nats per byte)', 'load violation of the worst layer'], rows)}\n\n"
        f"With the bias, the worst layer's violation is {worst:.3f} ({other_worst:.3f} with the classic loss), the "
        f"loss {loss - other_loss:+.4f} nats per byte from the classic loss's.\n\n"
        f"![violation over time; experts' shares of domains]({results['name']}.png)\n"
    )


def plot(results: Results, path: Path) -> None:
    """Draws violation by layer over time of each method, and the experts' shares of each domain."""
    figure, axes = plt.subplots(1, 5, figsize=(20, 4), constrained_layout=True)
    first = {r["method"]: r for r in reversed(results["runs"])}
    for ax, (method, said) in zip(axes, METHODS.items(), strict=False):
        records = first[method]["records"]
        curves = np.array([r["load_violation/moe_layers"] for r in records])
        for layer, curve in enumerate(curves.T):
            ax.plot([r["step"] for r in records], curve, label=f"sparse layer {layer}")
        ax.set(title=said, xlabel="step", ylabel="load violation", ylim=(0, 4))
        ax.grid(alpha=0.3)
        ax.legend()
    found = first["bias"]["shares"]
    image = axes[4].imshow([np.concatenate(layers) for layers in found.values()], aspect="auto", cmap="viridis")
    axes[4].set(yticks=range(len(found)), yticklabels=list(found), xlabel="expert, layer after layer")
    axes[4].set(title="share of a domain's tokens (bias)")
    figure.colorbar(image)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    size: Size = "cpu",
    steps: int | None = None,
    seeds: int = 1,
    workers: int = 1,
    pieces: Path = Path("runs/balance"),
) -> None:
    """Trains with each method and writes the report.

    Args:
      size: cpu, 2,048 tokens per step; gpu, a model of 16 times the parameters per layer and 32,768 tokens.
      steps: optimizer steps of a run; by default 400 on a CPU, 600 on a GPU.
      seeds: runs of each method.
      workers: runs at a time, each on its share of the cores.
      pieces: where finished runs are kept: they aren't done again.
    """
    base, name = SmallRun.of(size, MODEL, steps), result_name(NAME, size)
    files = {
        pieces / f"{method}-{seed}-{size}-{base.steps}.json": functools.partial(compute, method, base, seed)
        for seed in range(seeds)
        for method in METHODS
    }
    command = f"python -m experiments.balance --size {size} --steps {base.steps} --seeds {seeds} --workers {workers}"
    results = {
        "name": name,
        "circumstances": circumstances(command),
        "tokens": base.tokens,
        "alpha": ALPHA,
        "runs": compute_pieces(files, workers),
    }
    write_results(name, results, render, plot)


if __name__ == "__main__":
    tyro.cli(main)
