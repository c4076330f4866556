"""Context extension by YaRN (report section 4.3): a needle's retrieval by length and depth, before and after.

    python -m experiments.context_extension

A small model learns at 128 tokens to say the digit that a mark in a haystack of letters is followed by. Then its
context is extended four times by YaRN and a short training at 512 tokens. The grid is that of the usual needle test:
length of the haystack against the needle's depth, each cell the share of right digits; "before" is the model as
trained, without YaRN, at lengths that it has never seen.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro

from dsv3_jax.config import ModelConfig, Yarn
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.training.losses import IGNORE, PretrainingLoss
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.step import TrainState, init_state, make_train_step
from experiments.small_run import (
    SMALL,
    Results,
    SmallRun,
    circumstances,
    circumstances_line,
    once,
    table,
    write_results,
)

NAME = "context-extension"
SHORT, LONG = 128, 512
LENGTHS, DEPTHS = (64, 128, 256, 384, 512), (0.0, 0.25, 0.5, 0.75, 1.0)
MARK = ord("#")
BASE = dataclasses.replace(
    SMALL,
    **dict(num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0, max_position_embeddings=LONG),
    **dict(hidden_size=64, intermediate_size=128, q_lora_rank=None, kv_lora_rank=32, qk_rope_head_dim=16),
)
EXTENDED = dataclasses.replace(BASE, rope_scaling=Yarn(LONG / SHORT, SHORT, mscale=1.0, mscale_all_dim=1.0))


def haystacks(rng: np.random.Generator, rows: int, length: int, depth: float | None = None) -> tuple[Any, Any]:
    """Letters with a mark and a digit in them, the mark again at the end; and the digits.

    depth: where the needle is, from 0 (the beginning) to 1; by default anywhere.
    """
    tokens = rng.integers(ord("a"), ord("z") + 1, (rows, length)).astype(np.int32)
    digits = rng.integers(ord("0"), ord("9") + 1, rows).astype(np.int32)
    last = length - 3
    at = rng.integers(0, last + 1, rows) if depth is None else np.full(rows, round(depth * last))
    tokens[np.arange(rows), at], tokens[np.arange(rows), at + 1], tokens[:, -1] = MARK, digits, MARK
    return tokens, digits


def learn(
    config: ModelConfig, steps: int, length: int, rate: float, rng: np.random.Generator, state: TrainState | None
) -> TrainState:
    """Trains on haystacks of up to `length` tokens; only the digit at the end is a target."""
    rows = 4096 // length
    run = SmallRun(config, steps, rows, length, peak_learning_rate=rate)
    model, optimizer = DeepSeekV3(config), make_optimizer(OptimizerConfig(weight_decay=0.0), run.schedule)
    begun = init_state(model, optimizer, jax.random.key(0))
    state = begun if state is None else dataclasses.replace(begun, params=state.params)
    step = jax.jit(make_train_step(model, optimizer, PretrainingLoss(config, run.schedule)), donate_argnums=0)
    for done in range(1, steps + 1):
        tokens, digits = haystacks(rng, rows, length)
        targets = np.full_like(tokens, IGNORE)
        targets[:, -1] = digits
        state, metrics = step(state, {"tokens": tokens, "targets": targets})
        if done % 100 == 0:
            print(f"{length} tokens: step {done}/{steps}, loss {float(metrics['loss']):.3f}", flush=True)
    return state


def grid(config: ModelConfig, state: TrainState, rows: int = 40) -> list[list[float]]:
    """Share of right digits, by length and depth."""
    model, rng = DeepSeekV3(config), np.random.default_rng(1)
    answer = jax.jit(lambda tokens: jnp.argmax(model.apply(state.variables, tokens)[:, -1], -1))

    def right(length: int, depth: float) -> float:
        tokens, digits = haystacks(rng, rows, length, depth)
        return float(np.mean(np.asarray(answer(jnp.asarray(tokens))) == digits))

    return [[right(length, depth) for depth in DEPTHS] for length in LENGTHS]


def compute(steps: int, more: int) -> dict[str, Any]:
    """Trains short, extends, and measures both."""
    rng = np.random.default_rng(0)
    short = learn(BASE, steps, SHORT, 3e-3, rng, None)
    before, only_yarn = grid(BASE, short), grid(EXTENDED, short)
    after = grid(EXTENDED, learn(EXTENDED, more, LONG, 1e-3, rng, short))
    return {"before": before, "YaRN without training": only_yarn, "after": after}


def render(results: Results) -> str:
    """The report in Markdown."""
    at = lambda name, length: 100 * float(np.mean(results["grids"][name][results["lengths"].index(length)]))
    rows = [[name, *(f"{at(name, length):.1f}" for length in results["lengths"])] for name in results["grids"]]
    short, long = results["trained"], results["extended"]
    return (
        f"# Context extension: {short} to {long} tokens by YaRN\n\n{circumstances_line(results)}\n\n"
        f"{results['steps']} steps at {short} tokens, then {results['more']} at {long}. Right digits in per cent, "
        f"means over depths, by length of the haystack (chance: 10):\n\n"
        f"{table(['', *map(str, results['lengths'])], rows)}\n\n"
        f"At {long} tokens, retrieval goes from {at('before', long):.1f} % to {at('after', long):.1f} %.\n\n"
        "![needle grids](context-extension.png)\n"
    )


def plot(results: Results, path: Path) -> None:
    """Draws the grids."""
    figure, axes = plt.subplots(1, len(results["grids"]), figsize=(13, 4), constrained_layout=True)
    for ax, (name, values) in zip(axes, results["grids"].items(), strict=True):
        image = ax.imshow(np.array(values).T, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        ax.set(title=name, xlabel="length (tokens)", ylabel="depth of the needle")
        ax.set(xticks=range(len(LENGTHS)), xticklabels=LENGTHS, yticks=range(len(DEPTHS)), yticklabels=DEPTHS)
    figure.colorbar(image, label="right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(steps: int = 800, more: int = 100, pieces: Path = Path("runs/context_extension")) -> None:
    """Trains, extends, measures, and writes the report.

    Args:
      steps: at the short length, each of 4096 tokens.
      more: at the long length.
      pieces: where the measurements are kept: they aren't made again.
    """
    grids = once(pieces / f"{steps}-{more}.json", lambda: compute(steps, more))
    results = {
        "circumstances": circumstances(f"python -m experiments.context_extension --steps {steps} --more {more}"),
        **dict(trained=SHORT, extended=LONG, steps=steps, more=more, lengths=list(LENGTHS), depths=list(DEPTHS)),
        "grids": grids,
    }
    write_results(NAME, results, render, plot)


if __name__ == "__main__":
    tyro.cli(main)
