"""Context extension by YaRN (report section 4.3): a needle's retrieval by length and depth, before and after.

    python -m experiments.context_extension [--size gpu]

A small model learns at 128 tokens to recall: each token of a haystack is a key with a digit, and the tokens at its end
are keys whose digits are asked for. Then its context is extended four times by YaRN and a short training at 512 tokens;
on a GPU, from 512 to 2048 tokens. The grid is that of the usual needle test: length of the haystack against the
needle's depth, each cell the share of right digits for a key that was there once; "before" is the model as trained,
without YaRN, at lengths that it has never seen. Heads are mostly rotated, and rotations are as slow, for the short
length, as those of DeepSeek-V3 for its 4,096 tokens: otherwise a model this small finds keys without regard to their
positions, and there is nothing to extend.
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
ROPE_THETA = 10_000.0
"""DeepSeek-V3's, whose rotated heads are 64 wide."""
DEPTHS = tuple(i / 10 for i in range(10))
KEYS, ASKED = 16, 8
"""Different keys, and how many are asked for at the end of a training text."""
PAIRS, QUESTIONS, DIGITS = 64, 64 + 10 * KEYS, 48
"""First ids of the tokens: of a key with its digit, of a key that is asked for, of the digits."""
MODEL = dataclasses.replace(
    SMALL,
    **dict(num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0),
    **dict(hidden_size=64, intermediate_size=128, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=1),
    **dict(qk_rope_head_dim=16),
)


def base_run(size: Size) -> SmallRun:
    """The run at the short length, of one step."""
    length = {"cpu": 128, "gpu": 512}[size]
    model = dataclasses.replace(MODEL, max_position_embeddings=FACTOR * length)
    run = SmallRun.of(size, model, 1, length=length)
    # RoPE's slowest rotation is theta^(-(d - 2) / d) per token: over the short length, V3's over 4,096 tokens.
    slowest, d = ROPE_THETA ** -(62 / 64) * 4096 / length, run.model.qk_rope_head_dim
    sizes = dict(num_hidden_layers=2, first_k_dense_replace=2, rope_theta=slowest ** -(d / (d - 2)))
    tokens = {"cpu": 4096, "gpu": 32768}[size]
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **sizes), batch_size=tokens // length)


def extended(run: SmallRun, steps: int) -> SmallRun:
    """The run at the long length, with as many tokens per step and a third of the learning rate."""
    yarn = Yarn(float(FACTOR), run.length, mscale=1.0, mscale_all_dim=1.0)
    sizes = dict(length=FACTOR * run.length, batch_size=run.batch_size // FACTOR, steps=steps)
    model = dataclasses.replace(run.model, rope_scaling=yarn)
    return dataclasses.replace(run, model=model, peak_learning_rate=run.peak_learning_rate / 3, **sizes)


def haystacks(
    rng: np.random.Generator, rows: int, length: int, depth: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Keys with their digits, the same wherever a key comes again, and questions at the end; targets: their digits.

    depth: where the one key that is asked for came, once, as a share of the length; by default `ASKED` keys that came
      anywhere, as in training.
    """
    asked, row = (ASKED if depth is None else 1), np.arange(rows)
    digits = rng.integers(0, 10, (rows, KEYS))
    names = rng.permuted(np.tile(np.arange(KEYS), (rows, 1)), axis=1)[:, :asked]
    keys = rng.integers(0, KEYS, (rows, length))
    if depth is not None:  # the needle's key comes nowhere else
        keys = (names + rng.integers(1, KEYS, (rows, length))) % KEYS
        keys[row, int(depth * (length - 1))] = names[:, 0]
    tokens = PAIRS + 10 * keys + np.take_along_axis(digits, keys, axis=1)
    targets = np.full((rows, length), IGNORE)
    tokens[:, -asked:] = QUESTIONS + names
    targets[:, -asked:] = DIGITS + np.take_along_axis(digits, names, axis=1)
    return tokens.astype(np.int32), targets.astype(np.int32)


def learn(run: SmallRun, rng: np.random.Generator, state: TrainState | None) -> TrainState:
    """Trains on haystacks; from `state`'s parameters, if it is given."""
    config, steps, length = run.model, run.steps, run.length
    model, optimizer = DeepSeekV3(config, run.runtime), make_optimizer(OptimizerConfig(weight_decay=0.0), run.schedule)
    begun = init_state(model, optimizer, jax.random.key(0))
    state = begun if state is None else dataclasses.replace(begun, params=state.params)
    step = jax.jit(make_train_step(model, optimizer, PretrainingLoss(config, run.schedule)), donate_argnums=0)
    for done in range(1, steps + 1):
        tokens, targets = haystacks(rng, run.batch_size, length)
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


def main(size: Size = "cpu", steps: int = 1500, more: int = 250, pieces: Path = Path("runs/context_extension")) -> None:
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
