"""Context extension by YaRN (report section 4.3): a needle's retrieval by length and depth, before and after.

    python -m experiments.context_extension [--size gpu]

A small model learns at 128 tokens to say the digit that a mark in a haystack of letters is followed by. Then its
context is extended four times by YaRN and a short training at 512 tokens; on a GPU, from 512 to 2048 tokens. The grid
is that of the usual needle test: length of the haystack against the needle's depth, each cell the share of right
digits; "before" is the model as trained, without YaRN, at lengths that it has never seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tyro

from dsv3_jax.config import Yarn
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.training.losses import IGNORE, PretrainingLoss
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.step import TrainState, init_state, make_train_step
from experiments.small_run import (
    SMALL,
    Results,
    Size,
    SmallRun,
    circumstances,
    circumstances_line,
    once,
    result_name,
    table,
    write_results,
)

NAME = "context-extension"
FACTOR = 4
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MARK = ord("#")
MODEL = dataclasses.replace(
    SMALL,
    **dict(num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0),
    **dict(hidden_size=64, intermediate_size=128, q_lora_rank=None, kv_lora_rank=32, qk_rope_head_dim=16),
)


def base_run(size: Size) -> SmallRun:
    """The run at the short length, of one step."""
    length = {"cpu": 128, "gpu": 512}[size]
    model = dataclasses.replace(MODEL, max_position_embeddings=FACTOR * length)
    run = SmallRun.of(size, model, 1, length=length)
    layers = dict(num_hidden_layers=2, first_k_dense_replace=2)
    tokens = {"cpu": 4096, "gpu": 32768}[size]
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **layers), batch_size=tokens // length)


def extended(run: SmallRun, steps: int) -> SmallRun:
    """The run at the long length, with as many tokens per step and a third of the learning rate."""
    yarn = Yarn(float(FACTOR), run.length, mscale=1.0, mscale_all_dim=1.0)
    sizes = dict(length=FACTOR * run.length, batch_size=run.batch_size // FACTOR, steps=steps)
    model = dataclasses.replace(run.model, rope_scaling=yarn)
    return dataclasses.replace(run, model=model, peak_learning_rate=run.peak_learning_rate / 3, **sizes)


def haystacks(
    rng: np.random.Generator, rows: int, length: int, depth: float | None = None, asked: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Letters, in them a mark and a digit, and the mark again at the end; and targets, the digit there, else IGNORE.

    depth: where the needle is, from 0 (the beginning) to 1; by default anywhere.
    asked: times that the mark comes again after the needle, as in training: a target each time.
    """
    tokens = rng.integers(ord("a"), ord("z") + 1, (rows, length)).astype(np.int32)
    targets = np.full_like(tokens, IGNORE)
    digits = rng.integers(ord("0"), ord("9") + 1, rows).astype(np.int32)
    last = (length - 3) // 2  # marks and digits are at 2 i and 2 i + 1
    needle = rng.integers(0, last + 1, rows) if depth is None else np.full(rows, round(depth * last))
    row = np.arange(rows)
    for i in range(asked):
        at = needle if i == 0 else rng.integers(needle, last + 1)
        tokens[row, 2 * at], tokens[row, 2 * at + 1] = MARK, digits
        targets[row, 2 * at] = np.where(at > needle, digits, IGNORE)
    tokens[:, -1], targets[:, -1] = MARK, digits
    return tokens, targets


def learn(run: SmallRun, rng: np.random.Generator, state: TrainState | None) -> TrainState:
    """Trains on haystacks, half of which ask once and half eight times; from `state`'s parameters, if it is given."""
    config, steps, length, half = run.model, run.steps, run.length, run.batch_size // 2
    model, optimizer = DeepSeekV3(config, run.runtime), make_optimizer(OptimizerConfig(weight_decay=0.0), run.schedule)
    begun = init_state(model, optimizer, jax.random.key(0))
    state = begun if state is None else dataclasses.replace(begun, params=state.params)
    step = jax.jit(make_train_step(model, optimizer, PretrainingLoss(config, run.schedule)), donate_argnums=0)
    for done in range(1, steps + 1):
        parts = haystacks(rng, half, length), haystacks(rng, half, length, asked=8)
        tokens, targets = (np.concatenate(of) for of in zip(*parts, strict=True))
        state, metrics = step(state, {"tokens": tokens, "targets": targets})
        if done % 100 == 0:
            print(f"{length} tokens: step {done}/{steps}, loss {float(metrics['loss']):.3f}", flush=True)
    return state


def grid(run: SmallRun, state: TrainState, lengths: Sequence[int], rows: int = 40) -> list[list[float]]:
    """Share of right digits, by length and depth."""
    model, rng = DeepSeekV3(run.model, run.runtime), np.random.default_rng(1)
    answer = jax.jit(lambda tokens: jnp.argmax(model.apply(state.variables, tokens)[:, -1], -1))

    def right(length: int, depth: float) -> float:
        tokens, targets = haystacks(rng, rows, length, depth)
        return float(np.mean(np.asarray(answer(jnp.asarray(tokens))) == targets[:, -1]))

    return [[right(length, depth) for depth in DEPTHS] for length in lengths]


def compute(run: SmallRun, longer: SmallRun, lengths: Sequence[int]) -> dict[str, Any]:
    """Trains short, extends, and measures both."""
    rng = np.random.default_rng(0)
    short = learn(run, rng, None)
    before, only_yarn = grid(run, short, lengths), grid(longer, short, lengths)
    after = grid(longer, learn(longer, rng, short), lengths)
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
        f"![needle grids]({results['name']}.png)\n"
    )


def plot(results: Results, path: Path) -> None:
    """Draws the grids."""
    figure, axes = plt.subplots(1, len(results["grids"]), figsize=(13, 4), constrained_layout=True)
    for ax, (name, values) in zip(axes, results["grids"].items(), strict=True):
        image = ax.imshow(np.array(values).T, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        ax.set(title=name, xlabel="length (tokens)", ylabel="depth of the needle")
        ax.set(
            xticks=range(len(results["lengths"])),
            xticklabels=results["lengths"],
            yticks=range(len(DEPTHS)),
            yticklabels=DEPTHS,
        )
    figure.colorbar(image, label="right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(size: Size = "cpu", steps: int = 800, more: int = 100, pieces: Path = Path("runs/context_extension")) -> None:
    """Trains, extends, measures, and writes the report.

    Args:
      size: cpu, from 128 to 512 tokens; gpu, a wider model, from 512 to 2048.
      steps: at the short length, each of 4,096 tokens on a CPU and 32,768 on a GPU.
      more: at the long length.
      pieces: where the measurements are kept: they aren't made again.
    """
    run, name = dataclasses.replace(base_run(size), steps=steps), result_name(NAME, size)
    longer, lengths = extended(run, more), [run.length * x // 2 for x in (1, 2, 4, 6, 8)]
    grids = once(pieces / f"{size}-{steps}-{more}.json", lambda: compute(run, longer, lengths))
    command = f"python -m experiments.context_extension --size {size} --steps {steps} --more {more}"
    results = {
        **dict(name=name, circumstances=circumstances(command), trained=run.length, extended=longer.length),
        **dict(steps=steps, more=more, lengths=lengths, depths=list(DEPTHS), grids=grids),
    }
    write_results(name, results, render, plot)


if __name__ == "__main__":
    tyro.cli(main)
