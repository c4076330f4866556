"""Loss by position: whether a context extension (report section 4.3) helps where the model had never been.

    python -m experiments.loss_by_position --runs runs/short runs/longer --length 2048

prints, for each run, the cross entropy of held-out text in equal pieces of the sequence; also for the first run at that
length under the RoPE of the last one, without training.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dsv3_jax.checkpoint.load import load_pretrained
from dsv3_jax.checkpoint.run_tokenizer import run_tokenizer
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig, validation_batches
from dsv3_jax.model.transformer import DeepSeekV3


@dataclass(frozen=True)
class Args:
    """Loss by position of training runs."""

    runs: tuple[Path, ...]
    """Directories of runs, of which the last one has the length in question."""
    length: int = 2048
    """Tokens of a sequence."""
    sequences: int = 32
    """Held-out sequences, of the run's default data."""
    pieces: int = 8
    """Equal pieces of a sequence."""


def by_position(
    model: DeepSeekV3, variables: object, tokens: np.ndarray, targets: np.ndarray, pieces: int
) -> list[float]:
    """Mean cross entropy in nats of each piece of sequences (N, T)."""

    @jax.jit
    def nll(variables: object, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        return model.apply(variables, tokens, (), method="forward").logits.cross_entropy(targets)[0]

    losses = np.concatenate([nll(variables, t[None], y[None]) for t, y in zip(tokens, targets, strict=True)])
    return [round(float(part.mean()), 4) for part in np.split(losses, pieces, axis=1)]


def main(args: Args) -> None:
    data = DataConfig(sequence_length=args.length)
    batch = validation_batches(data, run_tokenizer(args.runs[-1]), args.sequences, 1)[0]
    tokens, targets = jnp.asarray(batch["tokens"]), jnp.asarray(batch["targets"])
    models = {str(run): load_pretrained(run) for run in args.runs}
    longest: ModelConfig = models[str(args.runs[-1])][0].config
    first, variables = models[str(args.runs[0])]
    plain = dataclasses.replace(first.config, max_position_embeddings=args.length)
    rows = {f"{args.runs[0]}, its own RoPE": (DeepSeekV3(plain, first.runtime), variables)}
    rows |= {f"{args.runs[0]}, the last one's RoPE": (DeepSeekV3(longest, first.runtime), variables)}
    rows |= {str(run): models[str(run)] for run in args.runs[1:]}
    for name, (model, weights) in rows.items():
        print(
            json.dumps({"model": name, "loss": by_position(model, weights, tokens, targets, args.pieces)}), flush=True
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
